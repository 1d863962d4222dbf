"""--stream: the whole run, layer by layer, gives the bits of a run with the model in memory."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from best_settings import FLAGS as BEST
from conftest import random_tokens, tiny_model
from safetensors.torch import load_file, save_file
from script_cases import assert_refused, kill_at, layer_content, results_of, save_sharded, the_run
from starter import shared_starter

from models.shards import INDEX

LAYERS = 4
FLAGS = ("--wbits", 4, "--abits", 4, "--lac", 0.95, "--block_size", 16, "--max_rotation_step", 20, "--net", "tiny")
MEASURED = ("--eval_ppl", "--eval_kl")
SMOOTH = ("--smooth", "--swc", 0.9)
LEARNED = ("--smooth", "--lwc", "--epochs", 2, "--aug_loss")
TRANSFORM = (*BEST, "--value_rotation", "--train", "transform", "--epochs", 2)


@pytest.fixture(scope="module")
def sharded(model_folder, tmp_path_factory) -> Path:
    return save_sharded(tiny_model(num_hidden_layers=LAYERS), tmp_path_factory.mktemp("sharded"), model_folder)


@pytest.fixture(scope="module")
def data(token_file, tmp_path_factory) -> tuple:
    second = tmp_path_factory.mktemp("more") / "second.safetensors"
    save_file({"test": random_tokens(5, 24, seed=9)}, second)
    return ("--calib_dataset", token_file, "--test_dataset", token_file, second)


def run_in(folder: Path, *flags, code: int = 0):
    folder.mkdir(exist_ok=True)
    done = shared_starter().run(folder, *flags)
    assert done.returncode == code, done.stderr
    return done


def lines_about_layers(folder: Path) -> list[str]:
    """What the log says of layers and figures, without the clock's."""
    lines = [line[24:] for line in (the_run(folder / "output") / "log.txt").read_text().splitlines()]
    wanted = [line for line in lines if ("layer " in line or "perplexity" in line) and not line.startswith("took ")]
    return sorted(re.sub(r" in [\d.]+ s", "", line) for line in wanted)


def readable(results: dict) -> dict:
    """The figures of a run, without the clock's."""
    for layer in results["layers"]:
        (layer["training"] or {}).pop("seconds", None)
    wanted = ("perplexity", "perplexity_details", "layers", "error", "failures")
    return {key: results[key] for key in wanted} | {"full": results["full_precision"]["perplexity_details"]}


CASES = {
    "smooth": (SMOOTH, {}),
    "trained": (LEARNED, {}),
    "without smoothing": (("--group_size", 16), {}),
    "half-precision weights": ((*SMOOTH, "--dtype", "float16"), {"dtype": torch.float16}),
    "best": (BEST, {}),
    "transform trained": (TRANSFORM, {}),
    "tied embeddings": (SMOOTH, {"tie_word_embeddings": True}),
    "eager attention": ((*SMOOTH, "--attn_implementation", "eager"), {}),
    "a few samples": ((*SMOOTH, "--probe", "sample", "--eval_batch_size", 2), {}),
    "no transform": ((*SMOOTH, "--transform", "none"), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_streamed_run_has_the_bits_of_one_in_memory(name, model_folder, data, tmp_path):
    flags, changes = CASES[name]
    model = save_sharded(tiny_model(num_hidden_layers=3, **changes), tmp_path / "model", model_folder)
    usual = ("--model", model, *data, *FLAGS, *flags, *MEASURED, "--save_dir", "ck")
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    run_in(whole, *usual, "--no-stream")
    run_in(streamed, *usual, "--stream")
    assert len(layer_content(whole / "ck")) == 3
    assert layer_content(streamed / "ck") == layer_content(whole / "ck")
    assert readable(results_of(streamed)) == readable(results_of(whole))
    assert results_of(streamed)["perplexity_details"]["tokens"]["divergence"] > 0
    assert lines_about_layers(streamed) == lines_about_layers(whole)
    assert (results_of(streamed)["streamed"], results_of(whole)["streamed"]) == (True, False)
    for kind in ("act_scales", "act_shifts"):
        kept = [folder / kind / "tiny.safetensors" for folder in (whole, streamed)]
        peaks = "--smooth" in flags and "energy" not in flags  # which need no statistics of their own
        assert [path.exists() for path in kept] == [peaks] * 2
        if peaks:
            first, second = (load_file(path) for path in kept)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)
    assert not list(the_run(streamed / "output").glob("unfinished*"))


def test_the_log_of_a_streamed_run_says_where_its_seconds_went(sharded, data, tmp_path):
    run_in(tmp_path, "--model", sharded, *data, *FLAGS, *SMOOTH, "--eval_ppl", "--stream")
    results = results_of(tmp_path)
    assert {"load", "read", "statistics", "quantize", "search", "perplexity", "total"} <= set(results["seconds"])
    assert 0 < results["seconds"]["search"] < results["seconds"]["quantize"]
    assert results["full_precision"]["perplexity"] == {}, "nobody asked for it"


def test_sixteen_bits_are_measured_as_the_model_is(sharded, data, tmp_path):
    flags = ("--model", sharded, *data, "--wbits", 16, "--abits", 16, "--block_size", 16, "--net", "tiny", "--eval_ppl")
    run_in(tmp_path / "whole", *flags)
    run_in(tmp_path / "streamed", *flags, "--stream")
    first, second = (results_of(tmp_path / name) for name in ("whole", "streamed"))
    assert first["perplexity_details"] == second["perplexity_details"]
    assert second["layers"] == []


def test_statistics_from_a_file_are_used(sharded, data, tmp_path):
    flags = ("--model", sharded, *data, *FLAGS, *SMOOTH, "--eval_ppl")
    run_in(tmp_path / "whole", *flags)
    scales = tmp_path / "whole/act_scales/tiny.safetensors"
    run_in(tmp_path / "streamed", *flags, "--stream", "--act-scales", scales)
    results = results_of(tmp_path / "streamed")
    assert "statistics" not in results["seconds"]
    assert results["perplexity_details"] == results_of(tmp_path / "whole")["perplexity_details"]


@pytest.mark.parametrize("kind", [SMOOTH, LEARNED, TRANSFORM], ids=["searched", "clips", "transform"])
def test_an_interrupted_streamed_run_resumes_to_the_same_bits_streamed_or_not(kind, sharded, data, tmp_path):
    flags = ("--model", sharded, *data, *FLAGS, "--max_rotation_step", 200, *kind, *MEASURED)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_in(whole, *flags, "--save_dir", "ck")
    killed.mkdir()
    at = kill_at(killed / "ck/layers/layer_001.safetensors", sent=signal.SIGKILL)
    done = shared_starter().run(killed, *flags, "--stream", "--save_dir", "ck", meanwhile=at)
    assert done.returncode == -signal.SIGKILL
    assert len(layer_content(killed / "ck")) < LAYERS
    shutil.copytree(killed, tmp_path / "copy")
    for folder, stream in ((killed, "--stream"), (tmp_path / "copy", "--no-stream")):
        done = run_in(folder, *flags, stream, "--resume", "ck")
        assert "from the checkpoint" in done.stdout
        assert layer_content(folder / "ck") == layer_content(whole / "ck")
        assert results_of(folder)["perplexity_details"] == results_of(whole)["perplexity_details"]
    done = run_in(killed, *flags, "--stream", "--resume", "ck")  # nothing is left to compute
    assert done.stdout.count("from the checkpoint") == LAYERS
    assert results_of(killed)["perplexity_details"] == results_of(whole)["perplexity_details"]


def test_a_missing_and_a_damaged_shard_are_named_in_one_line_before_anything_is_written(sharded, data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(sharded, model)
    index = json.loads((model / INDEX).read_text())["weight_map"]
    shard = model / index["model.layers.2.mlp.up_proj.weight"]
    flags = ("--model", model, *data, *FLAGS, "--stream", "--save_dir", "ck")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_refused(run_in(tmp_path, *flags, code=2), shard.name)
    shard.unlink()
    assert_refused(run_in(tmp_path, *flags, code=2), shard.name)
    assert not (tmp_path / "ck").exists()


def test_a_weight_that_is_not_finite_stops_the_walk_with_its_name(sharded, data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(sharded, model)
    name = "model.layers.2.mlp.up_proj.weight"
    shard = model / json.loads((model / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][1, 1] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    done = run_in(tmp_path, "--model", model, *data, *FLAGS, "--stream", "--save_dir", "ck", code=2)
    assert_refused(done, f"{name} contains NaN or inf")
    assert len(layer_content(tmp_path / "ck")) == 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--tasks", "stories_qa"),
        ("--prompt", "w1 w2"),
        ("--tune_samples", "2"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_what_needs_the_whole_model_is_refused_in_one_line(flags, sharded, data, tmp_path):
    done = run_in(tmp_path, "--model", sharded, *data, *FLAGS, "--stream", *flags, code=2)
    assert_refused(done, "--stream")
    assert flags[0] in done.stderr
    assert not (tmp_path / "output").exists()


def test_a_quantized_model_is_not_streamed(sharded, data, tmp_path):
    run_in(tmp_path, "--model", sharded, *data, *FLAGS, "--save_model", "saved")
    done = run_in(tmp_path, "--model", "saved", *data, "--eval_ppl", "--stream", code=2)
    assert_refused(done, "--stream")
