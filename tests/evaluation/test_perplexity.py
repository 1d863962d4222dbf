"""Perplexity against the model's own loss."""

import math

import pytest
import torch
from conftest import VOCABULARY, random_tokens, tiny_model
from torch import Tensor, nn

from duquant.attention import install
from evaluation import perplexity as scoring
from evaluation.perplexity import final_hidden, perplexity, score, token_divergence
from models import decoder_spec
from quantize import observe
from quantize.observe import head_logits

CPU = torch.device("cpu")
WINDOWS = random_tokens(5, 12)


def measure(model: nn.Module, windows: Tensor = WINDOWS):
    return perplexity(model, decoder_spec(model.config), windows, CPU)


@torch.no_grad()
def own_losses(model: nn.Module, windows: Tensor = WINDOWS) -> list[float]:
    return [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_perplexity_is_exp_of_the_mean_of_the_model_s_own_window_losses(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    losses, found = own_losses(model), measure(model)
    assert found.nats == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert 1.5 * VOCABULARY < found.perplexity < math.inf  # it is sure of itself, and wrong


def test_the_attention_wrapper_does_not_change_it():
    model = tiny_model()
    before = measure(model)
    install(model)
    assert measure(model) == before


@pytest.mark.parametrize("tokens_per_forward", [1, 24, 36, 1000])
def test_perplexity_does_not_depend_on_batching(tokens_per_forward, monkeypatch):
    expected = measure(tiny_model())
    monkeypatch.setattr(observe, "TOKENS_PER_FORWARD", tokens_per_forward)
    assert measure(tiny_model()).nats == pytest.approx(expected.nats, rel=1e-6)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_exactly_the_windows_given_are_counted(count):
    model = tiny_model()
    found = measure(model, WINDOWS[:count])
    assert (found.windows, found.tokens_per_window) == (count, 12)
    assert found.nats == pytest.approx(sum(own_losses(model)[:count]) / count, rel=1e-5)


def test_windows_do_not_see_each_other():
    model = tiny_model()
    alone = [measure(model, window[None]).nats for window in WINDOWS]
    assert measure(model).nats == pytest.approx(sum(alone) / len(alone), rel=1e-6)


def test_a_head_that_knows_nothing_has_the_vocabulary_for_perplexity():
    model = tiny_model()
    model.lm_head.weight.zero_()
    assert measure(model).perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_a_loss_beyond_the_range_of_exp_is_infinite_perplexity():
    model = tiny_model()
    model.lm_head.weight.mul_(1e4)
    found = measure(model)
    assert found.perplexity == math.inf
    assert 700 < found.nats < math.inf


def test_tied_embeddings_and_half_precision_are_measured_like_the_model_s_own_loss():
    model = tiny_model(torch.bfloat16, tie_word_embeddings=True)
    model.get_input_embeddings().weight.mul_(0.05)
    losses = own_losses(model)
    assert measure(model).nats == pytest.approx(sum(losses) / len(losses), rel=2e-2)


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    before = model(WINDOWS).logits
    measure(model)
    assert torch.equal(model(WINDOWS).logits, before)


@torch.no_grad()
def test_divergence_is_the_mean_over_predicted_tokens_of_kl_from_the_teacher():
    teacher, student = tiny_model(), tiny_model(seed=1)
    spec = decoder_spec(teacher.config)
    hidden = [final_hidden(model, spec, WINDOWS, CPU, "test") for model in (teacher, student)]
    found = score(student, spec, WINDOWS, hidden[1], CPU, hidden[0])
    assert found.nats == measure(student).nats
    # the head is the student's for both: quantization leaves it alone
    wanted = head_logits(student, spec, WINDOWS, hidden[0])[:, :-1].double().log_softmax(-1)
    actual = head_logits(student, spec, WINDOWS, hidden[1])[:, :-1].double().log_softmax(-1)
    expected = (wanted.exp() * (wanted - actual)).sum(-1).mean().item()
    assert found.divergence == pytest.approx(expected, rel=1e-5)
    assert expected > 0.1


def test_divergence_is_not_symmetric_and_zero_only_for_equal_logits():
    first, second = (torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.allclose(token_divergence(first, first), torch.zeros(4), atol=1e-6)
    assert (token_divergence(first, second) > 0.01).all()
    assert not torch.allclose(token_divergence(first, second), token_divergence(second, first), atol=1e-3)
    assert torch.allclose(token_divergence(first + 3, second), token_divergence(first, second), atol=1e-5)


@pytest.mark.parametrize("logits", [1, 3 * VOCABULARY, 10 * VOCABULARY])
def test_the_figures_do_not_depend_on_how_many_logits_are_made_at_a_time(logits, monkeypatch):
    teacher, student = tiny_model(), tiny_model(seed=1)
    spec = decoder_spec(teacher.config)
    states = [final_hidden(model, spec, WINDOWS, CPU, "test") for model in (student, teacher)]
    whole = score(student, spec, WINDOWS, states[0], CPU, states[1])
    shapes, make = [], head_logits
    monkeypatch.setattr(observe, "LOGITS_AT_ONCE", logits)
    monkeypatch.setattr(scoring, "head_logits", lambda *given: shapes.append(given[2].shape) or make(*given))
    parts = score(student, spec, WINDOWS, states[0], CPU, states[1])
    assert (parts.nats, parts.divergence) == pytest.approx((whole.nats, whole.divergence), rel=1e-6)
    most = max(1, logits // VOCABULARY)
    assert max(tokens for _, tokens in shapes) == most
    assert len(shapes) == 2 * len(WINDOWS) * math.ceil((WINDOWS.shape[1] - 1) / most)  # the last token predicts nothing
