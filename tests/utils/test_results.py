"""The figures of a run and their table."""

import json
import math

import pytest
import torch

from utils import results
from utils.results import format_table, plain, versions

HEADER = ["", "bits", "wikitext2 ppl"]
ROWS = [["full precision", "–", "5.470"], ["DuQuant", "W4A4", "12345.678"]]


def test_columns_of_a_table_line_up():
    lines = format_table(HEADER, ROWS).splitlines()
    assert len({len(line) for line in lines}) == 1
    bars = [[place for place, character in enumerate(line) if character == "|"] for line in lines]
    assert all(found == bars[0] for found in bars)
    assert len(lines) == 2 + len(ROWS)


def test_names_stand_left_and_numbers_right():
    header, rule, full, ours = (line.split("|")[1:-1] for line in format_table(HEADER, ROWS).splitlines())
    assert full[0] == " full precision "
    assert ours[0] == " DuQuant        "
    assert (full[2], ours[2]) == ("         5.470 ", "     12345.678 ")
    assert header[2] == " wikitext2 ppl "
    assert [cell.strip().strip("-") for cell in rule] == [":", ":", ":"]
    assert rule[0].strip().startswith(":-")
    assert rule[1].strip().endswith("-:")


def test_a_table_is_markdown_with_every_cell():
    for row, line in zip([HEADER, *ROWS], [0, 2, 3], strict=True):
        cells = format_table(HEADER, ROWS).splitlines()[line].strip("|").split("|")
        assert [cell.strip() for cell in cells] == row


def test_a_table_without_rows_is_its_header():
    assert len(format_table(["name", "value"], []).splitlines()) == 2


@pytest.mark.parametrize("value", [0, 1.5, -3e300])
def test_finite_figures_stay(value):
    assert plain(value) == value


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_figures_that_json_cannot_hold_become_none(value):
    assert json.dumps(plain(value), allow_nan=False) == "null"


def test_versions_are_those_of_the_libraries_that_are_there(monkeypatch):
    monkeypatch.setattr(results, "PACKAGES", ("torch", "no-such-package-at-all"))
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["python"].count(".") == 2
    assert "no-such-package-at-all" not in found
