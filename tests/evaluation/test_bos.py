"""The look at a few windows behind BOS: when it warns, for whom, and that it touches nothing else."""

import math

import pytest
import torch
from bos_cases import BOS, lost_model, windows_of
from conftest import random_tokens, tiny_model
from safetensors.torch import save_file
from torch import nn

from evaluation.base import FULL, QUANTIZED, Context
from evaluation.bos import CHECKED, BosEffect, behind_bos, windows_without
from evaluation.journal import Journal
from evaluation.measured import Measured
from evaluation.perplexity import perplexity
from evaluation.runner import Runner, open_evaluations
from evaluation.settings import EvaluationSettings, PerplexitySettings
from models import decoder_spec
from quantize.walk import layers_in_memory, walk
from utils.windows import Bos

CPU = torch.device("cpu")
WINDOWS = windows_of(80, 8, begins=False)  # the first alone begins with BOS
KNOWN, BEGINS = Bos(BOS), Bos(BOS, begins=True)


@pytest.fixture
def runner(tmp_path):
    """Makes a runner on a file of test windows, for a model."""

    def make(model: nn.Module, windows=WINDOWS, bos=KNOWN, divergence=False, own_is_full=True, identity=0) -> Runner:
        save_file({"test": windows}, tmp_path / "text.safetensors")
        context = Context(
            model="tiny",
            config=model.config,
            spec=decoder_spec(model.config),
            tokenizer=None,
            device=CPU,
            longest=64,
            seqlen=8,
            given_seqlen=None,
            seed=0,
            cache_dir=tmp_path,
            bos=bos,
        )
        settings = EvaluationSettings(
            perplexity=PerplexitySettings(True, (str(tmp_path / "text.safetensors"),), divergence)
        )
        journal = Journal(tmp_path / "journal", identity)
        return Runner(open_evaluations(settings, context), journal, tmp_path, "tiny", identity, own_is_full)

    return make


def measured(runner: Runner, model: nn.Module, row: str = QUANTIZED, travels: bool = False) -> Measured:
    found = Measured()
    if travels:
        spec = runner.evaluations.context.spec
        walk(layers_in_memory(model, spec, CPU), [runner.board(model, found, row)], len(spec.decoder_layers(model)))
    runner.measure(model, found, row, row)
    assert not found.failures
    return found


@pytest.mark.parametrize(
    ("without", "behind", "lost"),
    [
        (79, 28.6, True),
        (10, 7.9, True),
        (10, 8.1, False),
        (10, 12, False),
        (math.inf, 5, True),
        (math.inf, math.inf, False),
        (math.nan, 5, False),
        (5, math.nan, False),
    ],
)
def test_a_model_is_lost_whose_perplexity_is_far_better_behind_bos(without, behind, lost):
    assert BosEffect(without, behind, CHECKED).far_better is lost


def test_the_first_few_windows_without_bos_are_looked_at():
    assert torch.equal(windows_without(WINDOWS, BOS), WINDOWS[1 : 1 + CHECKED])
    assert torch.equal(windows_without(WINDOWS[:3], BOS), WINDOWS[1:3])
    assert len(windows_without(windows_of(80, 8, begins=True), BOS)) == 0
    behind = behind_bos(WINDOWS[1:3], BOS)
    assert behind.tolist() == [[BOS, *row[:-1]] for row in WINDOWS[1:3].tolist()]


@pytest.mark.parametrize("travels", [True, False], ids=["beside others", "alone"])
def test_a_lost_model_is_told_of_in_one_line_with_both_figures(travels, runner, caplog):
    model = lost_model()
    found = measured(runner(model), model, travels=travels).results["bos_check"]["text"]
    spec, windows = decoder_spec(model.config), WINDOWS[1 : 1 + CHECKED]
    for key, tokens in {"perplexity": windows, "perplexity_with_bos": behind_bos(windows, BOS)}.items():
        assert found[key] == perplexity(model, spec, tokens, CPU).perplexity
    assert found["perplexity_with_bos"] < 100 < found["perplexity"]
    assert found["windows"] == CHECKED
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == found["warning"]
    for part in ("text: ", f"{found['perplexity']:.2f}", f"{found['perplexity_with_bos']:.2f}", "BOS", "make the file"):
        assert part in line


def test_no_other_figure_changes(runner, tmp_path):
    model = tiny_model()
    plain = measured(runner(model, bos=None), model)
    (tmp_path / "journal").unlink()
    looked = measured(runner(model), model)
    assert plain.results.pop("bos_check") == {}
    assert looked.results.pop("bos_check")["text"]["windows"] == CHECKED
    assert looked.results == plain.results


def test_a_model_that_does_not_mind_has_figures_and_no_warning(runner, caplog):
    model = tiny_model()
    found = measured(runner(model, windows=random_tokens(6, 8)), model).results["bos_check"]["text"]
    assert found["warning"] is None
    assert found["perplexity"] > 1
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_quantized_models_are_not_looked_at(runner):
    model = lost_model()
    quantized = runner(model, own_is_full=False)
    assert quantized.tokens(QUANTIZED) == WINDOWS.numel()
    assert measured(quantized, model).results["bos_check"] == {}
    assert measured(quantized, model, "dual").results["bos_check"] == {}
    assert measured(quantized, model, FULL).results["bos_check"]["text"]["warning"]


@pytest.mark.parametrize("bos", [None, BEGINS], ids=["no BOS", "all begin with BOS"])
def test_where_there_is_no_window_without_bos_or_no_bos_nothing_is_looked_at(bos, runner):
    model = lost_model()
    made = runner(model, windows_of(80, 8, begins=True) if bos else WINDOWS, bos)
    assert len(made.evaluations.members) == 1


def test_it_is_no_part_of_what_figures_depend_on(runner):
    with_check, without = runner(tiny_model()).evaluations, runner(tiny_model(), bos=None).evaluations
    assert len(with_check.members) == 2
    assert with_check.identity() == without.identity()
    assert with_check.windows == without.windows


def test_it_is_done_for_the_divergence_and_for_a_report(runner):
    asked = {
        (shown, divergence): len(runner(tiny_model(), divergence=divergence).for_comparison(shown).evaluations.members)
        for shown in (True, False)
        for divergence in (True, False)
    }
    assert asked == {(True, True): 2, (True, False): 2, (False, True): 2, (False, False): 0}


def test_what_the_journal_has_is_told_again_and_not_measured_again(runner, caplog):
    model = lost_model()
    first = measured(runner(model), model)
    caplog.clear()
    again = runner(model)
    assert again.tokens(QUANTIZED) == 0
    assert measured(again, model).results == first.results
    assert "without BOS the model is lost" in caplog.text
