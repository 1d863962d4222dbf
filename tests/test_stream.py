"""--stream: the whole run, layer by layer, gives the bits of a run with the model in memory."""

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import experiment.plan
import experiment.stream
import pytest
import torch
from conftest import random_tokens, tiny_model
from experiment.outcome import Outcome
from experiment.plan import must_stream, prepare
from safetensors.torch import load_file, save_file
from starter import shared_starter
from test_cli import assert_refused
from test_resume_cli import kill_at, layer_content

from evaluation.journal import Journal
from evaluation.runner import Runner
from experiment.options import make_quant_config
from experiment.run import execute
from models.shards import INDEX
from utils.errors import InputError
from utils.memory import available_memory, in_memory, on_disk

LAYERS = 4
FLAGS = ("--wbits", 4, "--abits", 4, "--lac", 0.95, "--block_size", 16, "--max_rotation_step", 20, "--net", "tiny")
MEASURED = ("--eval_ppl", "--eval_kl")
SMOOTH = ("--smooth", "--swc", 0.9)
LEARNED = ("--smooth", "--lwc", "--epochs", 2, "--aug_loss")


def save_sharded(model, folder: Path, tokenizer_from: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    for path in tokenizer_from.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


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


def output_of(folder: Path) -> Path:
    [found] = (folder / "output").iterdir()
    return found


def results_of(folder: Path) -> dict:
    return json.loads((output_of(folder) / "results.json").read_text())


def lines_about_layers(folder: Path) -> list[str]:
    """What the log says of layers and figures, without the clock's."""
    lines = [line[24:] for line in (output_of(folder) / "log.txt").read_text().splitlines()]
    return sorted(re.sub(r" in [\d.]+ s", "", line) for line in lines if "layer " in line or "perplexity" in line)


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
        assert [path.exists() for path in kept] == ["--smooth" in flags] * 2
        if "--smooth" in flags:
            first, second = (load_file(path) for path in kept)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)
    assert not list(output_of(streamed).glob("unfinished*"))


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


@pytest.mark.parametrize("kind", [SMOOTH, LEARNED], ids=["searched", "trained"])
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
        ("--save_model", "saved"),
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


# from here on inside this process, with what a person cannot ask for on the command line


def planned(sharded: Path, data: tuple, folder: Path, *flags):
    """The parsed flags and the checked run that they describe."""
    import main

    arguments = ("--model", sharded, *data, *FLAGS, "--smooth", *MEASURED, "--cache_dir", folder / "cache", *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["main.py", *map(str, (*arguments, "--output_dir", folder / "out"))])
        args = main.parse_flags()
        return args, prepare(args, make_quant_config(args))


def figures(run, stream_files: bool | None, folder: Path) -> Outcome:
    """What a planned run finds; its hidden states are in files if `stream_files` says so."""
    outcome = Outcome()
    journal = Journal(run.folder / "unfinished.jsonl", "tiny")
    runner = Runner(run.evaluations, journal, run.folder, "tiny", "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if run.shards is None:
            execute(run, outcome, runner)
        else:
            experiment.stream.execute_streamed(run, outcome, runner, stream_files)
    return outcome


@pytest.mark.parametrize("flags", [(), ("--lwc", "--epochs", 1)], ids=["searched", "trained"])
def test_hidden_states_in_files_change_nothing_and_leave_nothing(flags, sharded, data, tmp_path, monkeypatch):
    found = {}
    made = []

    def noted(folder):
        allocate = on_disk(folder)

        def allocate_and_note(shape, dtype):
            made.append(shape)
            tensor = allocate(shape, dtype)
            assert list(folder.iterdir()) == [], "a file that has no name cannot be left behind"
            return tensor

        return allocate_and_note

    choose, expected = experiment.stream.choose_memory, []
    monkeypatch.setattr(experiment.stream, "on_disk", noted)
    monkeypatch.setattr(
        experiment.stream,
        "choose_memory",
        lambda run, needed, files: expected.append(needed) or choose(run, needed, files),
    )
    for name, files in (("memory", False), ("files", True)):
        folder = tmp_path / name
        folder.mkdir()
        _, run = planned(sharded, data, folder, "--stream", *flags)
        outcome = figures(run, files, folder)
        found[name] = (outcome.measured.results, outcome.full.results)
        assert not list((folder / "cache").rglob("*"))
    # samples for statistics, two sets of windows in both networks, and the flow: teacher, and student if it is trained
    assert len(made) == 1 + 4 + (2 if flags else 1)
    assert expected == [sum(4 * torch.Size(shape).numel() for shape in made)] * 2
    assert found["memory"] == found["files"]


def test_windows_travel_in_batches_of_the_size_asked_for(sharded, data, tmp_path, monkeypatch):
    _, run = planned(sharded, data, tmp_path, "--stream", "--eval_batch_size", 2)
    sizes = []
    advance = experiment.stream.advance_

    def note(layer, hidden, kwargs, device, batch_size=None):
        sizes.append(batch_size and batch_size.sequences)
        advance(layer, hidden, kwargs, device, batch_size)

    monkeypatch.setattr(experiment.stream, "advance_", note)
    monkeypatch.setattr(evaluation.perplexity, "advance_", note)
    figures(run, None, tmp_path)
    assert sizes == [None, 2, 2, 2, 2] * LAYERS  # statistics; two sets of windows in both networks


def test_hidden_states_that_would_fill_the_memory_live_in_files(sharded, data, tmp_path, monkeypatch):
    _, run = planned(sharded, data, tmp_path, "--stream")
    monkeypatch.setattr(experiment.stream, "available_memory", lambda: 1000)
    assert experiment.stream.choose_memory(run, 499, None) is in_memory
    assert experiment.stream.choose_memory(run, 501, None) is not in_memory
    assert experiment.stream.choose_memory(run, 501, False) is in_memory


@pytest.mark.parametrize(("share", "streamed"), [(1.2, False), (1.0, True)])
def test_a_model_that_does_not_fit_is_streamed_by_itself(share, streamed, sharded, data, tmp_path, monkeypatch, caplog):
    _, run = planned(sharded, data, tmp_path)
    assert run.shards is None
    needed = sum(parameter.nbytes for parameter in tiny_model(num_hidden_layers=LAYERS).parameters())
    monkeypatch.setattr(experiment.plan, "available_memory", lambda: share * needed)
    with caplog.at_level("INFO"):
        _, run = planned(sharded, data, tmp_path)
    assert (run.shards is not None) is streamed
    assert ("it is streamed" in caplog.text) is streamed


def test_a_model_that_does_not_fit_stops_where_it_is_needed_whole_unless_told_to_try(
    sharded, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(experiment.plan, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"the model needs .* GB .*--prompt needs the whole model"):
        planned(sharded, data, tmp_path, "--prompt", "w1")
    _, run = planned(sharded, data, tmp_path, "--prompt", "w1", "--no-stream")
    assert run.shards is None
    args, run = planned(sharded, data, tmp_path)
    assert must_stream(args, run.setup)
    assert not must_stream(args, replace(run.setup, saved=run.quant)), "a quantized model is loaded whole"


def test_several_processes_are_refused(sharded, data, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.plan, "world_size", lambda: 2)
    with pytest.raises(InputError, match="single process"):
        planned(sharded, data, tmp_path, "--stream")


def test_a_failure_in_the_walk_surfaces_and_ends_the_reading_ahead(sharded, data, tmp_path, monkeypatch):
    _, run = planned(sharded, data, tmp_path, "--stream")

    def fail(self, index, layer):
        raise RuntimeError("no luck today")

    monkeypatch.setattr(experiment.stream.Walk, "pass_", fail)
    with pytest.raises(RuntimeError, match="no luck today"):
        figures(run, True, tmp_path)
    assert not list((tmp_path / "cache").rglob("*"))


def test_memory_is_that_of_the_machine_or_of_the_container_if_less(tmp_path, monkeypatch):
    import utils.memory

    machine = available_memory()
    assert machine > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(utils.memory, "CGROUP", tmp_path)
    assert available_memory() == pytest.approx(machine, rel=0.5)
    for name, content in (("max", "1000"), ("current", "700"), ("stat", "anon 1\ninactive_file 50\nactive_file 7\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert available_memory() == 357


def test_a_tensor_in_a_file_keeps_what_is_written_to_it_and_its_file_has_no_name(tmp_path):
    tensor = on_disk(tmp_path / "new")((3, 4), torch.bfloat16)
    assert list((tmp_path / "new").iterdir()) == []
    tensor.copy_(torch.arange(12).view(3, 4))
    tensor[1:2].mul_(2)
    assert tensor.tolist() == [[0, 1, 2, 3], [8, 10, 12, 14], [8, 9, 10, 11]]
    assert tensor.shape == (3, 4)
    assert tensor.dtype is torch.bfloat16


def test_a_disk_without_room_is_said_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"--cache_dir .*cannot be written"):
        on_disk(tmp_path)((2**55,), torch.float16)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache_dir"):
        on_disk(tmp_path / "file")((2,), torch.float16)
