"""Looking into a model: its layers run by hand give what the model gives, and nothing is left behind."""

import pytest
import torch
from conftest import random_tokens, tiny_model
from torch import Tensor, nn

from duquant.attention import install
from models import decoder_spec
from quantize import observe
from quantize.bits import BitSettings
from quantize.observe import (
    advance_,
    capture_input,
    head_logits,
    layer_calls,
    layer_output,
    layers_replaced,
    shell_on_device,
)
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationSettings
from quantize.settings import QuantSettings
from quantize.statistics import channel_statistics
from utils.errors import InputError

CPU = torch.device("cpu")
TOKENS = random_tokens(5, 12)
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def make_model(implementation: str = "sdpa", **changes) -> nn.Module:
    model = tiny_model(**changes)
    model.set_attn_implementation(implementation)
    return model


def spec_of(model: nn.Module):
    return decoder_spec(model.config)


def own_forwards(model: nn.Module) -> list[bool]:
    """Whether each layer has a `forward` of its own instead of its class's."""
    return ["forward" in vars(layer) for layer in model.model.layers]


def running_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("installed", [False, True], ids=["as loaded", "wrapper installed"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens_per_forward", [1, 24, 4096], ids=["one by one", "two by two", "all at once"])
def test_layers_run_by_hand_give_the_model_s_logits(implementation, tokens_per_forward, installed, monkeypatch):
    monkeypatch.setattr(observe, "TOKENS_PER_FORWARD", tokens_per_forward)
    model = make_model(implementation)
    with torch.no_grad():
        expected = model(TOKENS).logits
        if installed:
            install(model)
        calls = layer_calls(model, spec_of(model), TOKENS, CPU)
        for layer, kwargs in zip(model.model.layers, calls.kwargs, strict=True):
            advance_(layer, calls.hidden, kwargs, CPU)
        found = head_logits(model, spec_of(model), TOKENS, calls.hidden)
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_one_sample_through_the_layers_is_exact():
    model = make_model()
    with torch.no_grad():
        expected = model(TOKENS[:1]).logits
        calls = layer_calls(model, spec_of(model), TOKENS[:1], CPU)
        for layer, kwargs in zip(model.model.layers, calls.kwargs, strict=True):
            advance_(layer, calls.hidden, kwargs, CPU)
        assert torch.equal(head_logits(model, spec_of(model), TOKENS[:1], calls.hidden), expected)


def test_first_layer_inputs_are_the_embeddings_and_arguments_are_of_one_sample():
    model = make_model("eager")
    calls = layer_calls(model, spec_of(model), TOKENS, CPU)
    assert torch.equal(calls.hidden, model.get_input_embeddings()(TOKENS))
    assert len(calls.kwargs) == 2
    for kwargs in calls.kwargs:
        assert all(len(value) == 1 for value in kwargs["position_embeddings"])
        assert len(kwargs["attention_mask"]) == 1


def test_recording_runs_no_layer():
    model = make_model()
    ran = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(lambda *args: ran.append(1))
    layer_calls(model, spec_of(model), TOKENS, CPU)
    assert ran == []


def test_layers_get_their_own_forward_back():
    model = make_model()
    layer_calls(model, spec_of(model), TOKENS, CPU)
    assert own_forwards(model) == [False, False]


def test_layers_get_their_own_forward_back_after_an_exception():
    model = make_model()
    expected = model(TOKENS).logits

    def fail(index: int, hidden: Tensor, **kwargs) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), layers_replaced(model.model.layers, fail):
        model(TOKENS)
    assert own_forwards(model) == [False, False]
    assert torch.equal(model(TOKENS).logits, expected)


def test_replaced_layers_are_told_which_they_are():
    model, seen = make_model(), []
    with layers_replaced(model.model.layers, lambda index, hidden, **kwargs: seen.append(index) or hidden):
        model(TOKENS)
    assert seen == [0, 1]


def test_a_wrong_token_leaves_the_model_whole():
    model = make_model()
    with pytest.raises(IndexError):
        layer_calls(model, spec_of(model), TOKENS + 1000, CPU)
    assert own_forwards(model) == [False, False]
    assert len(model.model.layers) == 2


def test_advance_replaces_hidden_states_by_the_layer_s_outputs(monkeypatch):
    monkeypatch.setattr(observe, "TOKENS_PER_FORWARD", 24)
    model = make_model()
    calls = layer_calls(model, spec_of(model), TOKENS, CPU)
    layer, kwargs = model.model.layers[0], calls.kwargs[0]
    with torch.no_grad():
        expected = torch.cat([layer_output(layer, sample[None], kwargs) for sample in calls.hidden])
    storage = calls.hidden.data_ptr()
    advance_(layer, calls.hidden, kwargs, CPU)
    assert calls.hidden.data_ptr() == storage
    torch.testing.assert_close(calls.hidden, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("path", LINEARS)
def test_captured_input_is_what_a_hook_sees(path):
    model = make_model()
    layer, seen = model.model.layers[0], []
    calls = layer_calls(model, spec_of(model), TOKENS, CPU)
    handle = layer.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    assert torch.equal(capture_input(layer, path, calls.hidden, calls.kwargs[0]), seen[0])


def test_capturing_runs_nothing_downstream_and_leaves_no_hook():
    model = make_model()
    layer, ran = model.model.layers[0], []
    calls = layer_calls(model, spec_of(model), TOKENS, CPU)
    handles = [
        layer.get_submodule(path).register_forward_hook(lambda *args, path=path: ran.append(path)) for path in LINEARS
    ]
    capture_input(layer, "self_attn.o_proj", calls.hidden, calls.kwargs[0])
    assert ran == ["self_attn.q_proj"]
    for handle in handles:
        handle.remove()
    assert running_hooks(model) == 0


def test_a_linear_that_is_never_called_is_a_defect_with_a_name():
    model = make_model()
    layer = model.model.layers[0]
    layer.mlp.unused = nn.Linear(2, 2)
    calls = layer_calls(model, spec_of(model), TOKENS, CPU)
    with pytest.raises(RuntimeError, match=r"mlp\.unused is not called by LlamaDecoderLayer"):
        capture_input(layer, "mlp.unused", calls.hidden, calls.kwargs[0])
    assert running_hooks(model) == 0


def devices(module: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in module.parameters()}


def test_the_shell_moves_without_its_layers_and_gets_them_back_after_an_exception():
    model = make_model()
    layers = model.model.layers

    def look_and_fail() -> None:
        with shell_on_device(model, spec_of(model), torch.device("meta")):
            assert devices(model.model.embed_tokens) == devices(model.lm_head) == devices(model.model.norm) == {"meta"}
            assert model.model.layers is layers
            assert devices(layers) == {"cpu"}
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        look_and_fail()
    assert model.model.layers is layers


def test_the_shell_comes_back_to_the_host_and_layers_stay_where_they_are(monkeypatch):
    model = make_model()
    moves = []
    monkeypatch.setattr(model, "to", lambda device: moves.append((str(device), len(model.model.layers))))
    with shell_on_device(model, spec_of(model), torch.device("cuda:0")):
        assert len(model.model.layers) == 2
    assert moves == [("cuda:0", 0), ("cpu", 0)]
    assert len(model.model.layers) == 2


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("damaged", "named"),
    [
        ("mlp.gate_proj", r"model\.layers\.1\.mlp\.down_proj"),
        ("self_attn.v_proj", r"model\.layers\.1\.self_attn\.o_proj"),
        ("input_layernorm", r"model\.layers\.1\.self_attn\.q_proj"),
        ("post_attention_layernorm", r"model\.layers\.1\.mlp\.gate_proj"),
    ],
)
def test_activations_that_are_not_finite_are_named_by_layer_and_linear(damaged, named, damage):
    message = named + ": its calibration activation contains NaN or inf"
    config = QuantSettings(bits=BitSettings(8, 8), rotation=RotationSettings(block_size=16, steps=2))
    first, second = make_model(), make_model()
    for model in (first, second):
        model.model.layers[1].get_submodule(damaged).weight[..., 3] = damage
    with pytest.raises(InputError, match=message):
        channel_statistics(first, spec_of(first), TOKENS, CPU)
    with pytest.raises(InputError, match=message):
        quantize_model(second, spec_of(second), TOKENS, None, config, CPU)


def test_no_hook_is_left_behind_when_statistics_stop_at_a_broken_activation():
    model = make_model()
    model.model.layers[1].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError):
        channel_statistics(model, spec_of(model), TOKENS, CPU)
    assert running_hooks(model) == 0
