"""A run inside this process, streamed or not, with what a person cannot ask for on the command line."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_tokens, tiny_model
from safetensors.torch import save_file
from script_cases import save_sharded, settings_of

import evaluation.perplexity
import experiment.prepare
import experiment.run
import quantize.statistics
from evaluation.journal import Journal
from evaluation.runner import Runner
from experiment.prepare import Prepared, must_stream, prepare
from experiment.results import Outcome
from experiment.run import choose_memory, execute, execute_noting_error
from quantize.quantization import Quantization
from utils.errors import InputError
from utils.memory import in_memory, on_disk

LAYERS = 4
FLAGS = ("--wbits", 4, "--abits", 4, "--lac", 0.95, "--block_size", 16, "--max_rotation_step", 20, "--net", "tiny")
MEASURED = ("--eval_ppl", "--eval_kl")


@pytest.fixture(scope="module")
def sharded(model_folder, tmp_path_factory) -> Path:
    return save_sharded(tiny_model(num_hidden_layers=LAYERS), tmp_path_factory.mktemp("sharded"), model_folder)


@pytest.fixture(scope="module")
def data(token_file, tmp_path_factory) -> tuple:
    second = tmp_path_factory.mktemp("more") / "second.safetensors"
    save_file({"test": random_tokens(5, 24, seed=9)}, second)
    return ("--calib_dataset", token_file, "--test_dataset", token_file, second)


def planned(sharded: Path, data: tuple, folder: Path, *flags: object) -> Prepared:
    """The checked run that the flags describe."""
    where = ("--cache_dir", folder / "cache", "--output_dir", folder / "out")
    settings = settings_of("--model", sharded, *data, *FLAGS, "--smooth", *MEASURED, *where, *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return prepare(settings)


def figures(run: Prepared, folder: Path) -> Outcome:
    """What a planned run finds."""
    outcome = Outcome()
    journal = Journal(run.folder / "unfinished.jsonl", "tiny")
    runner = Runner(run.evaluations, journal, run.folder, "tiny", "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        execute(run, outcome, runner)
    return outcome


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("flags", [(), ("--lwc", "--epochs", 1)], ids=["searched", "trained"])
def test_hidden_states_in_files_change_nothing_and_leave_nothing(flags, stream, sharded, data, tmp_path, monkeypatch):
    found, made, expected = {}, [], []

    def noted(allocate: Callable, folder: Path | None = None) -> Callable:
        def allocate_and_note(shape, dtype):
            made.append(shape)
            tensor = allocate(shape, dtype)
            assert folder is None or list(folder.iterdir()) == [], "a file that has no name cannot be left behind"
            return tensor

        return allocate_and_note

    choose = experiment.run.choose_memory
    monkeypatch.setattr(experiment.run, "in_memory", noted(in_memory))
    monkeypatch.setattr(experiment.run, "on_disk", lambda folder: noted(on_disk(folder), folder))
    monkeypatch.setattr(
        experiment.run, "choose_memory", lambda run, needed: expected.append(needed) or choose(run, needed)
    )
    for name, free in (("memory", 10**12), ("files", 1000)):
        folder = tmp_path / name
        folder.mkdir()
        run = planned(sharded, data, folder, stream, *flags)
        monkeypatch.setattr(experiment.run, "available_memory", lambda free=free: free)
        made.clear()
        outcome = figures(run, folder)
        found[name] = (outcome.measured.results, outcome.full.results)
        assert (folder / "cache").exists() is (name == "files")
        assert not list((folder / "cache").rglob("*"))
        # samples for statistics, two sets of windows in both networks, and the flow: teacher, and student if trained
        assert len(made) == 1 + 4 + (2 if flags else 1)
        assert expected.pop() == sum(4 * torch.Size(shape).numel() for shape in made)
    assert found["memory"] == found["files"]
    assert found["files"][0]["perplexity_details"]["tokens"]["divergence"] > 0


def test_windows_travel_in_batches_of_the_size_asked_for(sharded, data, tmp_path, monkeypatch):
    run = planned(sharded, data, tmp_path, "--stream", "--eval_batch_size", 2)
    sizes = []
    advance = quantize.statistics.advance_

    def note(layer, hidden, kwargs, device, batch_size=None):
        sizes.append(batch_size and batch_size.sequences)
        advance(layer, hidden, kwargs, device, batch_size)

    monkeypatch.setattr(quantize.statistics, "advance_", note)
    monkeypatch.setattr(evaluation.perplexity, "advance_", note)
    figures(run, tmp_path)
    assert sizes == [None, 2, 2, 2, 2] * LAYERS  # statistics; two sets of windows in both networks


def test_hidden_states_that_would_fill_the_memory_live_in_files(sharded, data, tmp_path, monkeypatch):
    run = planned(sharded, data, tmp_path, "--stream")
    monkeypatch.setattr(experiment.run, "available_memory", lambda: 1000)
    assert choose_memory(run, 499) is in_memory
    assert choose_memory(run, 501) is not in_memory


@pytest.mark.parametrize(("share", "streamed"), [(1.2, False), (1.0, True)])
def test_a_model_that_does_not_fit_is_streamed_by_itself(share, streamed, sharded, data, tmp_path, monkeypatch, caplog):
    run = planned(sharded, data, tmp_path)
    assert run.shards is None
    needed = sum(parameter.nbytes for parameter in tiny_model(num_hidden_layers=LAYERS).parameters())
    monkeypatch.setattr(experiment.prepare, "available_memory", lambda: share * needed)
    with caplog.at_level("INFO"):
        run = planned(sharded, data, tmp_path)
    assert (run.shards is not None) is streamed
    assert ("it is streamed" in caplog.text) is streamed


def test_a_model_that_does_not_fit_stops_where_it_is_needed_whole_unless_told_to_try(
    sharded, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(experiment.prepare, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"the model needs .* GB .*--prompt needs the whole model"):
        planned(sharded, data, tmp_path, "--prompt", "w1")
    run = planned(sharded, data, tmp_path, "--prompt", "w1", "--no-stream")
    assert run.shards is None
    run = planned(sharded, data, tmp_path)
    assert must_stream(run.settings, run.setup)
    assert not must_stream(run.settings, replace(run.setup, saved=run.quant)), "a quantized model is loaded whole"


@pytest.mark.parametrize(("dtype", "streamed"), [("float32", False), ("float16", True)])
def test_several_processes_need_the_model_once_each_unless_it_is_mapped_from_its_files(
    dtype, streamed, sharded, data, tmp_path, monkeypatch
):
    needed = sum(parameter.nbytes for parameter in tiny_model(num_hidden_layers=LAYERS).parameters())
    monkeypatch.setattr(experiment.prepare, "available_memory", lambda: 1.2 * needed)
    run = planned(sharded, data, tmp_path)
    run.setup.config.dtype = getattr(torch, dtype)  # that of the files; computed in float32
    monkeypatch.setattr(experiment.prepare, "local_size", lambda: 2)
    assert must_stream(run.settings, run.setup) is streamed


def test_a_failure_in_the_walk_surfaces_and_ends_the_reading_ahead(sharded, data, tmp_path, monkeypatch):
    run = planned(sharded, data, tmp_path, "--stream")
    monkeypatch.setattr(experiment.run, "available_memory", lambda: 1000)
    threads = threading.active_count()

    def fail(self, index, layer):
        raise RuntimeError("no luck today")

    monkeypatch.setattr(Quantization, "visit", fail)
    with pytest.raises(RuntimeError, match="no luck today"):
        figures(run, tmp_path)
    assert threading.active_count() == threads
    assert not list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("where", ["on the way", "at the end"])
def test_windows_that_fail_are_recorded_and_everything_else_goes_on(
    where, stream, sharded, data, tmp_path, monkeypatch
):
    (tmp_path / "sound").mkdir()
    expected = figures(planned(sharded, data, tmp_path / "sound", stream), tmp_path / "sound").measured
    run = planned(sharded, data, tmp_path, stream)
    visit, score = evaluation.perplexity.Windows.visit, evaluation.perplexity.score

    def fail_on_the_way(self, index, layer):
        if self.hidden.shape[1] == 24 and index == 2:
            raise RuntimeError("no luck today")
        visit(self, index, layer)

    def fail_at_the_end(model, spec, tokens, *rest):
        if tokens.shape[1] == 24:
            raise RuntimeError("no luck today")
        return score(model, spec, tokens, *rest)

    if where == "on the way":
        monkeypatch.setattr(evaluation.perplexity.Windows, "visit", fail_on_the_way)
    else:
        monkeypatch.setattr(evaluation.perplexity, "score", fail_at_the_end)
    outcome = figures(run, tmp_path)
    assert outcome.measured.failures == {"perplexity second": "RuntimeError: no luck today"}
    assert "perplexity second" in outcome.full.failures
    assert outcome.measured.results["perplexity"] == {"tokens": expected.results["perplexity"]["tokens"]}
    assert [layer["output_error"] for layer in outcome.measured.layers] == [
        layer["output_error"] for layer in expected.layers
    ]


@pytest.mark.parametrize(
    ("flags", "remedy"), [((), "try --keep host, or a lower"), (("--keep", "host"), "try a lower")]
)
def test_a_gpu_that_is_too_small_is_one_line_with_what_to_do(flags, remedy, sharded, data, tmp_path, monkeypatch):
    def too_much(*args) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")

    monkeypatch.setattr(experiment.run, "execute", too_much)
    run = planned(sharded, data, tmp_path, *flags)
    runner = Runner(run.evaluations, Journal(run.folder / "unfinished.jsonl", "tiny"), run.folder, "tiny", "tiny")
    with pytest.raises(InputError, match=f"Tried to allocate 20.00 GiB: .*{remedy} --seqlen") as raised:
        execute_noting_error(run, Outcome(), runner, [])
    assert "more" not in str(raised.value)
    assert "OutOfMemoryError" in (run.folder / "results.json").read_text()
