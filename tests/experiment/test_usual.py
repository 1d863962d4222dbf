"""What a run is where its command line leaves it open."""

import argparse

import pytest

from experiment.cli import parse_with_preset, read_settings
from experiment.options import RunSettings
from experiment.presets import PRESETS
from experiment.rows import CompareSettings
from experiment.usual import method_flags, usual_evaluation, usual_run
from utils.parser import Parser
from utils.setting_flags import add_flags
from utils.settings import flat


@pytest.fixture
def said(monkeypatch):
    """The settings of a command line, and the flags that nobody gave."""

    def parse(line: str, cls: type = RunSettings, fill=usual_run) -> tuple:
        monkeypatch.setattr("sys.argv", ["script.py", *line.split()])
        parser = Parser("A script.")
        add_flags(parser, cls, ("transform",) if cls is CompareSettings else ())
        flags = parse_with_preset(parser, cls, fill)
        assert isinstance(flags, argparse.Namespace)
        return read_settings(cls, flags), [each.flag for each in flags.taken]

    return parse


def test_a_model_alone_is_the_papers_method_and_perplexity(said):
    settings, taken = said("--model m")
    assert taken == ["--preset paper", "--eval_ppl"]
    spelled_out, none = said("--model m --preset paper --eval_ppl")
    assert (settings, none) == (spelled_out, [])
    assert flat(settings).items() >= PRESETS["paper"].items()


@pytest.mark.parametrize(
    "given",
    [
        *(
            "--seed 3",
            "--block_size 64",
            "--nsamples 4 --seqlen 64",
            "--test_dataset c4",
            "--eval_kl",
            "--save_model d",
            "--save_dir d",
        ),
        *("--resume d", "--dry_run", "--report", "--stream", "--no_sensitivity", "--offload_calibration"),
        "--act_scales s",
    ],
)
def test_what_says_nothing_of_method_or_evaluation_leaves_both_open(given, said):
    settings, taken = said(given)
    assert taken == ["--preset paper", "--eval_ppl"]
    assert settings.preset.preset == "paper"
    assert settings.evaluation.perplexity.eval_ppl


@pytest.mark.parametrize(
    "given",
    [
        *(
            "--wbits 4",
            "--abits 16",
            "--lac 0.9",
            "--smooth",
            "--no_smooth",
            "--no-smooth",
            "--transform dual",
            "--lwc",
        ),
        *("--rounding nearest", "--train transform", "--swc none", "--key_mean", "--preset none"),
        *("--alpha 0.5", "--epochs 20", "--kbits 8", "--symmetric", "--probe mean"),
    ],
)
def test_one_flag_of_the_method_is_what_the_flags_say_alone(given, said):
    settings, taken = said(given)
    by_hand, _ = said(f"{given} --eval_ppl", fill=None)
    assert taken == ["--eval_ppl"]
    assert settings == by_hand, "even where it is given its default"


def test_another_preset_is_that_preset(said):
    settings, taken = said("--preset best")
    assert (settings.preset.preset, taken) == ("best", ["--eval_ppl"])


@pytest.mark.parametrize(
    "given", ["--tasks piqa", "--prompt a", "--sensitivity", "--eval_mmlu --mmlu_data_dir d", "--eval_mtbench"]
)
def test_an_evaluation_that_is_asked_for_is_the_one(given, said):
    settings, taken = said(given)
    assert taken == ["--preset paper"]
    assert len(settings.evaluation.asked()) == 1


def test_no_evaluation_can_be_wanted(said):
    settings, taken = said("--no_eval_ppl --no-smooth")
    assert taken == []
    assert settings.evaluation.asked() == []


def test_a_comparison_takes_perplexity_alone(said):
    settings, taken = said("--model m", CompareSettings, usual_evaluation)
    assert taken == ["--eval_ppl"]
    assert settings.preset.preset is None


def test_the_flags_of_the_method_are_those_that_change_layers_and_that_presets_speak_of():
    flags = method_flags()
    assert {name for preset in PRESETS.values() for name in preset} <= flags
    assert not {"seed", "block_size", "offload_calibration", "preset", "act_scales", "calib_dataset"} & flags
