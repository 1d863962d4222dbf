"""Tuning the network as a whole: exact before something is learned, gradients of the whole, a divergence that falls."""

import copy

import pytest
import torch
from best_settings import EXTRAS, best
from conftest import random_tokens
from families import CPU, logits, make_model, quantize, settings
from torch import Tensor, nn

from evaluation.perplexity import final_hidden, score
from models import decoder_spec
from quantize.bits import BitSettings, Format, FormatSettings
from quantize.observe import layer_calls
from quantize.refinements import TuningSettings
from quantize.training import Batch
from quantize.tuning import Network, Teacher, TunedLayer, divergence, factors_of, tune_
from quantize.walk import layers_in_memory, walk

TOKENS = random_tokens(6, 24).clamp(min=1)  # token 0 is padding, whose embedding is zeros
FAMILIES = ["llama", "qwen2", "phi3", "gemma2", "olmo2", "qwen3", "granite", "mixtral", "qwen3_moe"]
COARSE = BitSettings(2, 16)  # much is lost, and what is lost changes smoothly with what is tuned
NVFP4 = FormatSettings(Format.NVFP4, Format.NVFP4)


def quantized(name: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> tuple[nn.Module, nn.Module]:
    """A model, and what it is when everything that can be tuned is there."""
    model = make_model(name, dtype)
    extras = EXTRAS["value rotation" if name.startswith("gemma") else "all"]  # Gemma's scores are capped
    return model, quantize(model, best(extras=extras, **changes))[0]


def tuned_layers(model: nn.Module) -> list[TunedLayer]:
    spec = decoder_spec(model.config)
    calls = layer_calls(model, spec, TOKENS, CPU)
    layers = spec.decoder_layers(model)
    return [TunedLayer(layer, kwargs, CPU) for layer, kwargs in zip(layers, calls.kwargs, strict=True)]


def teacher_of(model: nn.Module) -> Tensor:
    return final_hidden(model, decoder_spec(model.config), TOKENS, CPU, "teacher")


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_tuned_yet_is_the_layer_and_calls_leave_it_alone(name):
    _, model = quantized(name)
    spec, before = decoder_spec(model.config), copy.deepcopy(model.state_dict())
    hidden, wanted = layer_calls(model, spec, TOKENS, CPU).hidden, teacher_of(model)
    for layer in tuned_layers(model):
        hidden = layer(hidden)
        for change in layer.changes:
            change.data.normal_(std=0.1)
        layer(hidden)
    assert torch.equal(hidden, wanted)
    assert same_state(model, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_folded_is_what_was_tuned(name):
    _, model = quantized(name)
    spec = decoder_spec(model.config)
    hidden, torch_seed = layer_calls(model, spec, TOKENS, CPU).hidden, torch.manual_seed(0)
    layers = tuned_layers(model)
    for layer in layers:
        for change in layer.changes:
            change.data.normal_(std=0.05, generator=torch_seed)
        hidden = layer(hidden)
    untuned = teacher_of(model)
    for layer in layers:
        layer.fold_()
    assert not torch.allclose(untuned, hidden, rtol=0.01)
    assert torch.equal(teacher_of(model), hidden)


def test_scales_biases_norms_and_clips_are_tuned_and_codes_and_transforms_are_not():
    _, model = quantized()
    names = set(tuned_layers(model)[0].names)
    group = "self_attn.q_proj.group"
    assert {"self_attn.q_proj.scale", "mlp.down_proj.bias", "input_layernorm.weight"} < names
    assert {f"{group}.quantizer.clip.ratios", "self_attn.qkv_quantizer.key.clip.ratios"} < names
    assert not any(part in name for name in names for part in ("codes", "zero", "transform", "shift", "matrix", "mean"))


def test_scales_of_a_format_of_blocks_stay():
    model, config = make_model("llama"), settings(formats=NVFP4)
    _, blocks = model, quantize(model, config)[0]
    layer = decoder_spec(model.config).decoder_layers(blocks)[0]
    assert factors_of(layer) == {}
    assert "input_layernorm.weight" in TunedLayer(layer, {}, CPU).names


def test_a_clip_stays_a_clip_and_a_scale_positive():
    _, model = quantized()
    layer = tuned_layers(model)[0]
    for change in layer.changes:
        change.data.fill_(5)
    layer.fold_()
    state = layer.layer.state_dict()
    assert all((state[name] == 1).all() for name in layer.names if name.endswith("ratios"))
    for change in layer.changes:
        change.data.fill_(-50)
    layer.fold_()
    assert all((layer.layer.state_dict()[name] >= 0).all() for name in layer.factors)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_gradients_are_those_of_the_whole_network(name):
    teacher, model = quantized(name)
    spec, wanted = decoder_spec(model.config), teacher_of(teacher)
    layers = tuned_layers(model)
    changes = [change.requires_grad_() for layer in layers for change in layer.changes]
    inputs = layer_calls(model, spec, TOKENS, CPU).hidden
    network = Network(model, spec, layers, CPU)
    loss = network.gradients_(Batch(inputs, [wanted], 1.0), torch.tensor(3.0))
    found = [torch.zeros_like(each) if each.grad is None else each.grad for each in changes]

    hidden = inputs.clone().requires_grad_()  # as every layer's input has a gradient there
    for layer in layers:
        hidden = layer(hidden)
    whole = divergence(network._logits(hidden), network._logits(wanted)) / TOKENS.numel()
    direct = torch.autograd.grad(3 * whole, changes, materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(loss, whole.detach())
    largest = max(each.abs().max() for each in direct)
    assert largest > 0
    for one, other in zip(found, direct, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * largest.item())


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_the_teacher_s_passenger_ends_where_the_network_does(name):
    model = make_model(name)
    spec = decoder_spec(model.config)
    teacher = Teacher(model, spec, TOKENS, CPU, None)
    walk(layers_in_memory(model, spec, CPU), [teacher], len(spec.decoder_layers(model)))
    assert torch.equal(teacher.hidden, teacher_of(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_come_nearer_to_full_precision(name):
    teacher, model = quantized(name, bits=COARSE)
    spec, wanted = decoder_spec(model.config), teacher_of(teacher)

    def measured() -> float:
        return score(model, spec, TOKENS, final_hidden(model, spec, TOKENS, CPU, "student"), CPU, wanted).divergence

    before = measured()
    report = tune_(model, spec, TOKENS.repeat(6, 1), wanted.repeat(6, 1, 1), TuningSettings(36, 5e-3), CPU)
    assert report.loss_after < 0.95 * report.loss_before
    assert measured() < 0.97 * before
    assert len(report.losses) == 36
    assert None not in report.losses


@pytest.mark.parametrize(("samples", "checked"), [(12, 4), (5, 2), (2, 1)])
def test_what_was_gained_is_measured_on_samples_that_were_not_tuned_on_yet(samples, checked):
    teacher, model = quantized(bits=COARSE)
    spec, tokens = decoder_spec(model.config), TOKENS.repeat(2, 1)[:samples]
    wanted = teacher_of(teacher).repeat(2, 1, 1)[:samples]
    last = tokens[-checked:]
    untuned = divergence(logits(model, last), logits(teacher, last)).item() / last.numel()
    report = tune_(model, spec, tokens, wanted, TuningSettings(samples, 5e-3), CPU)
    assert report.loss_before == pytest.approx(untuned, rel=1e-4)
    assert report.loss_after == pytest.approx(sum(report.losses[-checked:]) / checked, rel=1e-6)
    assert report.loss_after < report.loss_before


def test_logits_in_parts_are_logits(monkeypatch):
    teacher, model = quantized()
    spec, wanted = decoder_spec(model.config), teacher_of(teacher)
    reports = []
    for most in (2**26, 7 * model.config.vocab_size):
        monkeypatch.setattr("quantize.observe.LOGITS_AT_ONCE", most)
        reports.append(tune_(copy.deepcopy(model), spec, TOKENS, wanted, TuningSettings(6), CPU))
    assert reports[0].losses == pytest.approx(reports[1].losses, rel=1e-4)
    assert reports[0].loss_after == pytest.approx(reports[1].loss_after, rel=1e-3)


def test_what_gains_nothing_changes_nothing():
    teacher, model = quantized()
    spec, before = decoder_spec(model.config), copy.deepcopy(model.state_dict())
    report = tune_(model, spec, TOKENS, teacher_of(teacher), TuningSettings(6, 5.0), CPU)
    assert same_state(model, before)
    assert report.loss_after == report.loss_before
    assert "nothing is changed" in str(report)


def test_steps_that_are_not_finite_are_left_out():
    teacher, model = quantized()
    spec, wanted = decoder_spec(model.config), teacher_of(teacher)
    wanted[1] = torch.nan
    report = tune_(model, spec, TOKENS, wanted, TuningSettings(6), CPU)
    assert [loss is None for loss in report.losses] == [number == 1 for number in range(6)]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_tuned_in_float32(dtype):
    teacher, model = quantized(dtype=dtype, bits=COARSE)
    spec = decoder_spec(model.config)
    wanted = teacher_of(teacher).repeat(6, 1, 1)
    report = tune_(model, spec, TOKENS.repeat(6, 1), wanted, TuningSettings(36, 5e-3), CPU)
    assert report.loss_after < 0.97 * report.loss_before
    assert {tensor.dtype for name, tensor in model.named_parameters() if "norm" in name} == {dtype}
