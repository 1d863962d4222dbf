"""The runner: windows that walk beside others, failures that end nothing else, and what the journal spares."""

from pathlib import Path

import pytest
import torch
from conftest import random_tokens, tiny_model
from safetensors.torch import save_file

import evaluation.perplexity as measuring
from evaluation.base import FULL, QUANTIZED, Context
from evaluation.journal import Journal
from evaluation.measured import Measured
from evaluation.runner import Runner, open_evaluations
from evaluation.settings import EvaluationSettings, PerplexitySettings
from models import decoder_spec

CPU = torch.device("cpu")
LABELS = ("first", "second")


@pytest.fixture
def runner(tmp_path):
    """Makes a runner of perplexities on two files of tokens, as a new process would."""
    for seed, label in enumerate(LABELS):
        save_file({"test": random_tokens(3, 12, seed)}, tmp_path / f"{label}.safetensors")
    model = tiny_model()
    context = Context(
        model="tiny",
        config=model.config,
        spec=decoder_spec(model.config),
        tokenizer=None,
        device=CPU,
        longest=64,
        seqlen=12,
        given_seqlen=None,
        seed=0,
        cache_dir=tmp_path,
    )

    def make(divergence: bool = False, identity: object = "tiny") -> Runner:
        datasets = tuple(str(tmp_path / f"{label}.safetensors") for label in LABELS)
        settings = EvaluationSettings(perplexity=PerplexitySettings(True, datasets, divergence))
        journal = Journal(Path(tmp_path / "journal"), identity)
        return Runner(open_evaluations(settings, context), journal, tmp_path, "tiny", identity)

    return make


def walk(model, *travellers) -> None:
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for each in travellers:
                each.visit(index, layer)


def measured(runner: Runner, row: str = QUANTIZED, model=None) -> Measured:
    found = Measured()
    runner.measure(model or tiny_model(), found, row, row)
    return found


def forbid_(monkeypatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(measuring, name, lambda *_: pytest.fail("measured"))


def test_windows_beside_others_find_what_they_find_alone(runner, tmp_path, monkeypatch):
    alone = measured(runner())
    (tmp_path / "journal").unlink()
    beside, model, found = runner(), tiny_model(), Measured()
    assert beside.tokens(QUANTIZED) == 2 * 3 * 12
    walk(model, beside.board(model, found, QUANTIZED))
    forbid_(monkeypatch, "final_hidden")
    beside.measure(model, found, QUANTIZED, "tiny")
    assert found.results == alone.results
    assert set(found.results["perplexity"]) == set(LABELS)


def test_divergence_is_from_the_full_model_that_walks_in_step(runner):
    walking, model, full, own = runner(divergence=True), tiny_model(), Measured(), Measured()
    before = walking.for_comparison(shown=False)
    walk(model, before.board(model, full, FULL), walking.board(model, own, QUANTIZED))
    before.measure(model, full, FULL, "full")
    walking.measure(model, own, QUANTIZED, "own")
    details = own.results["perplexity_details"]
    assert {label: result["divergence"] for label, result in details.items()} == pytest.approx(
        dict.fromkeys(LABELS, 0), abs=1e-6
    )
    assert full.results["perplexity_details"]["first"]["divergence"] is None
    assert runner().for_comparison(shown=False).evaluations.members == ()
    assert len(runner().for_comparison(shown=True).evaluations.members) == 2


def test_a_visit_that_fails_is_recorded_and_the_other_windows_go_on(runner, monkeypatch):
    alone = measured(runner()).results["perplexity"]["second"]
    Path(runner().journal.path).unlink()
    advance, model, found = measuring.advance_, tiny_model(), Measured()

    def fail(layer, hidden, *rest):
        if layer is model.model.layers[1] and torch.equal(hidden, first.hidden):
            raise RuntimeError("no luck today")
        advance(layer, hidden, *rest)

    failing = runner()
    travellers = failing.board(model, found, QUANTIZED)
    first = travellers._aboard[failing.evaluations.members[0]]
    monkeypatch.setattr(measuring, "advance_", fail)
    walk(model, travellers)
    failing.measure(model, found, QUANTIZED, "tiny")
    assert found.failures == {"perplexity first": "RuntimeError: no luck today"}
    assert found.results["perplexity"] == {"second": alone}


def test_an_interruption_is_no_failure(runner, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "score", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measured(runner())


def test_what_the_journal_has_neither_walks_nor_is_measured_again(runner, monkeypatch):
    expected = measured(runner()).results
    forbid_(monkeypatch, "final_hidden", "score")
    again = runner()
    assert again.tokens(QUANTIZED) == 0
    assert measured(again).results == expected


def test_the_full_model_walks_again_while_its_student_is_not_measured(runner):
    teaching = runner(divergence=True)
    measured(teaching, FULL)
    again = runner(divergence=True)
    assert again.tokens(FULL) == 2 * 3 * 12
    measured(again, FULL)
    measured(again, QUANTIZED)
    assert runner(divergence=True).tokens(FULL) == 0


def test_other_data_other_questions_and_another_model_are_measured(runner, tmp_path):
    before = measured(runner()).results["perplexity"]
    save_file({"test": random_tokens(3, 12, 7)}, tmp_path / "second.safetensors")
    after = measured(runner()).results["perplexity"]
    assert after["first"] == before["first"]
    assert after["second"] != before["second"]
    assert runner(divergence=True).tokens(QUANTIZED) == 2 * 3 * 12, "the divergence is missing"
    assert runner(identity="another").tokens(QUANTIZED) == 2 * 3 * 12
