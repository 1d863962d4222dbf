"""An evaluation is added by one module and one line of the registry: tried on a copy of the scripts."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from docs_cases import blocks

TOY = next(block.text for block in blocks(ROOT / "docs/extending.md") if block.file == "evaluation/toy.py")


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """The scripts and packages, with the toy in `evaluation/` and in the registry."""
    folder = tmp_path_factory.mktemp("house")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for path in ROOT.iterdir():
        if path.is_dir() and (path / "__init__.py").exists() and path.name != "evaluation":
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "evaluation", folder / "evaluation", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "evaluation/toy.py").write_text(TOY)
    registry = folder / "evaluation/settings.py"
    text = registry.read_text()
    line = "    mmlu: MMLUSettings = part(MMLUSettings)\n"
    assert line in text
    text = text.replace(line, line + "    toy: ToySettings = part(ToySettings)\n")
    registry.write_text(
        text.replace("from utils.errors", "from evaluation.toy import ToySettings\nfrom utils.errors", 1)
    )
    return folder


@pytest.fixture(scope="module")
def usual(model_folder, token_file) -> tuple:
    data = ("--calib_dataset", token_file, "--test_dataset", token_file)
    return ("--model", model_folder, *data, "--block_size", 16, "--max_rotation_step", 5, "--abits", 4, "--net", "tiny")


def run(house: Path, script: str, *flags: object, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(house / script), *map(str, flags)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )


def test_it_has_a_flag_is_run_tabled_written_and_read_again(house, usual, tmp_path):
    assert "the threshold of the toy" in run(house, "main.py", "--help-all", folder=tmp_path).stdout
    for name in ("a", "b"):
        done = run(house, "main.py", *usual, "--toy", 0.5, "--output_dir", name, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "a").iterdir()
    large = json.loads((folder / "results.json").read_text())["toy"]["large"]
    assert large > 0
    assert f"{large} are large" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("| large parameters"))
    assert row.split("|")[2].strip() == str(large)
    beside = run(house, "compare.py", folder, next((tmp_path / "b").iterdir()), folder=tmp_path)
    row = next(line for line in beside.stdout.splitlines() if line.startswith("| large parameters"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == [str(large)] * 2


def test_it_is_a_column_of_a_comparison(house, usual, tmp_path):
    done = run(house, "compare.py", *usual, "--toy", 0.5, "--rows", "full", "rtn", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    [table] = tmp_path.glob("output/*/table.csv")
    with open(table, newline="") as file:
        assert all(int(row["large parameters"]) > 0 for row in csv.DictReader(file))


def test_its_wrong_input_is_one_line_and_it_needs_the_whole_model(house, usual, tmp_path):
    done = run(house, "main.py", *usual, "--toy", "-1", folder=tmp_path)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "--toy -1.0: must not be negative" in done.stderr
    done = run(house, "main.py", *usual, "--toy", 1, "--stream", folder=tmp_path)
    assert done.returncode == 2
    assert "--toy needs the whole model" in done.stderr
