"""Mixtures of experts: taking fused parameters apart, stacking them again, and experts that no token reaches."""

import copy

import pytest
import torch
from conftest import random_tokens
from families import CPU, logits, make_config, make_model, reload, save, settings
from torch import nn
from transformers import AutoModelForCausalLM

from duquant.experts import Experts, unfuse_experts_
from duquant.linear import QuantLinear
from models import decoder_spec
from models.load import ModelSource, load_config, load_model, load_skeleton
from models.qwen3_moe import has_experts
from quantize.observe import capture_rows, layer_calls
from quantize.quantization import quantize_model
from quantize.settings import SmoothSettings, TrainingSettings, WeightPeak
from quantize.statistics import channel_statistics

FEW = torch.tensor([[5, 5, 5, 5]])  # one token over and over: it reaches as many experts as a token has
MIXTURES = ("mixtral", "qwen3_moe", "qwen3_moe, one dense layer")
every_mixture = pytest.mark.parametrize("name", MIXTURES)


def fused_model(name: str) -> nn.Module:
    """Random weights, with the experts as transformers has them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name)).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def take_apart_(model: nn.Module) -> None:
    spec = decoder_spec(model.config)
    unfuse_experts_(spec.decoder_layers(model), spec.experts)


def quantize(model: nn.Module, config, tokens: torch.Tensor) -> tuple[nn.Module, list[dict]]:
    model, spec = copy.deepcopy(model), decoder_spec(model.config)
    peaks = channel_statistics(model, spec, tokens, CPU).scales
    return model, quantize_model(model, spec, tokens, peaks, config, CPU)


@every_mixture
def test_taken_apart_experts_compute_what_the_fused_ones_do(name):
    fused = fused_model(name)
    fused.set_experts_implementation("eager")  # the grouped product knows no float64
    apart = copy.deepcopy(fused)
    take_apart_(apart)
    assert any(isinstance(module, Experts) for module in apart.modules())
    torch.testing.assert_close(logits(apart), logits(fused), atol=1e-12, rtol=1e-12)
    before = logits(apart)
    take_apart_(apart)
    assert torch.equal(logits(apart), before)


@every_mixture
def test_taking_apart_copies_nothing(name):
    model = fused_model(name)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    take_apart_(model)
    assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} <= storages


@every_mixture
def test_a_mixture_is_loaded_from_fused_weights_and_saved_with_experts_of_their_own(name, model_folder, tmp_path):
    apart = fused_model(name).float()
    apart.save_pretrained(tmp_path / "original")
    take_apart_(apart)
    source = ModelSource(str(tmp_path / "original"))
    loaded = load_model(source, load_config(source), torch.float32, "sdpa")
    assert torch.equal(logits(loaded), logits(apart))
    quantized, _ = quantize(loaded, settings(), random_tokens(3, 12))
    save(tmp_path / "saved", quantized, settings(), model_folder)
    assert torch.equal(logits(reload(tmp_path / "saved")[0]), logits(quantized))


def test_a_skeleton_has_the_experts_that_a_model_has():
    config = make_config("qwen3_moe, one dense layer")
    skeleton, model = load_skeleton(config), make_model("qwen3_moe, one dense layer")
    assert {name for name, _ in skeleton.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_dense_layers_are_where_the_model_has_them():
    for changes in ({"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}, {"num_experts": 0}, {}):
        config = make_config("qwen3_moe")
        for key, value in changes.items():
            setattr(config, key, value)
        layers = AutoModelForCausalLM.from_config(config).model.layers
        assert [hasattr(layer.mlp, "experts") for layer in layers] == [has_experts(config, 0), has_experts(config, 1)]


@every_mixture
def test_the_router_keeps_its_precision_and_its_choices(name):
    model = make_model(name, torch.float64)
    quantized, _ = quantize(model, settings(16), random_tokens(3, 12))
    routers = [getattr(layer.mlp, "gate", None) for layer in quantized.model.layers]
    chosen = []
    for each in (model, quantized):
        gate = each.model.layers[1].mlp.gate
        handle = gate.register_forward_hook(lambda module, args, output: chosen.append(output))
        logits(each)
        handle.remove()
    torch.testing.assert_close(chosen[1][0], chosen[0][0], atol=1e-5, rtol=1e-4)
    assert torch.equal(chosen[1][2], chosen[0][2])
    assert not any(isinstance(router, QuantLinear) for router in routers)


def test_every_expert_has_the_peaks_of_all_tokens():
    model = make_model("mixtral")
    spec, tokens = decoder_spec(model.config), random_tokens(3, 12)
    scales = channel_statistics(model, spec, tokens, CPU).scales
    calls = layer_calls(model, spec, tokens, CPU)
    layer, group = model.model.layers[0], spec.groups[3]
    rows = capture_rows(layer, group.inputs, calls.hidden, calls.kwargs[0])
    assert rows.shape == (2 * tokens.numel(), 80)
    for path in group.linears:
        torch.testing.assert_close(scales[spec.linear_key(0, path)], rows.abs().amax(dim=0))
    inputs = capture_rows(layer, ("mlp",), calls.hidden, calls.kwargs[0])
    for path in spec.groups[2].linears:
        torch.testing.assert_close(scales[spec.linear_key(0, path)], inputs.abs().amax(dim=(0, 1)))


@every_mixture
def test_experts_without_a_calibration_token_are_exact_and_finite_all_the_same(name):
    model = make_model(name, torch.float64)
    exact, _ = quantize(model, settings(16), FEW)
    torch.testing.assert_close(logits(exact), logits(model), atol=2e-4, rtol=1e-4)
    quantized, _ = quantize(make_model(name), settings(8), FEW)
    assert logits(quantized).isfinite().all()
    assert all(parameter.isfinite().all() for parameter in quantized.parameters())


@every_mixture
def test_clipping_is_trained_where_tokens_are_and_left_where_none_are(name):
    model, figures = quantize(make_model(name), settings(training=TrainingSettings(epochs=2)), FEW)
    for layer in figures:
        assert layer["training"]["restored"] == 0
        assert layer["training"]["loss_after"] <= layer["training"]["loss_before"]
    assert logits(model).isfinite().all()


def test_no_expert_stands_for_the_others_in_smoothing():
    """With `representative` as with `group`, the scale of a mixture comes from the largest weight of all experts."""
    found = []
    for peak in WeightPeak:
        model, _ = quantize(make_model("mixtral"), settings(16, smooth=SmoothSettings(0.6, peak)), random_tokens(2, 8))
        found.append(model.model.layers[0].post_attention_layernorm.weight)
    assert torch.equal(*found)
