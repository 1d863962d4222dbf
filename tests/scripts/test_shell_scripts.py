"""run.sh, run_lwc.sh and the scripts of runs/: what they start, through the real parsers, and one of them for real."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from script_cases import assert_refused

RUNS = sorted(path.stem for path in (ROOT / "runs").glob("*.sh") if path.stem != "common")
DATA = json.loads((ROOT / "assets/published.json").read_text(encoding="utf-8"))


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A Python that only notes its arguments, a line of JSON for each start, and lacks nothing."""
    path = tmp_path / "python"
    note = "import json,sys; print(json.dumps(sys.argv[1:]))"
    ask = 'case "$1" in -c|tools/requirements.py) exit 0;; esac'
    path.write_text(f'#!/bin/sh\n{ask}\n"{sys.executable}" -c \'{note}\' "$@" >>"{tmp_path}/started"\n')
    path.chmod(0o755)
    return path


def started(stand_in: Path, script: str, *arguments: str, **environment: str) -> tuple[list[list[str]], list[str]]:
    """The commands that a shell script gives to Python, and the lines that it prints."""
    settings = {name: value for name, value in os.environ.items() if name not in ("MODEL", "MODELS", "VIRTUAL_ENV")}
    settings |= {"PYTHON": str(stand_in), **environment}
    command = ["bash", str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd="/", env=settings, capture_output=True, text=True, check=True)
    lines = (stand_in.parent / "started").read_text().splitlines()
    return [json.loads(line) for line in lines], done.stdout.splitlines()


def accepted(command: list[str], monkeypatch) -> dict:
    """The flags of a command, as the script's own parser reads them."""
    monkeypatch.setattr("sys.argv", command)
    return vars(importlib.import_module(command[0].removesuffix(".py")).parse_flags())


@pytest.mark.parametrize(
    ("script", "model", "runs"),
    [
        ("run.sh", None, "compare.py"),
        ("run.sh", "somebody/model", "main.py"),
        ("run_lwc.sh", None, "main.py"),
        ("run_lwc.sh", "somebody/model", "main.py"),
    ],
)
def test_the_first_line_says_which_of_the_two_meanings_it_is(script, model, runs, stand_in, monkeypatch):
    environment = {} if model is None else {"MODEL": model}
    [command], lines = started(stand_in, script, "--report", "--alpha", "0.7", **environment)
    assert command[0] == runs
    assert command[-3:] == ["--report", "--alpha", "0.7"]  # whatever the arguments are, they choose no script
    assert lines[0].startswith("no MODEL is set" if model is None else f"MODEL={model}: ")
    if runs == "main.py":
        assert accepted(command, monkeypatch)["alpha"] == 0.7


def test_an_argument_that_the_chosen_script_does_not_have_is_refused_by_it(tmp_path):
    assert_refused(run_script("compare.py", "--model", "m", "--report", folder=tmp_path), "--report")


@pytest.mark.parametrize("name", RUNS)
def test_every_table_has_a_script_whose_commands_are_accepted(name, stand_in, monkeypatch):
    commands, _ = started(stand_in, f"runs/{name}.sh", "--seed", "7")
    assert commands
    for command in commands:
        flags = accepted(command, monkeypatch)
        if flags["model"] is not None:
            assert flags["seed"] == 7
            assert flags["preset"] in (("paper", "best") if name == "formats" else ("paper",))
            assert flags["output_dir"] == Path("output") / name
            assert any(
                flags["model"].lower().endswith(("/" + each, each))
                for key in DATA["names"]
                for each in (key, *DATA["names"][key])
            )


@pytest.mark.parametrize("name", RUNS)
def test_models_can_be_local_folders(name, stand_in):
    commands, _ = started(stand_in, f"runs/{name}.sh", MODELS="/models/a /models/b")
    models = [command[command.index("--model") + 1] for command in commands if "--model" in command]
    assert list(dict.fromkeys(models)) == ["/models/a", "/models/b"]


def test_a_model_that_fails_does_not_keep_the_others_from_being_measured(stand_in):
    stand_in.write_text(stand_in.read_text() + 'case "$*" in *bad*) exit 1;; esac\n')
    with pytest.raises(subprocess.CalledProcessError):
        started(stand_in, "runs/mistral.sh", MODELS="bad good")
    lines = (stand_in.parent / "started").read_text()
    assert "bad" in lines
    assert "good" in lines


def test_a_comparison_of_a_tables_script_ends_beside_published_figures(model_folder, token_file, tmp_path):
    """The two steps of runs/common.sh on a tiny model that is called as a published one."""
    data = ("--calib_dataset", token_file, "--test_dataset", token_file, "--block_size", 16, "--limit", 2)
    flags = ("--preset", "paper", "--eval_ppl", "--rows", "full", "paper", "--output_dir", "out", "--net", "llama-2-7b")
    done = run_script("compare.py", "--model", model_folder, *data, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "out").iterdir()
    done = run_script("compare.py", folder, "--published", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nothing to put beside" in done.stdout  # its text has another name than WikiText-2
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for row in results["rows"]:
        row["perplexity_details"] = {"wikitext2": next(iter(row["perplexity_details"].values()))}
    results["settings"]["block_size"] = 128
    (folder / "results.json").write_text(json.dumps(results))
    done = run_script("compare.py", folder, "--published", "--output", "beside.md", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split("|") for line in done.stdout.splitlines() if "wikitext2 ppl" in line]
    assert [row[4].strip() for row in rows] == ["5.470", "6.280"]
    assert (tmp_path / "beside.md").read_text() == done.stdout.removesuffix("\n")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--model", "m", "--published"), "--published is for finished runs"),
        (("nowhere", "--published"), "nowhere: no such folder"),
    ],
)
def test_published_without_finished_runs_is_one_line(flags, says, tmp_path):
    assert_refused(run_script("compare.py", *flags, folder=tmp_path), says)
