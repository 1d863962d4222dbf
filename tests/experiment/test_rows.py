"""The rows of compare.py: which there are, what is done in each, and what they are called."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from script_cases import settings_of

from experiment.cli import Parser, parse_with_preset, read_settings
from experiment.compare import row_identity
from experiment.options import RunSettings
from experiment.presets import BEYOND_PAPER, PRESETS, VARIANTS, preset_quant
from experiment.rows import GROUPS, PLAIN_ROWS, ROWS, CompareSettings, Row, full_title, method_name, plan_rows
from quantize.bits import BitSettings
from quantize.rotation_settings import GivenSize, RotationSettings
from quantize.settings import QuantSettings, SmoothSettings
from utils.errors import InputError
from utils.setting_flags import add_flags
from utils.settings import flat

SMOOTHED = QuantSettings(bits=BitSettings(4, 4), smooth=SmoothSettings())
PARTS = {  # a row that leaves a part of `best` out → the settings of that part, and what they are in the row
    "best_hadamard": {"transform": "hadamard"},
    "best_dual": {"transform": "dual"},
    "best_without_gptq": {"rounding": "nearest"},
    "best_without_target": {"gptq_target": 0},
    "best_without_swc": {"swc": 0.8},
    "best_without_lac": {"lac": 0.9},
    "best_without_energy": {"smooth_measure": "peak", "alpha": 0.6},
    "best_without_shift": {"channel_shift": False},
    "best_without_key_mean": {"key_mean": False},
    "best_without_value_rotation": {"value_rotation": False},
    "best_without_balanced": {"head_transform": "hadamard"},
    "best_with_value_mean": {"value_mean": True},
}


def rows_for(names, quant: QuantSettings = SMOOTHED, training=None, seeds=(2,)) -> dict[str, Row]:
    """The rows planned for `names`, by key."""
    return {row.key: row for row in plan_rows(names, quant, training, seeds)}


def compare_settings(*flags: object) -> CompareSettings:
    return settings_of(*flags, cls=CompareSettings)


@pytest.fixture
def quant_of(monkeypatch):
    """What main.py's flags say of the method."""

    def read(*flags: str) -> QuantSettings:
        monkeypatch.setattr("sys.argv", ["main.py", *flags])
        parser = Parser("A script.")
        add_flags(parser, RunSettings)
        return read_settings(RunSettings, parse_with_preset(parser, RunSettings)).quant

    return read


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_that_is_a_preset_does_what_main_does_with_it(name, quant_of):
    (row,) = rows_for([name]).values()
    assert row.quant == quant_of("--preset", name)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_ablation_is_best_but_for_one_part(name):
    best, row = (flat(next(iter(rows_for([each]).values())).quant) for each in ("best", name))
    assert best.keys() == row.keys()
    assert {each: row[each] for each in row if row[each] != best[each]} == PARTS[name]


def test_every_ablation_is_known_here():
    assert PARTS.keys() == VARIANTS.keys()


@pytest.mark.parametrize("name", [*PRESETS, *VARIANTS])
def test_presets_have_the_bits_the_seed_the_block_size_and_the_rows_that_are_given_and_nothing_else(name):
    bits = BitSettings(3, 8, group_size=32, symmetric=True, key=5)
    rotation = RotationSettings(GivenSize(64), steps=7, rows=50)
    given = replace(SMOOTHED, bits=bits, rotation=rotation, smooth=SmoothSettings(0.9), probe_tokens=3)
    (row,), (usual,) = (rows_for([name], quant, seeds=[5]).values() for quant in (given, SMOOTHED))
    rotation = replace(usual.quant.rotation, block_size=64, rows=50)
    assert row.quant == replace(usual.quant, bits=bits, rotation=rotation)
    assert isinstance(row.quant.rotation.block_size, GivenSize), "a size that was named must divide here too"
    assert row.seed == row.quant.seed == 5
    assert row.full_title.endswith(" W3A8K5G32")


def test_rows_come_in_the_order_of_the_table_each_once_whatever_the_order_asked():
    settings = compare_settings("--rows", "best", "ablation", "dual", "full")
    keys = list(rows_for(settings.row_names))
    assert keys == ["full", *(f"{name}_seed2" for name in ("dual", "paper", "best", *VARIANTS))]
    assert len(set(ROWS)) == len(ROWS)
    assert not set(GROUPS) & set(ROWS)


def test_groups_hold_rows_that_there_are():
    assert all(set(group) <= set(ROWS) for group in GROUPS.values())
    usual = (*(row for row in PLAIN_ROWS if row != "permute_rotate"), "best")
    assert compare_settings().row_names == compare_settings("--rows", "usual").row_names == usual
    assert set(compare_settings("--rows", "ablation").row_names) == {"full", "paper", "best", *VARIANTS}


def test_where_nothing_is_smoothed_the_row_that_only_smooths_is_refused_by_name_and_left_out_of_a_group():
    usual = compare_settings("--rows", "usual").row_names
    assert set(usual) - set(compare_settings("--no_smooth", "--rows", "usual").row_names) == {"smooth"}
    with pytest.raises(InputError, match="--rows smooth is the row that only smooths"):
        compare_settings("--no_smooth", "--rows", "usual", "smooth").row_names  # noqa: B018


@pytest.mark.parametrize("preset", PRESETS)
def test_under_every_preset_all_rows_can_be_and_no_two_have_one_name_and_title(preset):
    quant = replace(preset_quant(PRESETS[preset], SMOOTHED), training=None)
    rows = rows_for(ROWS, quant).values()
    assert [row.name for row in rows] == list(ROWS)
    assert len({row.title for row in rows}) == len(rows)


def test_round_to_nearest_is_that_whatever_goes_beyond_the_paper():
    best = preset_quant(PRESETS["best"], SMOOTHED)
    nearest = rows_for(["rtn"], replace(best, clip=SMOOTHED.clip))
    assert list(nearest) == ["rtn"], "no samples, so no seed"
    assert nearest["rtn"].title == "round-to-nearest"
    assert nearest["rtn"].quant == rows_for(["rtn"])["rtn"].quant
    assert list(rows_for(["rtn"], best)) == ["rtn_seed2"], "samples decide its clips"
    assert rows_for(["rtn"], best)["rtn_seed2"].title == "round-to-nearest + searched clips"


def test_full_precision_has_nothing_of_what_goes_beyond_the_paper():
    best = preset_quant(PRESETS["best"], SMOOTHED)
    assert not rows_for(["full"], best)["full"].quant.needs_samples


def test_only_rows_of_the_settings_given_are_trained_too():
    training = preset_quant(PRESETS["paper_lwc"], SMOOTHED).training
    rows = rows_for(["full", "rtn", "dual", "paper", "best"], training=training)
    assert [row.name for row in rows.values()] == ["full", "rtn", "rtn_lwc", "dual", "dual_lwc", "paper", "best"]
    assert rows["best_seed2"].quant.training is None


@pytest.mark.parametrize("name", [*PRESETS, *VARIANTS])
def test_every_seed_has_a_row_of_a_preset(name):
    rows = rows_for([name], seeds=(2, 3))
    assert {key: (row.seed, row.quant.seed) for key, row in rows.items()} == {
        f"{name}_seed{seed}": (seed, seed) for seed in (2, 3)
    }


def identity_of(row: Row, statistics: str = "computed") -> str:
    setups = {row.seed: SimpleNamespace(tokens=torch.arange(8)[None])}
    return json.dumps(row_identity(row, setups, statistics), sort_keys=True)


def test_rows_that_do_different_things_are_told_apart_in_their_files():
    different = [name for name in ROWS if PRESETS.get(name) != PRESETS["best"]] + ["best"]
    rows = rows_for(different).values()
    assert len({identity_of(row) for row in rows}) == len(rows)


def test_statistics_of_peaks_matter_only_where_peaks_are_smoothed():
    rows = rows_for(["dual", "best", "best_without_energy"])
    changed = {row.name: identity_of(row) != identity_of(row, "another file") for row in rows.values()}
    assert changed == {"dual": True, "best": False, "best_without_energy": True}


def test_what_is_searched_on_is_nothing_to_rows_without_a_transform():
    flags = ("--abits", 4, "--lac", 0.9)
    more = ("--probe", "peaks", "--probe_tokens", 5)
    usual, peaks = (compare_settings(*flags, *extra).quant.untrained for extra in ((), more))
    for name, same in {"rtn": True, "smooth": True, "dual": False}.items():
        (row,), (other,) = (rows_for([name], quant).values() for quant in (usual, peaks))
        assert row.key == other.key
        assert (identity_of(row) == identity_of(other)) == same


@pytest.mark.parametrize(
    ("flags", "title"),
    [
        ("", "DuQuant without smoothing"),
        ("--smooth", "DuQuant"),
        ("--smooth --lwc", "DuQuant + LWC"),
        ("--smooth --smooth_measure energy", "DuQuant + energy smoothing"),
        ("--smooth --transform none", "smoothing only"),
        ("--smooth --transform none --rounding gptq", "smoothing + GPTQ"),
        ("--transform none", "round-to-nearest"),
        ("--transform none --rounding gptq", "GPTQ"),
        ("--transform none --swc search", "round-to-nearest + searched clips"),
        ("--smooth --transform two_hadamard --rounding gptq", "smoothing + two Hadamard rotations + GPTQ"),
        ("--smooth --key_mean --lac search", "DuQuant + searched clips, shifts"),
        ("--smooth --aformat nvfp4 --swc search --lac block", "DuQuant + searched clips, fitted blocks"),
        ("--transform hadamard --value_rotation", "Hadamard rotation + heads"),
        ("--smooth --transform hadamard --smooth_measure energy", "energy smoothing + Hadamard rotation"),
        ("--preset paper", "DuQuant"),
        ("--preset paper_lwc", "DuQuant + LWC"),
        ("--preset best", "preset best"),
        ("--preset best --wbits 3 --abits 6 --kbits 8 --seed 7 --block_size 32", "preset best"),
        (
            "--preset best --channel_shift --no_key_mean --transform dual",
            "DuQuant + energy smoothing + GPTQ, searched clips, shifts, heads",
        ),
        ("--preset best --wbits 16 --abits 16", "full precision"),
    ],
)
def test_settings_are_called_by_what_they_do_or_by_the_preset_that_they_are(flags, title, quant_of):
    quant = quant_of(*("--abits 4 " * ("preset" not in flags) + flags).split())
    assert method_name(quant) == title
    assert full_title(quant).startswith(title)


def test_settings_that_are_a_preset_bear_its_name_however_they_were_given(quant_of):
    words = "--wbits 4 --abits 4 --smooth --alpha 0.5 --smooth_measure energy --lac search --swc search "
    words += "--rounding gptq --gptq_target 0.5 --channel_shift --key_mean --value_rotation --head_transform balanced "
    spelled_out = quant_of(*(words + "--transform two_hadamard").split())
    assert spelled_out == quant_of("--preset", "best")
    assert method_name(spelled_out) == "preset best"


def test_presets_that_go_beyond_the_paper_are_all_that_are_called_by_their_names(quant_of):
    named = {name for name in PRESETS if method_name(quant_of("--preset", name)).startswith("preset ")}
    assert named == set(BEYOND_PAPER)
