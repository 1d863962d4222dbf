"""`--sensitivity` of the real scripts: streamed, resumed, shared by processes, compared, drawn, and refused."""

import json
import re
import shutil

import pytest
from conftest import run_in_two, run_script, tiny_model
from script_cases import assert_refused, results_of, save_sharded, the_run

LAYERS = 3
FLAGS = ("--wbits", 4, "--abits", 4, "--block_size", 16, "--max_rotation_step", 20, "--smooth", "--net", "tiny")


@pytest.fixture(scope="module")
def usual(model_folder, token_file, tmp_path_factory) -> tuple:
    """The flags that all runs share."""
    model = save_sharded(tiny_model(num_hidden_layers=LAYERS), tmp_path_factory.mktemp("sharded"), model_folder)
    data = ("--calib_dataset", token_file, "--test_dataset", token_file)
    return ("--model", model, *data, *FLAGS, "--sensitivity", "--sensitivity_windows", 5)


@pytest.fixture(scope="module")
def whole(usual, tmp_path_factory):
    """The folder in which a run was started that nothing disturbed, with everything there is to see, and its output."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ("--eval_ppl", "--eval_kl", "--limit", 5, "--report", "--report_layers", 0, "--save_dir", "ck", "--quiet")
    done = run_script("main.py", *usual, *flags, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def expected(whole) -> dict:
    return results_of(whole[0])["sensitivity"]


def run(folder, *flags, script: str = "main.py") -> str:
    done = run_script(script, *flags, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_ends_of_the_gap_are_what_perplexity_finds_on_the_same_windows(whole, expected):
    results = results_of(whole[0])
    assert (expected["dataset"], expected["windows"]) == ("tokens", 5)
    ours, full = (each["perplexity_details"]["tokens"] for each in (results, results["full_precision"]))
    assert expected["full_precision"] == {name: full[name] for name in ("perplexity", "nats")}
    assert expected["quantized"] == {name: ours[name] for name in ("perplexity", "nats", "divergence")}
    assert results["full_precision"]["sensitivity"] == {}
    assert results["seconds"]["sensitivity"] > 0


def test_every_role_group_and_layer_has_figures_of_its_own(expected):
    assert expected["roles"].keys() == {"weight", "input", "query", "key", "value"}
    assert expected["groups"].keys() == {"qkv", "o", "gate_up", "down"}
    assert [each["layer"] for each in expected["layers"]] == list(range(LAYERS))
    variants = [*expected["roles"].values(), *expected["groups"].values(), *expected["layers"]]
    assert len({each["nats"] for each in variants}) == 5 + 4 + LAYERS
    assert all(each["divergence"] > 0 for each in variants)
    ours, full = (expected[name]["nats"] for name in ("quantized", "full_precision"))
    assert ours > full
    assert [each["share"] for each in variants] == pytest.approx([(ours - e["nats"]) / (ours - full) for e in variants])


def test_a_quiet_console_the_log_and_a_file_have_the_table(whole):
    folder, stdout = whole
    table = (the_run(folder / "output") / "sensitivity/quantized.md").read_text(encoding="utf-8").strip()
    assert table in stdout
    assert table in (the_run(folder / "output") / "log.txt").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 2 + 2 + 5 + 4 + LAYERS


def test_the_report_draws_it_and_only_then(whole, tmp_path):
    folder = shutil.copytree(the_run(whole[0] / "output"), tmp_path / "copy")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for found in (results["sensitivity"], {}, None):
        (folder / "results.json").write_text(json.dumps(results | {"sensitivity": found}), encoding="utf-8")
        run(tmp_path, folder, "--report_layers", 0, script="report.py")
        page = (folder / "report/index.html").read_text(encoding="utf-8")
        drawn = {path.name for path in (folder / "report/figures").glob("sensitivity.*")}
        assert drawn == ({"sensitivity.png", "sensitivity.svg"} if found else set())
        assert ("figures/sensitivity.png" in page) is bool(found)


def test_a_streamed_run_has_the_bits_of_one_in_memory(usual, expected, tmp_path):
    stdout = run(tmp_path, *usual, "--stream")
    assert results_of(tmp_path)["streamed"]
    assert results_of(tmp_path)["sensitivity"] == expected
    assert not re.search(r"^\|\s+\|$", stdout, re.MULTILINE), "an empty table"


def test_layers_from_a_checkpoint_cost_what_they_cost_when_they_were_decided(usual, whole, expected, tmp_path):
    for output, flag in (("streamed", "--stream"), ("whole", "--no-stream")):
        stdout = run(tmp_path, *usual, flag, "--resume", whole[0] / "ck", "--output_dir", output)
        assert stdout.count("from the checkpoint") == LAYERS
        assert results_of(tmp_path, output=output)["sensitivity"] == expected


def test_a_report_goes_on_with_restored_layers(usual, whole, tmp_path):
    run(tmp_path, *usual, "--report", "--resume", whole[0] / "ck")
    assert (the_run(tmp_path / "output") / "sensitivity").is_dir()


def test_two_processes_share_the_windows_and_find_what_one_finds(usual, expected, tmp_path):
    done = run_in_two(tmp_path, *usual)
    assert done.returncode == 0, done.stderr
    found = results_of(tmp_path)["sensitivity"]
    assert [*found["roles"], *found["groups"]] == [*expected["roles"], *expected["groups"]]
    for kind in ("roles", "groups"):
        for name, each in found[kind].items():
            assert each["nats"] == pytest.approx(expected[kind][name]["nats"], rel=1e-5), (kind, name)
    for each, other in zip(found["layers"], expected["layers"], strict=True):
        assert each["divergence"] == pytest.approx(other["divergence"], rel=1e-3)


def test_one_window_for_two_processes_is_enough(usual, tmp_path):
    done = run_in_two(tmp_path, *usual, "--limit", 1)
    assert done.returncode == 0, done.stderr
    found = results_of(tmp_path)["sensitivity"]
    assert found["windows"] == 1
    assert len(found["layers"]) == LAYERS


def test_every_quantized_row_of_a_comparison_has_its_own(usual, tmp_path):
    shared = [flag for flag in usual if flag != "--smooth"]
    run(tmp_path, *shared, "--rows", "full", "rtn", "dual", script="compare.py")
    results = results_of(tmp_path)
    figures = {row["row"]: row["sensitivity"] for row in map(facts, results["rows"])}
    assert figures["full"] == {}
    assert figures["rtn"]["full_precision"] == figures["dual"]["full_precision"]
    assert figures["rtn"]["quantized"] != figures["dual"]["quantized"]
    assert len(list(the_run(tmp_path / "output").glob("sensitivity/*.md"))) == 2


def facts(row: dict) -> dict:
    """A row's name and what was found."""
    return {"row": row["row"], "sensitivity": row.get("sensitivity", row.get("figures", {}).get("sensitivity"))}


def test_the_dry_run_counts_it(usual, tmp_path):
    without = [flag for flag in usual if flag not in ("--sensitivity", "--sensitivity_windows", 5)]
    lines = [
        next(line for line in run(tmp_path, *flags, "--dry_run").splitlines() if "hidden states that" in line)
        for flags in (usual, (*without, "--eval_ppl", "--limit", 5))
    ]
    assert lines[0] != lines[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--wbits", 16, "--abits", 16), "--sensitivity: 16-bit"),
        (("--sensitivity_windows", 0), "--sensitivity_windows 0: must be at least 1"),
        (("--test_dataset", "nowhere.txt"), "nowhere.txt: no such file or folder (given to --test_dataset)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, message, usual, tmp_path):
    done = run_script("main.py", *usual, *flags, folder=tmp_path)
    assert_refused(done, message)
    assert not (tmp_path / "output").exists()


def test_a_model_that_is_quantized_already_has_no_weights_to_go_back_to(usual, token_file, tmp_path):
    run(tmp_path, *usual, "--save_model", "saved")
    done = run_script("main.py", "--model", "saved", "--test_dataset", token_file, "--sensitivity", folder=tmp_path)
    assert_refused(done, "--sensitivity: saved is quantized already")
