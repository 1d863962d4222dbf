"""One builder: what was decided gives the same layer again, whoever asks."""

import ast
import copy

import pytest
import torch
from conftest import ROOT, random_tokens, tiny_model
from torch import nn

from duquant.attention import install
from models import decoder_spec
from quantize.bits import BitSettings, ClipSettings
from quantize.build import build_
from quantize.layer import decide
from quantize.observe import layer_output
from quantize.quantization import Flow
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import GqaSmooth, QuantSettings, SmoothSettings, TrainingSettings
from quantize.state import GroupState, LayerState
from quantize.statistics import channel_statistics

CPU = torch.device("cpu")
USUAL = {"bits": BitSettings(4, 4), "smooth": SmoothSettings(), "rotation": RotationSettings(16, 8)}
CASES = {
    "usual": QuantSettings(**USUAL),
    "folded for shared heads": QuantSettings(**{**USUAL, "smooth": SmoothSettings(gqa=GqaSmooth.FOLD)}),
    "no smoothing": QuantSettings(**{**USUAL, "smooth": None}),
    "no transform": QuantSettings(**USUAL, transform=Transform.NONE),
    "fixed clips": QuantSettings(**USUAL, clip=ClipSettings(0.9, 0.8)),
    "learned clips": QuantSettings(**USUAL, training=TrainingSettings(epochs=2)),
    "groups": QuantSettings(**{**USUAL, "bits": BitSettings(3, 4, 8, True)}),
    "weights alone": QuantSettings(**{**USUAL, "bits": BitSettings(4, 16)}),
    "activations alone": QuantSettings(**{**USUAL, "bits": BitSettings(16, 4)}),
    "roles": QuantSettings(**{**USUAL, "bits": BitSettings(4, 8, query=3, key=16, value=2)}),
}


def decided(config: QuantSettings, dtype: torch.dtype):
    """(the layer as it was, its state, the layer that deciding left, an input, its other arguments, its spec)."""
    model = tiny_model(dtype)
    spec, tokens = decoder_spec(model.config), random_tokens(4, 16)
    peaks = channel_statistics(model, spec, tokens, CPU).scales
    install(model)
    flow = Flow(model, spec, tokens, config, CPU)
    inputs, layer = flow.inputs(0), model.model.layers[0]
    before, hidden = copy.deepcopy(layer), inputs.probe.clone()
    with torch.no_grad():
        state, _ = decide(layer, 0, spec, inputs, peaks, config)
    return before, state, layer, hidden, inputs.kwargs, spec


def assert_same(one: nn.Module, other: nn.Module) -> None:
    state = one.state_dict()
    assert other.state_dict().keys() == state.keys()
    for name, tensor in other.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_a_state_builds_the_layer_that_deciding_it_left(name, dtype):
    before, state, layer, hidden, kwargs, spec = decided(CASES[name], dtype)
    flat = LayerState.from_tensors(state.tensors(), spec)  # as a checkpoint keeps it
    with torch.no_grad():
        build_(before, spec, flat, CASES[name], dtype)
        assert torch.equal(layer_output(before, hidden, kwargs), layer_output(layer, hidden, kwargs))
    assert_same(before, layer)


@pytest.mark.parametrize("name", CASES)
def test_codes_build_it_too_without_the_weights_they_were_made_of(name):
    before, _, layer, hidden, kwargs, spec = decided(CASES[name], torch.float32)
    stored = LayerState(stored=True)
    for group in spec.groups:
        transform = layer.get_submodule(group.linears[0]).group.transform
        stored.groups[group.name] = GroupState(transform.scale, transform.rotations, transform.permutations)
        for path in group.linears:
            linear = layer.get_submodule(path)
            stored.weights[path] = linear.packed_codes or linear.plain
            before.get_submodule(path).weight = nn.Parameter(torch.empty(linear.weight.shape, device="meta"))
            before.get_submodule(path).bias = linear.bias
    for path in ("input_layernorm", "post_attention_layernorm"):  # their gains have taken up scales
        setattr(before, path, layer.get_submodule(path))
    with torch.no_grad():
        build_(before, spec, stored, CASES[name], torch.float32)
        assert torch.equal(layer_output(before, hidden, kwargs), layer_output(layer, hidden, kwargs))
    assert_same(before, layer)


def test_quantized_linears_are_made_in_one_place_beside_the_rounding_and_the_loading():
    makers = set()
    for package in ("duquant", "quantize", "models", "evaluation", "experiment", "reporting"):
        for path in (ROOT / package).rglob("*.py"):
            calls = [node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
            if any(getattr(call, "id", getattr(call, "attr", None)) == "QuantLinear" for call in calls):
                makers.add(str(path.relative_to(ROOT)))
    assert makers == {"duquant/skeleton.py", "quantize/build.py", "quantize/rounding.py"}
