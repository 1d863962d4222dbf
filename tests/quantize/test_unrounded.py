"""Parts of a quantized layer left at 16 bits: exactly full precision, exactly one part, and exactly undone."""

import copy
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from best_settings import EXTRAS, best
from families import CASES, CPU, TOKENS, logits, make_model, quantize, relative_error, settings
from torch import nn

from duquant.linear import GroupInput, QuantLinear
from models import decoder_spec
from quantize.bits import BitSettings, ClipSettings
from quantize.observe import layer_calls, layer_output
from quantize.observer import Observer
from quantize.quantization import quantize_model
from quantize.rotation_settings import Transform
from quantize.settings import QuantSettings, TrainingSettings
from quantize.statistics import channel_statistics
from quantize.unrounded import HEADS, ROLES, Part, left_unrounded, rounded_part

METHODS = {
    "smoothed": settings(),
    "trained": settings(smooth=None, training=TrainingSettings(epochs=1)),
    "best": best(),
    "best, everything": best(extras=EXTRAS["all"], clip=ClipSettings("search"), training=TrainingSettings(epochs=1)),
}


class Weights(Observer):
    """The transformed weights of every layer, by path."""

    def __init__(self):
        self.now, self.layers = {}, []

    def rounding(self, group, path, linear):
        self.now[path] = linear.weight.detach()

    def layer_done(self, index, finished, restored):
        self.layers.append(self.now)
        self.now = {}


def quantized_with_weights(model: nn.Module, config: QuantSettings, finished=None):
    """A quantized copy, and the transformed weights of its layers."""
    model, kept = copy.deepcopy(model), Weights()
    spec = decoder_spec(model.config)
    peaks = channel_statistics(model, spec, TOKENS, CPU).scales
    quantize_model(model, spec, TOKENS, peaks, config, CPU, finished, [kept])
    return model, kept.layers


def layers_of(model: nn.Module) -> list[tuple]:
    """(layer, its spec) of a model."""
    spec = decoder_spec(model.config)
    return [(layer, spec.at(index)) for index, layer in enumerate(spec.decoder_layers(model))]


@pytest.fixture(scope="module")
def case():
    """A quantized Llama's first layer, its spec and weights, and what it is called with."""
    model, weights = quantized_with_weights(make_model("llama"), settings())
    calls = layer_calls(model, decoder_spec(model.config), TOKENS, CPU)
    (layer, spec), hidden, kwargs = layers_of(model)[0], calls.hidden, calls.kwargs[0]
    return layer, spec, weights[0], lambda: layer_output(layer, hidden, kwargs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CASES)
def test_with_everything_unrounded_every_family_computes_full_precision(family, method):
    model = make_model(family)
    exact = logits(model)
    quantized, weights = quantized_with_weights(model, METHODS[method])
    assert relative_error(logits(quantized), exact) > 1e-2
    with ExitStack() as stack:
        for (layer, spec), each in zip(layers_of(quantized), weights, strict=True):
            stack.enter_context(left_unrounded(layer, spec, rounded_part(layer, spec), each))
        assert relative_error(logits(quantized), exact) < 2e-4
    assert relative_error(logits(quantized), exact) > 1e-2


def test_a_restored_layer_tells_the_same_weights_as_when_it_was_decided():
    model = make_model("llama")
    _, finished = quantize(model, settings())
    first, second = (quantized_with_weights(model, settings(), each)[1] for each in (None, finished))
    assert [each.keys() for each in first] == [each.keys() for each in second]
    assert len(first[0]) == 7
    assert all(torch.equal(each[path], other[path]) for each, other in zip(first, second, strict=True) for path in each)


def watched(layer: nn.Module) -> dict[str, object]:
    """Everything that a part can change: each linear's decoded weight, and each quantizer."""
    found: dict[str, object] = {}
    for path, module in layer.named_modules():
        if isinstance(module, QuantLinear):
            found[f"weight {path}"] = module.decoded(torch.float32)
            found[f"input {path}"] = module.group.quantizer
        elif hasattr(module, "qkv_quantizer"):
            found |= {role: getattr(module.qkv_quantizer, role) for role in HEADS}
    return found


def changed(before: dict, now: dict) -> set[str]:
    """Names of what is not the same."""
    same = {
        name: torch.equal(value, now[name]) if isinstance(value, torch.Tensor) else value is now[name]
        for name, value in before.items()
    }
    return {name for name, unchanged in same.items() if not unchanged}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_changes_its_own_tensors_and_no_others(role, case):
    layer, spec, weights, output = case
    before, usual = watched(layer), output()
    with left_unrounded(layer, spec, rounded_part(layer, spec).of_role(role), weights):
        different = changed(before, watched(layer))
        assert not torch.equal(output(), usual)
    assert different == {name for name in before if name.split()[0] == role}
    assert len(different) == (1 if role in HEADS else 7)


def test_a_group_changes_weights_and_inputs_of_its_linears_and_no_others(case):
    layer, spec, weights, _ = case
    before = watched(layer)
    for group in spec.groups:
        with left_unrounded(layer, spec, rounded_part(layer, spec).of_group(group), weights):
            assert changed(before, watched(layer)) == {
                f"{role} {path}" for path in group.linears for role in ("weight", "input")
            }


@pytest.mark.parametrize("role", ROLES)
def test_a_role_at_16_bits_is_what_that_setting_gives(role):
    """Of a transform that is not searched, so that it is the same whatever is rounded before it."""
    model = make_model("llama")
    bits = {
        "weight": BitSettings(16, 4),
        "input": BitSettings(4, 16, query=4, key=4, value=4),
        **{each: BitSettings(4, 4, **{each: 16}) for each in HEADS},
    }[role]
    config = settings(smooth=None, transform=Transform.HADAMARD)
    expected, _ = quantized_with_weights(model, replace(config, bits=bits))
    found, weights = quantized_with_weights(model, config)
    calls = layer_calls(found, decoder_spec(found.config), TOKENS, CPU)
    (layer, spec), (other, _) = layers_of(found)[0], layers_of(expected)[0]
    with left_unrounded(layer, spec, rounded_part(layer, spec).of_role(role), weights[0]):
        output = layer_output(layer, calls.hidden, calls.kwargs[0])
    assert torch.equal(output, layer_output(other, calls.hidden, calls.kwargs[0]))


def test_after_the_block_the_layer_computes_the_same_bits_even_if_it_ended_in_an_error(case):
    layer, spec, weights, output = case
    before, usual = watched(layer), output()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}

    def fail_inside():
        with left_unrounded(layer, spec, rounded_part(layer, spec), weights):
            assert not torch.equal(output(), usual)
            raise RuntimeError("no luck today")

    with pytest.raises(RuntimeError, match="no luck"):
        fail_inside()
    assert changed(before, watched(layer)) == set()
    assert torch.equal(output(), usual)
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


def test_a_weight_that_nobody_kept_leaves_the_layer_as_it_was(case):
    layer, spec, weights, output = case
    before, usual = watched(layer), output()
    without = {path: weight for path, weight in weights.items() if not path.endswith("down_proj")}
    with pytest.raises(KeyError, match="down_proj"), left_unrounded(layer, spec, rounded_part(layer, spec), without):
        pass
    assert changed(before, watched(layer)) == set()
    assert torch.equal(output(), usual)


def test_only_what_is_rounded_is_a_part():
    config = replace(settings(), bits=BitSettings(16, 16, key=4))
    model, _ = quantized_with_weights(make_model("llama"), config)
    layer, spec = layers_of(model)[0]
    part = rounded_part(layer, spec)
    assert part == Part(heads=("key",))
    assert not part.of_role("weight")
    assert not part.of_group(spec.groups[0])
    assert {type(each.quantizer) for each in layer.modules() if isinstance(each, GroupInput)} == {nn.Identity}
