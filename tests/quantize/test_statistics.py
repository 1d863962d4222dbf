"""Activation statistics: equal to what hooks on a plain forward see, and the files they are kept in."""

from dataclasses import replace

import pytest
import torch
from conftest import random_tokens, tiny_model
from torch import Tensor, nn

from models import decoder_spec
from quantize import observe
from quantize.statistics import (
    ChannelStatistics,
    Origin,
    channel_statistics,
    load_scales,
    same_calibration,
    save_statistics,
)
from utils.errors import InputError
from utils.io import read_tensors, write_tensors

CPU = torch.device("cpu")
TOKENS = random_tokens(7, 10)
ORIGIN = Origin("some/model", "fingerprint of the model", "fingerprint of the data")
BROKEN = "model.layers.1.mlp.down_proj"


def statistics_of(model: nn.Module, tokens: Tensor = TOKENS) -> ChannelStatistics:
    return channel_statistics(model, decoder_spec(model.config), tokens, CPU)


def inputs_of_linears(model: nn.Module) -> dict[str, Tensor]:
    """What every linear of the decoder layers reads in one plain forward pass over all tokens: [N, T, C]."""
    seen, handles = {}, []
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            hook = module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
            handles.append(hook)
    with torch.no_grad():
        model(TOKENS)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture
def model() -> nn.Module:
    return tiny_model()


@pytest.fixture
def files(model, tmp_path):
    """Statistics of the model, and the two files they were saved in."""
    found = statistics_of(model)
    paths = tmp_path / "scales.safetensors", tmp_path / "shifts.safetensors"
    save_statistics(found, *paths, ORIGIN)
    return found, *paths


def test_scales_are_the_peaks_that_hooks_on_every_linear_see(model):
    seen, found = inputs_of_linears(model), statistics_of(model)
    assert found.scales.keys() == seen.keys()
    assert len(seen) == 2 * 7
    for name, x in seen.items():
        torch.testing.assert_close(found.scales[name], x.abs().amax(dim=(0, 1)), atol=0, rtol=1e-5)


def test_shifts_are_the_running_midpoint_in_the_order_of_samples(model):
    for name, x in inputs_of_linears(model).items():
        expected = None
        for sample in x:
            midpoint = (sample.amax(dim=0) + sample.amin(dim=0)) / 2
            expected = midpoint if expected is None else 0.99 * expected + 0.01 * midpoint
        found = statistics_of(model).shifts[name]
        torch.testing.assert_close(found, expected, atol=1e-5 * x.abs().max().item(), rtol=0)
    assert found.shape == (80,)


def test_the_first_sample_counts_most_and_the_order_of_samples_matters(model):
    forwards, backwards = statistics_of(model).shifts[BROKEN], statistics_of(model, TOKENS.flip(0)).shifts[BROKEN]
    first = statistics_of(model, TOKENS[:1]).shifts[BROKEN]
    assert (forwards - first).norm() < (backwards - first).norm() / 5


@pytest.mark.parametrize("tokens_per_forward", [1, 20, 30, 1000])
def test_statistics_do_not_depend_on_batching(model, tokens_per_forward, monkeypatch):
    expected = statistics_of(model)
    monkeypatch.setattr(observe, "TOKENS_PER_FORWARD", tokens_per_forward)
    found = statistics_of(model)
    for name in expected.scales:
        tolerance = {"atol": 1e-5 * expected.scales[name].max().item(), "rtol": 0}
        torch.testing.assert_close(found.scales[name], expected.scales[name], **tolerance)
        torch.testing.assert_close(found.shifts[name], expected.shifts[name], **tolerance)


def test_a_batch_that_runs_out_of_memory_half_way_counts_once(model, monkeypatch):
    with monkeypatch.context() as one_by_one:
        one_by_one.setattr(observe, "TOKENS_PER_FORWARD", 1)
        expected = statistics_of(model)

    def fill_memory(module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(fill_memory)
    found = statistics_of(model)
    for name in expected.scales:
        assert torch.equal(found.scales[name], expected.scales[name])
        assert torch.equal(found.shifts[name], expected.shifts[name])


def test_the_model_is_left_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    statistics_of(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_half_precision_activations_give_float32_statistics():
    found = statistics_of(tiny_model(torch.bfloat16))
    assert {value.dtype for value in (*found.scales.values(), *found.shifts.values())} == {torch.float32}


def test_large_finite_float16_activations_are_not_taken_for_infinite():
    """A channel that is always above 32752: its largest plus its smallest value is beyond float16, neither is."""
    model = tiny_model(torch.float16, num_hidden_layers=1)
    layer, embedding = model.model.layers[0], model.get_input_embeddings().weight
    embedding.copy_(torch.eye(1, 48).expand_as(embedding))  # channel 0 alone, so the norm makes it √48
    layer.input_layernorm.weight[0] = 40000 / 48**0.5
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        linear.weight.zero_()
    scales = statistics_of(model).scales["model.layers.0.self_attn.q_proj"]
    assert scales[0].item() == pytest.approx(40000, rel=1e-2)


def test_saved_statistics_come_back(files, model):
    found, scales_path, shifts_path = files
    scales = load_scales(scales_path, ORIGIN, model, decoder_spec(model.config))
    assert scales.keys() == found.scales.keys()
    assert all(torch.equal(scales[name], found.scales[name]) for name in scales)
    shifts, metadata = read_tensors(shifts_path)
    assert all(torch.equal(shifts[name], found.shifts[name]) for name in found.shifts)
    assert metadata == ORIGIN.metadata()


def test_a_model_without_weights_is_enough_to_check_a_file(files, model):
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert load_scales(files[1], ORIGIN, skeleton, decoder_spec(model.config)).keys() == files[0].scales.keys()


def test_other_calibration_data_is_noticed_and_allowed(files, model):
    other = replace(ORIGIN, data="other data")
    assert same_calibration(files[1], ORIGIN)
    assert same_calibration(files[1], replace(ORIGIN, model_name="the same model under another name"))
    assert not same_calibration(files[1], other)
    assert not same_calibration(files[1], replace(ORIGIN, model="another model"))
    load_scales(files[1], other, model, decoder_spec(model.config))


def test_another_model_s_file_is_refused(files, model):
    other = replace(ORIGIN, model_name="other/model", model="another fingerprint")
    with pytest.raises(InputError, match=r"--act-scales .*scales\.safetensors: made of some/model, .*other/model"):
        load_scales(files[1], other, model, decoder_spec(model.config))


def refused_after(change, files, model) -> str:
    """The error for the scales as `change` leaves them, in a file without metadata."""
    scales = dict(files[0].scales)
    change(scales)
    write_tensors(files[1], scales)
    with pytest.raises(InputError) as caught:
        load_scales(files[1], ORIGIN, model, decoder_spec(model.config))
    return str(caught.value)


def test_a_missing_linear_is_named(files, model):
    error = refused_after(lambda scales: scales.pop(BROKEN), files, model)
    assert error == f"--act-scales {files[1]}: not of this model ({BROKEN} is missing)"


def test_another_width_is_named(files, model):
    error = refused_after(lambda scales: scales.update({BROKEN: torch.ones(79)}), files, model)
    assert error == f"--act-scales {files[1]}: not of this model ({BROKEN} has shape [79], not [80])"


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named(files, model, damage):
    error = refused_after(lambda scales: scales.update({BROKEN: torch.full((80,), damage)}), files, model)
    assert error.startswith(f"--act-scales {files[1]}: {BROKEN} contains NaN or inf")


def test_a_file_of_another_format_is_refused(model, tmp_path):
    torch.save({BROKEN: torch.ones(80)}, tmp_path / "scales.pt")
    with pytest.raises(InputError, match=r"scales\.pt: not a readable safetensors file"):
        load_scales(tmp_path / "scales.pt", ORIGIN, model, decoder_spec(model.config))
