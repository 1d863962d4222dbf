"""python -m duquant: writing text, measuring speed, and one line for what cannot be used."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, random_tokens, tiny_model
from families import quantize, save, settings
from torch import nn
from transformers import AutoTokenizer

from duquant.__main__ import main, speed_line
from duquant.bench import Speed, measure, table

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sound(model_folder, tmp_path_factory) -> tuple[Path, nn.Module]:
    """A folder with a saved model, and the model."""
    folder = tmp_path_factory.mktemp("sound") / "saved"
    model, _ = quantize(tiny_model(), settings(), tokens=random_tokens(2, 12))
    save(folder, model, settings(), model_folder)
    return folder, model


@pytest.fixture(autouse=True)
def talkative():
    """What the command line silences is silent during it only."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


def refused(capsys, *arguments: object) -> str:
    """The one line on stderr of a command that ends with code 2."""
    try:
        code = main([str(each) for each in arguments])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    [line] = said.err.strip().splitlines()
    return line


def test_it_writes_what_the_model_writes_and_says_how_fast(sound, capsys):
    folder, model = sound
    assert main([str(folder), "--prompt", "w1 w2", "--max-new-tokens", "6"]) == 0
    said = capsys.readouterr()
    tokens = model.generate(torch.tensor([[1, 2]]), max_new_tokens=6, do_sample=False)[0]
    assert said.out.split() == AutoTokenizer.from_pretrained(folder).decode(tokens).split()
    expected = r"6 tokens, [\d.]+ tokens/s; prompt: 2 in [\d.]+ s; peak memory: [\d.]+ GB\n"
    assert re.fullmatch(expected, said.err)


def test_the_speed_is_that_of_the_tokens_behind_the_first():
    assert (
        speed_line([0.0, 2.0, 2.5, 3.0], 7, 10**9)
        == "3 tokens, 2.0 tokens/s; prompt: 7 in 2.00 s; peak memory: 1.00 GB"
    )
    assert speed_line([0.0, 2.0], 7, 10**9) == "1 tokens; prompt: 7 in 2.00 s; peak memory: 1.00 GB"


def test_it_measures_the_model_beside_its_base_in_every_precision(sound, model_folder, capsys):
    arguments = ["bench", str(sound[0]), "--base", str(model_folder), "--prompt_tokens", "9", "--new_tokens", "2"]
    assert main(arguments) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split("  ")[-1] == "model, GB"
    assert [row.split("  ")[0] for row in rows] == ["quantized, float32", "float32", "bfloat16", "float16"]
    assert all(row.count("x)") == 3 for row in rows[1:])


def test_without_a_base_model_the_quantized_one_is_measured_alone_and_that_is_said(sound, capsys):
    assert main(["bench", str(sound[0]), "--prompt_tokens", "9", "--new_tokens", "2"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert "to measure that too give --base" in said.err


def test_what_is_measured_is_tokens_over_time_and_bytes(sound, monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 10.0, 12.0, 13.0])  # of the warm-up, and then of what is measured
    monkeypatch.setattr("duquant.bench._now", lambda device: next(clock))
    speed = measure(sound[1], random_tokens(1, 10), 4)
    assert (speed.prefill, speed.decode) == (5.0, 4.0)
    tensors = (*sound[1].parameters(), *sound[1].buffers())
    assert speed.model_bytes == sum(tensor.nbytes for tensor in tensors)


def test_ratios_are_of_the_quantized_model_to_the_other():
    speeds = {"own": Speed(100.0, 30.0, 10**9, 5), "other": Speed(200.0, 20.0, 4 * 10**9, 5)}
    assert table(speeds, CPU).splitlines()[2].split("  ")[-1].strip() == "4 (0.25x)"
    assert "200 (0.50x)" in table(speeds, CPU)
    assert "20 (1.50x)" in table(speeds, CPU)


@pytest.fixture
def damaged(sound, tmp_path) -> Path:
    folder = shutil.copytree(sound[0], tmp_path / "saved")
    (folder / "model-00002-of-00003.safetensors").unlink()
    return folder


def test_what_cannot_be_used_ends_in_one_line(sound, model_folder, damaged, tmp_path, capsys):
    folder, prompt = sound[0], ("--prompt", "w1")
    for arguments, words in {
        (tmp_path / "nowhere", *prompt): "nowhere: no such folder",
        (tmp_path, *prompt): "cannot be loaded",
        (model_folder, *prompt): "is no model that main.py --save_model wrote",
        (damaged, *prompt): "model-00002-of-00003.safetensors: no such file",
        (folder, "--prompt", ""): "--prompt: has no tokens",
        (folder,): "--prompt",
        (folder, *prompt, "--max_new_tokens", 0): "--max_new_tokens",
        (folder, *prompt, "--max-new", 3): "unrecognized arguments: --max-new",
        (folder, *prompt, "--device", "nowhere:1"): "--device nowhere:1: not usable here",
        (folder, *prompt, "--dtype", "int8"): "--dtype",
        (folder, *prompt, "--runtime", "fast"): "--runtime",
        ("bench", folder, "--prompt_tokens", 99): "--prompt_tokens 99 and --new_tokens 32: the model's maximum is 64",
        ("bench", folder, "--base", tmp_path / "nowhere"): "nowhere: no such folder",
        ("bench", folder, "--base", tmp_path): "cannot be loaded",
        ("bench", damaged): "model-00002-of-00003.safetensors: no such file",
    }.items():
        line = refused(capsys, *arguments)
        assert words in line, line


def test_the_module_is_a_command(sound, tmp_path):
    command = [sys.executable, "-m", "duquant", str(tmp_path / "nowhere"), "--prompt", "w1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such folder\n"


def test_the_suite_reads_its_flags_without_loading_the_runtime():
    code = "import sys, experiment.options; print({'torch', 'transformers', 'duquant'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_both_have_the_number_of_bits_that_leaves_a_tensor_alone():
    from duquant.scheme import UNQUANTIZED_BITS
    from quantize import bits as flags

    assert flags.UNQUANTIZED_BITS == UNQUANTIZED_BITS


def test_a_card_names_the_base_model(sound, model_folder, tmp_path, capsys):
    folder = shutil.copytree(sound[0], tmp_path / "saved")
    (folder / "README.md").write_text(f"# A card\n\nBase model: `{model_folder}`\n")
    assert main(["bench", str(folder), "--prompt_tokens", "5", "--new_tokens", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
