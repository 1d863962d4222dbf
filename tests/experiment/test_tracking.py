"""--track: what TensorBoard and Weights & Biases are given, read back from their own files."""

import json
import logging
import math
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script
from script_cases import assert_refused, results_of, settings_of, the_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import experiment.run
import experiment.tracking
import quantize.quantization
import utils.tracking
from experiment.run import run_experiment
from experiment.tracking import Tracker, check_tracking, final_scalars, layer_scalars, open_tracker
from utils.errors import InputError
from utils.tracking import as_code, new_folder

TINY = ("--block_size", 16, "--max_rotation_step", 20, "--wbits", 4, "--abits", 4, "--lac", 0.95, "--net", "tiny")
LEARNED = ("--smooth", "--lwc", "--epochs", 3, "--eval_ppl", "--eval_kl")
NOTE_MODULES = """
import atexit, pathlib, sys
names = ("wandb", "tensorboard", "torch.utils.tensorboard")
atexit.register(lambda: pathlib.Path("imported").write_text(" ".join(name for name in names if name in sys.modules)))
"""


@pytest.fixture(scope="module")
def usual(model_folder, token_file) -> tuple:
    return ("--model", model_folder, "--calib_dataset", token_file, "--test_dataset", token_file, *TINY)


@pytest.fixture(scope="module")
def plain_run(usual, tmp_path_factory) -> Path:
    """A run that is not tracked, in a process of its own, which notes at its end whether a library was imported."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "sitecustomize.py").write_text(NOTE_MODULES)
    done = run_script("main.py", *usual, *LEARNED, folder=folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def tensorboard_run(usual, tmp_path_factory):
    """The same run with TensorBoard, and its process."""
    folder = tmp_path_factory.mktemp("tensorboard")
    done = run_script("main.py", *usual, *LEARNED, "--save_dir", "ck", "--track", "tensorboard", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def wandb_run(usual, tmp_path_factory):
    """The same run with Weights & Biases, offline, and its process."""
    folder = tmp_path_factory.mktemp("wandb")
    environment = {"WANDB_MODE": "offline", "HOME": str(folder / "home")}
    done = run_script("main.py", *usual, *LEARNED, "--track", "wandb", folder=folder, **environment)
    assert done.returncode == 0, done.stderr
    return folder, done


def output_of(folder: Path) -> Path:
    """The folder of the one run that was started in `folder`."""
    return the_run(folder / "output")


def figures_of(folder: Path) -> list:
    """What a run found, without the clock's."""
    results = results_of(folder)
    for layer in results["layers"]:
        layer["training"].pop("seconds")
    return [results["layers"], results["perplexity_details"], results["full_precision"]["perplexity_details"]]


def event_folders(folder: Path) -> list[Path]:
    return sorted({path.parent for path in folder.rglob("events.out.tfevents.*")})


def scalars_in(folder: Path) -> dict[str, dict[int, float]]:
    """Every curve of a folder of events: step → value."""
    events = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: {point.step: point.value for point in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def settings_in(folder: Path) -> dict:
    events = EventAccumulator(str(folder), {"tensors": 0})
    events.Reload()
    [text] = events.Tensors("settings/text_summary")
    return json.loads(text.tensor_proto.string_val[0])


def wandb_records(folder: Path) -> Iterator:
    """The records of the one run of Weights & Biases below `folder`: a LevelDB log in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("wandb/*run-*/run-*.wandb")
    data, position, part = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(part)
            part = b""


def wandb_curves(folder: Path, axis: str) -> dict[str, dict[int, float]]:
    """Every curve over `axis` that was logged: step → value."""
    curves: dict[str, dict[int, float]] = {}
    for record in wandb_records(folder):
        found = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        for tag, value in found.items() if axis in found else ():
            if tag != axis and not tag.startswith("_"):
                curves.setdefault(tag, {})[found[axis]] = value
    return curves


def assert_layers_are_tracked(curves: dict[str, dict[int, float]], layers: list[dict]) -> None:
    """One point per layer and tag, with the values of results.json."""
    expected = [layer_scalars(layer) for layer in layers]
    assert len(expected) == 2
    assert set(expected[0]) <= set(curves)
    for tag in expected[0]:
        assert curves[tag] == pytest.approx({index: found[tag] for index, found in enumerate(expected)}), tag


LAYER = {
    "layer": 3,
    "output_error": 0.25,
    "groups": [
        {
            "name": "down",
            "stages": [
                {"name": "input", "peak": 80.0, "spread": 2.0},
                {"name": "rotation 1", "peak": 2.0, "spread": math.inf},
                {"name": "permutation 1", "peak": 2.0, "spread": None},
                {"name": "rotation 2", "peak": 1.0, "spread": 1.0},
            ],
            "steps": [7, 0],
        }
    ],
    "training": {"loss_before": math.nan, "loss_after": 0.5, "losses": [0.75, None, 0.5], "restored": 1},
    "recorded": {
        "output_sqnr_db": 21.0,
        "unrounded": [{"part": "inputs of o", "output_sqnr_db": 22.0}],
        "groups": [{"name": "down", "activation_noise": {"original": {"sqnr_db": 1.5}}, "weight_sqnr_db": 19.0}],
    },
}


def test_scalars_of_a_layer_have_readable_tags_and_are_finite():
    assert layer_scalars(LAYER) == {
        "layers/output_error": 0.25,
        "layers/down/peak/input": 80.0,
        "layers/down/spread/input": 2.0,
        "layers/down/peak/rotation 1": 2.0,
        "layers/down/steps/rotation 1": 7.0,
        "layers/down/peak/permutation 1": 2.0,
        "layers/down/peak/rotation 2": 1.0,
        "layers/down/spread/rotation 2": 1.0,
        "layers/down/steps/rotation 2": 0.0,
        "layers/training/loss_after": 0.5,
        "layers/training/restored": 1.0,
        "layers/sqnr_db/output": 21.0,
        "layers/sqnr_db/output, inputs of o unrounded": 22.0,
        "layers/down/sqnr_db/activation, original": 1.5,
        "layers/down/sqnr_db/weight": 19.0,
    }
    assert layer_scalars({}) == {}, "a layer of the paper's own checkpoint"
    assert layer_scalars({"output_error": 0.5, "groups": [], "training": None, "recorded": None}) == {
        "layers/output_error": 0.5
    }


def test_final_scalars_are_the_columns_of_the_table_and_the_seconds_of_every_stage():
    score = {"task": "piqa", "group": None, "metrics": {"acc": 0.5, "acc_norm": 0.75, "acc_stderr": 0.1}}
    figures = {
        "perplexity_details": {
            "c4": {"perplexity": 7.0, "divergence": 0.5},
            "ptb": {"perplexity": math.inf, "divergence": None},
        },
        "zero_shot": {"scores": [score], "average": None},
        "mmlu": {"5_shot": {"shots": 5, "accuracy": 0.25}},
        "mt_bench": {"scores": {"average": 6.5}},
        "seconds": {"quantize": 2.0, "perplexity": 3.0},
    }
    assert final_scalars(figures, "full") == {
        "full/c4 ppl": 7.0,
        "full/c4 KL": 0.5,
        "full/piqa acc": 0.5,
        "full/piqa acc_norm": 0.75,
        "full/MMLU 5-shot": 0.25,
        "full/MT-Bench": 6.5,
        "full/seconds/quantize": 2.0,
        "full/seconds/perplexity": 3.0,
    }
    assert final_scalars({}, "final") == {}


def test_settings_are_json_in_a_code_block():
    assert all(line.startswith("    ") for line in as_code({"lac": 0.9, "rows": ["a", None]}).splitlines())
    assert json.loads(as_code({"lac": 0.9, "rows": ["a", None]})) == {"lac": 0.9, "rows": ["a", None]}


def test_a_folder_that_is_taken_gets_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.tracking.time, "strftime", lambda form: "20260102-030405")
    made = [new_folder(tmp_path / "tensorboard").name for _ in range(3)]
    assert made == ["20260102-030405", "20260102-030405-2", "20260102-030405-3"]


class Told:
    """A sink that remembers what it was told, or fails."""

    def __init__(self, failure: Exception | None = None):
        self.failure, self.points, self.finals, self.closed = failure, [], [], []

    def scalars(self, values, axis, step):
        self.points.append((axis, step, values))
        if self.failure is not None:
            raise self.failure

    def final(self, values):
        self.finals.append(values)

    def close(self, failed):
        self.closed.append(failed)
        if self.failure is not None:
            raise self.failure


def test_losses_are_a_curve_over_epochs():
    sink = Told()
    with Tracker(sink) as tracker:
        tracker.layer(3, LAYER)
    assert sink.points[0] == ("layer", 3, layer_scalars(LAYER))
    losses = [("epoch", 0, {"lwc/layer_003/loss": 0.75}), ("epoch", 2, {"lwc/layer_003/loss": 0.5})]
    assert sink.points[1:] == losses
    assert sink.closed == [False]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_ends_early_is_marked_as_failed(error):
    sink = Told()
    with pytest.raises(error), Tracker(sink):
        raise error
    assert sink.closed == [True]


def test_a_library_that_fails_is_warned_of_once_and_told_nothing_more(caplog):
    sink = Told(OSError(28, "No space left on device"))
    with Tracker(sink) as tracker:
        tracker.layer(0, LAYER)
        tracker.layer(1, LAYER)
        tracker.figures({"seconds": {"load": 1.0}})
    assert len(sink.points) == 1
    assert sink.finals == []
    assert sink.closed == [False]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "the run goes on: OSError: [Errno 28] No space left on device" in record.getMessage()


def test_tracking_that_cannot_begin_ends_the_run_only_if_it_is_required(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--track tensorboard: .*cannot be written"):
        open_tracker("tensorboard", tmp_path / "file", "tiny", {})
    tracker = open_tracker("tensorboard", tmp_path / "file", "tiny", {}, group="all", required=False)
    assert tracker.sink is None
    assert "tiny is not tracked" in caplog.text


def test_only_the_main_process_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.tracking, "is_main", lambda: False)
    with open_tracker("tensorboard", tmp_path, "tiny", {}) as tracker:
        tracker.layer(0, LAYER)
    assert list(tmp_path.iterdir()) == []


def test_tracking_leaves_the_random_state_alone(tmp_path):
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with open_tracker("tensorboard", tmp_path, "tiny", {}) as tracker:
        tracker.layer(0, LAYER)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


@pytest.mark.parametrize(("kind", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(kind, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f'--track {kind} needs the package {kind}: python -m pip install "{kind}=='):
        check_tracking(kind)
    check_tracking("none")


def test_a_missing_package_is_said_before_anything_is_written(usual, tmp_path):
    where, folder = tmp_path / "path", tmp_path / "run"
    where.mkdir()
    folder.mkdir()
    (where / "sitecustomize.py").write_text("import sys\nsys.modules['tensorboard'] = None\n")
    flags = ("--save_dir", "ck", "--track", "tensorboard")
    done = run_script("main.py", *usual, *flags, folder=folder, PYTHONPATH=str(where))
    assert_refused(done, '--track tensorboard needs the package tensorboard: python -m pip install "tensorboard==')
    assert list(folder.iterdir()) == []


def test_without_login_the_run_ends_with_what_to_do_before_anything_is_written(usual, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    done = run_script("compare.py", *usual, "--eval_ppl", "--track", "wandb", folder=folder, **environment)
    assert_refused(done, "log in with `wandb login`, or set WANDB_MODE=offline")
    assert list(folder.iterdir()) == []


def test_a_dry_run_is_not_tracked(usual, tmp_path):
    done = run_script("main.py", *usual, "--dry_run", "--track", "wandb", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "output").exists()


def test_without_track_neither_library_is_imported(plain_run):
    assert (plain_run / "imported").read_text() == ""
    assert sorted(path.name for path in output_of(plain_run).iterdir()) == ["log.txt", "results.json"]


def test_tracking_changes_no_bit_of_the_results(plain_run, tensorboard_run, wandb_run):
    assert figures_of(tensorboard_run[0]) == figures_of(plain_run)
    assert figures_of(wandb_run[0]) == figures_of(plain_run)


def test_tensorboard_has_every_layer_the_losses_the_final_figures_and_the_settings(tensorboard_run):
    folder, done = tensorboard_run
    results, [events] = results_of(folder), event_folders(output_of(folder) / "tensorboard")
    assert f"tracking: tensorboard --logdir output/{output_of(folder).name}/tensorboard" in done.stdout
    assert done.stderr.strip() == ""
    curves = scalars_in(events)
    assert_layers_are_tracked(curves, results["layers"])
    for layer in results["layers"]:
        losses = dict(enumerate(layer["training"]["losses"]))
        assert len(losses) == 3
        assert curves[f"lwc/layer_{layer['layer']:03d}/loss"] == pytest.approx(losses)
    for part, found in (("final", results), ("full", results["full_precision"])):
        assert curves[f"{part}/tokens ppl"] == pytest.approx({0: found["perplexity"]["tokens"]})
        assert curves[f"{part}/seconds/perplexity"] == pytest.approx({0: found["seconds"]["perplexity"]})
    assert curves["final/tokens KL"][0] > 0
    settings = settings_in(events)
    assert {key: settings[key] for key in results["settings"]} == results["settings"]
    assert settings["method"] == "DuQuant + LWC"


def test_layers_from_a_checkpoint_are_tracked_too(tensorboard_run, usual):
    folder, _ = tensorboard_run
    flags = ("--resume", "ck", "--output_dir", "again", "--track", "tensorboard")
    done = run_script("main.py", *usual, *LEARNED, *flags, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from the checkpoint") == 2
    [events] = event_folders(folder / "again")
    assert_layers_are_tracked(scalars_in(events), results_of(folder)["layers"])


def test_wandb_offline_keeps_the_same_in_the_folder_of_the_run(wandb_run):
    folder, _ = wandb_run
    results = results_of(folder)
    assert_layers_are_tracked(wandb_curves(output_of(folder), "layer"), results["layers"])
    losses = wandb_curves(output_of(folder), "epoch")
    assert losses == {
        f"lwc/layer_{layer['layer']:03d}/loss": dict(enumerate(layer["training"]["losses"]))
        for layer in results["layers"]
    }
    records = list(wandb_records(output_of(folder)))
    summary = {item.key: json.loads(item.value_json) for each in records for item in each.summary.update if item.key}
    assert summary["final/tokens ppl"] == results["perplexity"]["tokens"]
    assert summary["full/tokens ppl"] == results["full_precision"]["perplexity"]["tokens"]
    axes = {each.metric.glob_name: each.metric.step_metric for each in records if each.metric.glob_name}
    assert axes == {"layers/*": "layer", "lwc/*": "epoch"}
    [begun] = [each.run for each in records if each.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert {key: config[key] for key in results["settings"]} == results["settings"]
    assert (begun.project, begun.display_name, begun.host, begun.git.commit) == (
        "duquant",
        output_of(folder).name,
        "",
        "",
    )
    assert [each.exit.exit_code for each in records if each.WhichOneof("record_type") == "exit"] == [0]


def test_wandb_says_one_line_and_writes_only_where_the_run_does(wandb_run):
    folder, done = wandb_run
    [kept] = (output_of(folder) / "wandb").glob("offline-run-*")
    assert f"tracking: offline; upload with wandb sync {kept.relative_to(folder)}" in done.stdout
    assert done.stdout.count("wandb sync") == 1
    assert done.stderr.strip() == ""
    assert not (folder / "wandb").exists()
    assert {path.name for path in folder.iterdir()} <= {"output", "cache", "act_scales", "act_shifts", "home"}
    assert not list(kept.glob("files/*")), "neither requirements nor metadata"


def test_every_row_of_a_comparison_is_a_run(usual, tmp_path):
    flags = ("--eval_ppl", "--rows", "rtn", "dual", "--track", "tensorboard")
    done = run_script("compare.py", *usual, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = output_of(tmp_path)
    found = {events.parent.name: events for events in event_folders(folder / "tensorboard")}
    assert set(found) == {"rtn", "dual_seed2"}
    for row in json.loads((folder / "results.json").read_text())["rows"]:
        events = found["rtn" if row["row"] == "rtn" else "dual_seed2"]
        curves, settings = scalars_in(events), settings_in(events)
        assert_layers_are_tracked(curves, row["layers"])
        assert curves["final/tokens ppl"] == pytest.approx({0: row["perplexity"]["tokens"]})
        assert not [tag for tag in curves if tag.startswith("full/")]
        assert (settings["method"], settings["seed"]) == (row["title"], row["seed"])
        assert (settings["transform"], settings["smooth"]) == (
            ("none", False) if row["seed"] is None else ("dual", True)
        )
    again = run_script("compare.py", *usual, *flags, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "tracking" not in again.stdout, "rows from an earlier run are not tracked again"
    assert len(event_folders(folder / "tensorboard")) == 2


# from here on inside this process, with failures that a person cannot ask for on the command line


def run_here(flags: tuple, folder: Path, monkeypatch) -> None:
    """What main.py does, in `folder`, without a log file."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["main.py", *map(str, flags)])
    monkeypatch.setattr(experiment.run, "add_log_file", lambda path: path.parent.mkdir(parents=True))
    run_experiment(settings_of(*flags))


def test_tracking_that_breaks_on_the_way_costs_the_run_nothing(usual, tmp_path, monkeypatch, caplog):
    def fail(self, values, axis, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(experiment.tracking.TensorBoard, "scalars", fail)
    run_here((*usual, "--eval_ppl", "--track", "tensorboard"), tmp_path, monkeypatch)
    assert len([record for record in caplog.records if "tracking stopped" in record.getMessage()]) == 1
    results = results_of(tmp_path)
    assert results["error"] is None
    assert results["perplexity"]["tokens"] > 1


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_run_that_dies_keeps_and_has_tracked_the_layers_it_finished(stream, usual, tmp_path, monkeypatch):
    decide = quantize.quantization.decide

    def fail_later(layer, index, *rest):
        if index == 1:
            raise RuntimeError("no luck today")
        return decide(layer, index, *rest)

    monkeypatch.setattr(quantize.quantization, "decide", fail_later)
    with pytest.raises(RuntimeError, match="no luck today"):
        run_here((*usual, "--eval_ppl", stream, "--track", "tensorboard"), tmp_path, monkeypatch)
    results = results_of(tmp_path)
    assert results["error"] == "RuntimeError: no luck today"
    [layer] = results["layers"]
    [events] = event_folders(tmp_path)
    assert scalars_in(events) == {tag: pytest.approx({0: value}) for tag, value in layer_scalars(layer).items()}
