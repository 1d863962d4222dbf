"""docs/extending.md: every example is taken out of the page, put into a copy of the repository, and run there."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, VOCABULARY, tiny_model
from docs_cases import Block, apply, blocks, copy_house, words_of

PAGE = ROOT / "docs/extending.md"
TINY = ("--block_size", "16", "--max_rotation_step", "3", "--abits", "4")
HELIUM = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
HELIUM |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "pad_token_id": 0}


def sections() -> dict[str, list[Block]]:
    """Heading → its blocks."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        found[heading] = [each for each in blocks(PAGE) if each.text in text]
    return found


EXAMPLES = {heading: found for heading, found in sections().items() if found}


# runs commands one after the other without importing torch each time, each with a folder of its own for its results
RUNNER = """
import json, os, runpy, sys
for name, words in json.loads(sys.argv[1]).items():
    sys.argv = [*words, "--output_dir", name]
    sys.path.insert(0, os.getcwd())
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (name, end.code)
"""


def command_of(heading: str) -> list[str]:
    """The words of an example's command behind `python`."""
    [block] = [each for each in EXAMPLES[heading] if each.language == "bash"]
    assert block.words == ("in=house",)
    [command] = block.commands
    _, words = words_of(command)
    assert words[0] == "python"
    return words[1:]


@pytest.fixture(scope="module")
def house(tmp_path_factory, token_file, model_folder) -> Path:
    """A copy of the repository with every example in it, a tiny Llama, a tiny Helium, and tokens."""
    from transformers import HeliumConfig, HeliumForCausalLM

    added = [block for found in EXAMPLES.values() for block in found if block.file]
    folder = copy_house(tmp_path_factory.mktemp("house"), {Path(block.file).parts[0] for block in added})
    for block in added:
        apply(block, folder)
    torch.manual_seed(0)
    for name, model in {"tiny": tiny_model(), "helium": HeliumForCausalLM(HeliumConfig(**HELIUM))}.items():
        model.save_pretrained(folder / name)
        for path in model_folder.glob("tokenizer*"):
            shutil.copy(path, folder / name)
    shutil.copy(token_file, folder / "tokens.safetensors")
    return folder


@pytest.fixture(scope="module")
def runs(house) -> tuple[dict[str, dict], str]:
    """What every example's command left in results.json, and what all of them printed."""
    commands = {
        "family": [*command_of("A model family"), "--block_size", "8"],
        "transform": [*command_of("A transform"), *TINY],
        "rounding": [*command_of("A way to round weights"), *TINY],
        "nearest": [*command_of("A way to round weights"), *TINY, "--rounding", "nearest"],
        "evaluation": [*command_of("An evaluation"), *TINY],
        "format": [*command_of("A number format"), *TINY],
    }
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNNER, json.dumps(commands)]
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    left = {}
    for name in commands:
        [path] = house.glob(f"{name}/*/results.json")
        left[name] = json.loads(path.read_text(encoding="utf-8"))
    return left, done.stdout


def test_the_page_has_an_example_of_everything_it_promises():
    promised = re.findall(r"^\| \[(.+?)\]\(#", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [each.lower() for each in EXAMPLES] == [each for each in promised if each != "a setting"]
    assert len(EXAMPLES) >= 5


def test_a_family_is_loaded_quantized_and_stays_close_at_eight_bits(runs):
    results = runs[0]["family"]
    [figures] = results["perplexity_details"].values()
    assert 0 < figures["divergence"] < 0.01
    scales = {group["name"]: group["scale"] for group in results["layers"][0]["groups"]}
    norms = {"qkv": "folded into input_layernorm", "gate_up": "folded into post_attention_layernorm"}
    assert scales == norms | {"o": "online", "down": "folded into mlp.up_proj"}


def test_a_transform_has_its_flag_its_name_and_is_a_rotation(house, runs):
    left, printed = runs
    assert left["transform"]["settings"]["transform"] == "cosine"
    assert "smoothing + cosine transform W4A4" in printed
    script = "import torch; from quantize.transforms import cosine_transform as c; from quantize.settings import *; "
    script += "r = c(torch.randn(4, 24), 12, RotationSettings(), torch.Generator()).rotations[0].double(); "
    script += "print((r @ r.T - torch.eye(12)).abs().max() < 1e-6)"
    done = subprocess.run([sys.executable, "-c", script], cwd=house, capture_output=True, text=True, check=True)
    assert "True" in done.stdout


def test_a_rounding_gives_other_codes_than_nearest(runs):
    perplexities = [next(iter(runs[0][name]["perplexity"].values())) for name in ("rounding", "nearest")]
    assert perplexities[0] != perplexities[1]
    assert all(math.isfinite(each) for each in perplexities)


def test_an_evaluation_is_measured_and_tabled(runs):
    left, printed = runs
    assert left["evaluation"]["toy"]["large"] > 0
    assert "| large parameters" in printed


def test_a_format_is_what_the_run_rounds_to(house, runs):
    left, printed = runs
    assert left["format"]["settings"]["wformat"] == "mxfp4_short"
    assert "mxfp4_short" in printed
    codes = "from duquant.formats import MxFp4Short as F; import torch; f = F(); x = torch.randn(3, 2, 16); "
    codes += "p = f.parameters(*torch.aminmax(x, dim=-1, keepdim=True)); y = f.decode(f.encode(x, p)); "
    codes += (
        "print(torch.equal(y, f.fake(x, p)) and p.scale.shape == (3, 2, 1) and 0 < (x - y).abs().max() < x.abs().max())"
    )
    done = subprocess.run([sys.executable, "-c", codes], cwd=house, capture_output=True, text=True, check=True)
    assert "True" in done.stdout


def test_changes_are_made_where_their_old_lines_are_and_nowhere_else(tmp_path):
    (tmp_path / "a.py").write_text("one\ntwo\nthree\n")
    apply(Block("diff", ("file=a.py",), " one\n-two\n+2\n", "page"), tmp_path)
    assert (tmp_path / "a.py").read_text() == "one\n2\nthree\n"
    with pytest.raises(AssertionError, match="0 times"):
        apply(Block("diff", ("file=a.py",), " there is no such line\n+new\n", "page"), tmp_path)
