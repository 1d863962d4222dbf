"""--save_model through the scripts: what is evaluated again, and what is refused."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import run_script, tiny_model
from safetensors.torch import load_file
from script_cases import (
    assert_refused,
    common,
    kill_at,
    layer_content,
    results_of,
    save_sharded,
    settings_of,
    snapshot,
)
from starter import shared_starter
from transformers import AutoModelForCausalLM

from duquant.runtime import EXPANSIONS, RUNTIMES, set_runtime_
from evaluation.perplexity import perplexity
from evaluation.settings import Expand, Runtime
from experiment.prepare import refuse_for_saved
from models import decoder_spec
from models.saved import INDEX
from quantize.settings import QuantSettings
from utils.errors import InputError
from utils.settings import defaults

FLAGS = ("--wbits", 4, "--abits", 4, "--smooth", "--lac", 0.95, "--swc", 0.9, "--block_size", 16)
STEPS = ("--max_rotation_step", 20)
EVERYTHING = ("--wbits", 3, "--abits", 5, "--qbits", 6, "--kbits", 8, "--vbits", 4, "--group_size", 8)
EVERYTHING += ("--symmetric", "--act_group_size", 16, "--act_symmetric", "--lac", 0.95, "--lac_kv", 0.9)
EVERYTHING += ("--smooth", "--alpha", 0.6, "--smooth_weight_peak", "group", "--gqa_smooth", "fold")
EVERYTHING += ("--block_size", 8, "--permutation_times", 2, "--max_rotation_step", 5, "--rotation_order", "QR")
EVERYTHING += ("--rotation_search", "row", "--probe", "sample", "--seed", 5, "--lwc", "--epochs", 1, "--aug_loss")
LAYERS = 4


@pytest.fixture(scope="module")
def exported(model_folder, token_file, tmp_path_factory):
    """A run of main.py --save_model: its folder and results."""
    folder = tmp_path_factory.mktemp("exported")
    data = ("--model", model_folder, "--calib_dataset", token_file, "--test_dataset", token_file, "--net", "tiny")
    done = run_script("main.py", *data, *FLAGS, *STEPS, "--eval_ppl", "--save_model", "saved", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, results_of(folder)


def test_the_command_line_evaluates_a_saved_model_to_exactly_the_same_perplexity(exported, token_file, tmp_path):
    folder, results = exported
    flags = ("--model", folder / "saved", "--calib_dataset", "nowhere.txt", "--test_dataset", token_file, "--eval_ppl")
    done = run_script("main.py", *flags, "--net", "again", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    again = results_of(tmp_path)
    assert again["perplexity"] == results["perplexity"]
    assert again["perplexity_details"] == results["perplexity_details"]
    assert not {"quantize", "statistics"} & set(again["seconds"])


@pytest.mark.parametrize("expand", Expand)
def test_a_saved_model_is_measured_with_integers_where_that_is_asked_for(exported, token_file, tmp_path, expand):
    folder, results = exported
    flags = ("--model", folder / "saved", "--test_dataset", token_file, "--eval_ppl", "--net", "again")
    done = run_script("main.py", *flags, "--runtime", "integer", "--expand", expand, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    again = results_of(tmp_path)
    assert again["settings"]["runtime"] == "integer"
    log = next(tmp_path.rglob("log.txt")).read_text(encoding="utf-8")
    assert log.count("integers") == 1  # the kernel is named, or that there is none
    [[_, expected]], [[_, found]] = results["perplexity"].items(), again["perplexity"].items()
    assert found == pytest.approx(expected, rel=0.02)  # codes on ties, in a model of 12 windows


def test_flags_are_what_the_runtime_knows():
    assert (tuple(Runtime), tuple(sorted(Expand))) == (RUNTIMES, tuple(sorted(EXPANSIONS)))


def test_transformers_gives_the_perplexity_of_the_run_and_the_card_has_it(exported, token_file):
    folder, results = exported
    model = AutoModelForCausalLM.from_pretrained(folder / "saved")
    set_runtime_(model, "reference")
    tokens = load_file(token_file)["test"].long()
    found = perplexity(model, decoder_spec(model.config), tokens, torch.device("cpu"))
    [[label, expected]] = results["perplexity"].items()
    assert found.perplexity == expected
    card = (folder / "saved/README.md").read_text(encoding="utf-8")
    assert f"| {label} | – | {expected:.4f} |" in card
    assert results["command"] in card


def test_a_target_that_is_not_empty_is_refused_before_any_work(exported, model_folder, token_file):
    folder, _ = exported
    before = snapshot(folder)
    data = ("--model", model_folder, "--calib_dataset", token_file, "--net", "tiny")
    done = run_script("main.py", *data, *FLAGS, "--save_model", "saved", folder=folder)
    assert_refused(done, "--save_model saved: is there already and not empty")
    assert snapshot(folder) == before


def test_flags_that_quantize_again_are_refused_for_a_saved_model(exported, token_file, tmp_path):
    usual = ("--model", exported[0] / "saved", "--test_dataset", token_file, "--eval_ppl")
    done = run_script("main.py", *usual, "--save_dir", "d", folder=tmp_path)
    assert_refused(done, f"--save_dir: {exported[0] / 'saved'} is quantized already")
    assert list(tmp_path.iterdir()) == []
    file = (tmp_path / "file",)
    for flag, *more in (
        ("--save_dir", *file),
        ("--resume", *file),
        ("--save_model", *file),
        ("--act-scales", *file, "--smooth"),
        ("--eval_kl", "--eval_ppl"),
        ("--report",),
    ):
        settings = settings_of("--model", "saved", flag, *more)
        with pytest.raises(InputError, match=f"{flag}: saved is quantized already"):
            refuse_for_saved(settings)


def test_a_saved_model_without_its_index_is_refused(exported, token_file, tmp_path):
    shutil.copytree(exported[0] / "saved", tmp_path / "broken")
    (tmp_path / "broken" / INDEX).unlink()
    done = run_script("main.py", "--model", "./broken", "--test_dataset", token_file, "--eval_ppl", folder=tmp_path)
    assert_refused(done, f"{INDEX}: cannot be read")


def test_a_model_quantized_by_another_method_is_refused(model_folder, token_file, tmp_path):
    shutil.copytree(model_folder, tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq/config.json").write_text(json.dumps(config))
    done = run_script("main.py", "--model", "./gptq", "--calib_dataset", token_file, "--abits", 4, folder=tmp_path)
    assert_refused(done, "quantized already, by another method")


def test_saving_what_16_bits_leave_alone_is_refused(model_folder, token_file, tmp_path):
    flags = ("--calib_dataset", token_file, "--wbits", 16, "--abits", 16, "--block_size", 16, "--save_model", "saved")
    assert_refused(run_script("main.py", "--model", model_folder, *flags, folder=tmp_path), "--save_model")
    assert not (tmp_path / "saved").exists()


@pytest.fixture(scope="module")
def sharded(model_folder, tmp_path_factory) -> Path:
    model = tiny_model(num_hidden_layers=LAYERS)
    return save_sharded(model, tmp_path_factory.mktemp("sharded"), model_folder)


@pytest.fixture(scope="module")
def usual(sharded, token_file) -> tuple:
    return (*common(sharded, token_file), "--eval_ppl", "--net", "tiny")


def tensors_of(saved: Path) -> dict[str, dict[str, tuple]]:
    """Every file's tensors, to the bit."""
    return {
        path.name: {name: (each.dtype, each.shape, each.numpy().tobytes()) for name, each in load_file(path).items()}
        for path in saved.glob("*.safetensors")
    }


def evaluated(saved: Path, token_file: Path, folder: Path) -> dict:
    """The results of a run that evaluates a saved model."""
    folder.mkdir()
    flags = ("--model", saved, "--test_dataset", token_file, "--eval_ppl", "--net", "again")
    done = run_script("main.py", *flags, folder=folder)
    assert done.returncode == 0, done.stderr
    return results_of(folder)


@pytest.mark.parametrize("flags", [EVERYTHING, (*FLAGS, *STEPS, "--transform", "hadamard")], ids=["many", "hadamard"])
def test_a_model_saved_while_streaming_is_the_one_saved_from_memory_with_every_setting(
    flags, usual, token_file, tmp_path
):
    made = {}
    for name in ("--no-stream", "--stream"):
        folder = tmp_path / name
        folder.mkdir()
        done = run_script("main.py", *usual, *flags, name, "--save_model", "saved", folder=folder)
        assert done.returncode == 0, done.stderr
        made[name] = folder / "saved", results_of(folder)
    (whole, in_memory), (streamed, layer_by_layer) = made.values()
    assert len(tensors_of(whole)) == LAYERS + 1
    assert tensors_of(streamed) == tensors_of(whole)
    assert sorted(path.name for path in streamed.iterdir()) == sorted(path.name for path in whole.iterdir())
    for name in (INDEX, "config.json"):
        assert json.loads((streamed / name).read_text()) == json.loads((whole / name).read_text())
    again = evaluated(streamed, token_file, tmp_path / "again")
    assert again["perplexity_details"] == in_memory["perplexity_details"] == layer_by_layer["perplexity_details"]
    names = defaults(QuantSettings)
    assert {name: again["settings"][name] for name in names} == {name: in_memory["settings"][name] for name in names}
    assert again["settings"]["block_size"] == (8 if flags is EVERYTHING else 16)
    assert again["method"] == in_memory["method"]


def test_a_run_that_is_killed_leaves_no_model_and_the_next_one_saves_it(usual, token_file, tmp_path):
    flags = (*usual, *FLAGS, "--max_rotation_step", 350, "--save_model", "saved", "--save_dir", "ck")
    at = kill_at(tmp_path / ".saved.unfinished/model-00002-of-00005.safetensors")
    killed = shared_starter().run(tmp_path, *flags, meanwhile=at)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / ".saved.unfinished").exists()
    assert not (tmp_path / "saved").exists()
    assert 0 < len(layer_content(tmp_path / "ck")) < LAYERS, "killed too late to prove anything"
    again = [flag for flag in flags if flag not in ("--save_dir", "ck")]
    for name, how in {"anew": again, "resumed": [*again, "--resume", "ck"]}.items():
        done = run_script("main.py", *how, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / ".saved.unfinished").exists()
        (tmp_path / "saved").rename(tmp_path / name)
    assert tensors_of(tmp_path / "resumed") == tensors_of(tmp_path / "anew")
    expected = results_of(tmp_path)["perplexity_details"]
    assert evaluated(tmp_path / "resumed", token_file, tmp_path / "again")["perplexity_details"] == expected


def test_a_run_that_is_interrupted_leaves_nothing_of_its_model(usual, tmp_path):
    flags = (*usual, *FLAGS, "--max_rotation_step", 350, "--save_model", "saved")
    at = kill_at(tmp_path / ".saved.unfinished/model-00002-of-00005.safetensors", sent=signal.SIGINT)
    assert shared_starter().run(tmp_path, *flags, meanwhile=at).returncode == 130
    assert not (tmp_path / ".saved.unfinished").exists()
    assert not (tmp_path / "saved").exists()
