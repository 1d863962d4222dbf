"""Presets: settings by one name."""

import re
import shlex

import pytest
from conftest import ROOT

from experiment.cli import Parser, parse_with_preset, read_settings
from experiment.options import RunSettings
from experiment.presets import ABOUT, PRESETS
from experiment.rows import CompareSettings
from quantize.widths import check_widths
from utils.errors import InputError
from utils.setting_flags import add_flags, start_flags_from, way_off
from utils.settings import Changes, flat, from_dict, identity, options, to_dict

LEFT_OUT = {RunSettings: (), CompareSettings: ("transform",)}  # as the scripts do
PAPER = "--wbits 4 --abits 4 --smooth --alpha 0.6 --lac 0.9 --swc 0.8 --max_rotation_step 256 --permutation_times 1"
PAPER_LWC = "--wbits 4 --abits 4 --smooth --alpha 0.5 --lac 0.9 --lwc --epochs 20"
every_preset = pytest.mark.parametrize("name", PRESETS)
either_script = pytest.mark.parametrize("cls", LEFT_OUT, ids=["main", "compare"])


@pytest.fixture
def said(monkeypatch):
    """The settings that a script's command line says."""

    def read(flags: str, cls: type = RunSettings):
        monkeypatch.setattr("sys.argv", ["script.py", *shlex.split(flags)])
        parser = Parser("A script.")
        add_flags(parser, cls, LEFT_OUT[cls])
        return read_settings(cls, parse_with_preset(parser, cls))

    return read


def spelled_out(name: str, cls: type = RunSettings) -> str:
    """The flags that say what a preset does, but for those that the script has not."""
    return " ".join(
        {True: f"--{each}", False: f"--no_{each}"}[value] if isinstance(value, bool) else f"--{each} {value or 'none'}"
        for each, value in PRESETS[name].items()
        if each not in LEFT_OUT[cls]
    )


@every_preset
@either_script
def test_a_preset_names_settings_of_both_scripts_with_values_that_they_can_have(name, cls, said):
    start_flags_from(Parser("A script."), cls, PRESETS[name])
    settings = flat(said(f"--preset {name}", cls))
    said_by_it = {each: value for each, value in PRESETS[name].items() if each not in LEFT_OUT[cls]}
    assert {each: settings[each] for each in said_by_it} == said_by_it, "and nothing in it is idle"


@every_preset
def test_a_preset_is_about_the_model_that_is_made_alone(name):
    changes = {each.name: each.changes for each in options(RunSettings)}
    assert all(changes.get(each, Changes.LAYERS) is Changes.LAYERS for each in PRESETS[name])


def test_the_usual_block_size_of_a_preset_makes_way_as_if_it_were_not_named(monkeypatch, said):
    monkeypatch.setitem(PRESETS, "paper", {"block_size": 128})
    check_widths(said("--preset paper").quant, {"q_proj": 576})
    with pytest.raises(InputError, match="--block_size 128"):
        check_widths(said("--preset paper --block_size 128").quant, {"q_proj": 576})


@either_script
def test_a_name_that_is_no_setting_is_refused(cls, monkeypatch, said):
    monkeypatch.setitem(PRESETS, "paper", {"wbits": 4, "woolliness": 3})
    with pytest.raises(ValueError, match="woolliness is no setting"):
        said("--preset paper", cls)


def test_every_preset_has_its_line_in_the_help(said, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # or a narrow terminal breaks lines
    with pytest.raises(SystemExit):
        said("--help")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert ABOUT.keys() == PRESETS.keys()
    assert all(f"{name}: {about}" in lines for name, about in ABOUT.items())


@every_preset
@either_script
def test_a_preset_is_the_same_run_as_what_it_says_spelled_out(name, cls, said):
    preset, by_hand = said(f"--preset {name}", cls), said(spelled_out(name, cls), cls)
    assert flat(preset) == flat(by_hand) | {"preset": name}
    assert identity(preset, Changes.GRADES) == identity(by_hand, Changes.GRADES)


@pytest.mark.parametrize(("name", "flags"), [("paper", PAPER), ("paper_lwc", PAPER_LWC)])
def test_the_papers_experiments_are_what_they_were(name, flags, said):
    assert said(f"--preset {name}").quant == said(flags).quant


@pytest.mark.parametrize("script", ["run.sh", "run_lwc.sh"])
def test_the_shell_scripts_use_presets_that_there_are(script):
    words = re.split(r"[\s()]+", (ROOT / script).read_text())
    assert words[words.index("--preset") + 1] in PRESETS


@pytest.mark.parametrize(
    "given",
    [
        *("--wbits 3", "--abits 8", "--alpha 0.7", "--lac none", "--swc none", "--swc 0.5", "--no_smooth", "--kbits 8"),
        *("--swc none --lwc --epochs 3", "--transform hadamard", "--block_size 64", "--act_symmetric"),
    ],
)
def test_flags_win_over_the_preset_wherever_they_stand(given, said):
    before, after = said(f"{given} --preset paper"), said(f"--preset paper {given}")
    assert before == after
    expected = flat(said(f"{spelled_out('paper')} {given}"))
    assert flat(after) == expected | {"preset": "paper"}
    assert after.quant != said("--preset paper").quant


def test_without_a_preset_everything_is_as_the_class_says(said):
    assert said("--preset paper --preset none") == said("") == RunSettings()


@every_preset
def test_json_gives_the_same_settings_back(name, said):
    settings = said(f"--preset {name} --eval_ppl")
    assert from_dict(RunSettings, to_dict(settings)) == settings


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--preset paper --lwc", "--preset paper has --swc 0.8, which --swc none takes out"),
        ("--swc 0.7 --preset paper_lwc", "--preset paper_lwc has --lwc, which --no_lwc takes out"),
    ],
)
def test_an_error_that_a_preset_has_a_part_in_says_what_takes_that_out(flags, part, said):
    with pytest.raises(InputError) as caught:
        said(flags)
    assert str(caught.value) == f"--lwc learns the clipping that --swc fixes: give one of them; {part}"
    assert said(f"{flags} {part.split('which ')[1].removesuffix(' takes out')}")


@pytest.mark.parametrize("flags", ["--preset paper --swc 1.5", "--swc 0.8 --lwc", "--preset paper --lac_kv 2"])
def test_an_error_that_no_preset_has_a_part_in_is_left_as_it_is(flags, said):
    with pytest.raises(InputError) as caught:
        said(flags)
    assert "--preset" not in str(caught.value)


@every_preset
def test_whatever_a_preset_switches_on_can_be_taken_out(name, said):
    for each, value in PRESETS[name].items():
        off = way_off(RunSettings, each)
        if value is True or off is not None:
            assert not flat(said(f"--preset {name} {off}")).get(each)
