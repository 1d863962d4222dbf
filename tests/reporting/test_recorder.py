"""The recorder: it changes nothing, and what it writes is what a direct computation gives."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from duquant.transform import DualTransform
from models import decoder_spec
from quantize.bits import BitSettings, ClipSettings
from quantize.observe import capture_input, layer_calls, layer_output
from quantize.observer import Observer
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import QuantSettings, SmoothSettings, TrainingSettings
from quantize.state import FinishedLayer
from quantize.statistics import channel_statistics
from reporting.recorder import (
    MOST_CHANNELS,
    MOST_TOKENS,
    QUANTILES,
    Recorder,
    bin_size,
    extreme,
    landscape,
    sqnr_db,
    stages_of,
    token_error,
)
from utils.io import read_tensors

CPU = torch.device("cpu")
TOKENS = random_tokens(4, 24)
ASSETS = ROOT / "assets"


def settings(learned: bool = False, smooth: bool = True, bits: tuple[int, int] = (4, 4), **changes) -> QuantSettings:
    return QuantSettings(
        BitSettings(*bits),
        ClipSettings(0.95, None if learned else 0.9),
        SmoothSettings() if smooth else None,
        rotation=RotationSettings(16, 12),
        training=TrainingSettings(epochs=1) if learned else None,
        **changes,
    )


def quantize(config: QuantSettings, folder: Path | None, finished=None):
    """Quantize the tiny model, with a recorder that writes into `folder`: it, its layers' figures, and their states."""
    model = tiny_model(num_hidden_layers=3)
    spec = decoder_spec(model.config)
    peaks = channel_statistics(model, spec, TOKENS, CPU).scales if config.smooth else None
    observers = [Kept(), *([] if folder is None else [Recorder(folder)])]
    figures = quantize_model(model, spec, TOKENS, peaks, config, CPU, finished, observers)
    return model, figures, observers[0].layers


class Kept(Observer):
    """Every layer's state, by index."""

    def __init__(self):
        self.layers: dict[int, FinishedLayer] = {}

    def layer_done(self, index: int, finished: FinishedLayer, restored: bool) -> None:
        self.layers[index] = finished


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(model, figures, folder) of a recorded run."""
    folder = tmp_path_factory.mktemp("recorded")
    return *quantize(settings(), folder)[:2], folder


@pytest.mark.parametrize("config", [settings(), settings(learned=True)], ids=["fixed", "learned"])
def test_recording_changes_no_bit_of_the_result(config, tmp_path):
    model, figures, states = quantize(config, tmp_path)
    plain_model, plain_figures, plain_states = quantize(config, None)
    expected = plain_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert all("recorded" not in layer for layer in plain_figures)
    for index, done in states.items():
        plain = plain_states[index].state.tensors()
        assert all(torch.equal(tensor, plain[name]) for name, tensor in done.state.tensors().items())
    for one, other in zip(figures, plain_figures, strict=True):
        assert one["groups"] == other["groups"]
        assert one["output_error"] == other["output_error"]
        assert one["recorded"]["groups"]


def test_every_group_of_every_layer_is_recorded_under_its_name(recorded):
    _, figures, folder = recorded
    assert [layer["recorded"]["file"] for layer in figures] == [f"layer_00{index}.safetensors" for index in range(3)]
    for layer in figures:
        tensors, metadata = read_tensors(folder / layer["recorded"]["file"])
        assert metadata == {"layer": str(layer["layer"])}
        for group in layer["recorded"]["groups"]:
            names = [stage["name"] for stage in group["stages"]]
            assert names == ["input", "smoothed", "rotation 1", "permutation 1", "rotation 2"]
            assert {f"{group['name']}/input/{name}" for name in names} <= tensors.keys()
            assert f"{group['name']}/error/transformed" in tensors


def test_the_output_and_its_error_are_those_of_the_first_sample_in_the_quantized_network(recorded):
    model, figures, _ = recorded
    original = tiny_model(num_hidden_layers=3)
    spec = decoder_spec(model.config)
    calls = layer_calls(original, spec, TOKENS, CPU)
    sample = calls.hidden[:1]
    for index, (quantized, full) in enumerate(zip(model.model.layers, original.model.layers, strict=True)):
        with torch.no_grad():
            found, reference = (layer_output(layer, sample, calls.kwargs[index]) for layer in (quantized, full))
        error = ((found - reference).norm() / reference.norm()).item()
        assert figures[index]["recorded"]["output_error"] == pytest.approx(error, rel=1e-4)
        assert figures[index]["recorded"]["output_sqnr_db"] == pytest.approx(-20 * math.log10(error), abs=0.01)
        sample = found


def test_the_last_stage_is_what_the_linears_round(recorded):
    model, figures, folder = recorded
    spec = decoder_spec(model.config)
    calls = layer_calls(tiny_model(num_hidden_layers=3), spec, TOKENS, CPU)
    tensors, _ = read_tensors(folder / "layer_000.safetensors")
    layer = model.model.layers[0]
    for group, found in zip(spec.groups, figures[0]["recorded"]["groups"], strict=True):
        linear = layer.get_submodule(group.linears[0])
        x = linear.group.transform(capture_input(layer, group.linears[0], calls.hidden[:1], calls.kwargs[0]))
        assert found["stages"][-1]["peak"] == pytest.approx(x.abs().max().item(), rel=1e-5)
        torch.testing.assert_close(tensors[f"{group.name}/input/rotation 2"], landscape(x))
        shown = layer.get_submodule(found["linear"])
        exact, rounded = (each[0] @ shown.weight.T for each in (x, linear.group.quantizer(x)))
        errors = (rounded - exact).norm(dim=1) / exact.norm(dim=1)
        torch.testing.assert_close(tensors[f"{group.name}/error/transformed"], errors, rtol=1e-3, atol=1e-5)
        noise = found["activation_noise"]["transformed"]
        assert noise["sqnr_db"] == pytest.approx(sqnr_db(exact, rounded - exact), abs=0.02)
        assert noise["worst_row"] == int(errors.argmax())


def test_the_search_is_recorded_with_the_step_that_was_kept(recorded):
    _, figures, folder = recorded
    for layer in figures:
        tensors, _ = read_tensors(folder / layer["recorded"]["file"])
        for group, found in zip(layer["groups"], layer["recorded"]["groups"], strict=True):
            assert [search["kept_step"] for search in found["searches"]] == list(group["steps"])
            for number, search in enumerate(found["searches"], start=1):
                trace = tensors[f"{found['name']}/search/rotation {number}"]
                assert (len(trace), trace.min().item()) == (13, search["kept"])


def test_without_rounding_any_activation_only_the_weights_noise_is_left(tmp_path):
    _, weights_only, _ = quantize(settings(bits=(4, 16)), tmp_path / "w4a16")
    first = weights_only[0]["recorded"]
    found = [each["output_sqnr_db"] for each in first["unrounded"]]
    assert found == pytest.approx([first["output_sqnr_db"]] * len(found), abs=1e-3)  # a Hadamard more or less
    assert {group["activation_noise"]["transformed"]["sqnr_db"] for group in first["groups"]} == {None}
    _, both, _ = quantize(settings(), tmp_path / "w4a4")
    # layer 0 gets the same sample, and its weights are rounded the same way
    everything = both[0]["recorded"]["unrounded"][-1]
    assert everything["output_sqnr_db"] > both[0]["recorded"]["output_sqnr_db"]
    assert everything["output_sqnr_db"] == pytest.approx(first["output_sqnr_db"], abs=1.5)


def test_layers_behind_resumed_ones_are_recorded_as_in_a_whole_run(recorded, tmp_path):
    kept = quantize(settings(), None)[2]
    _, resumed, _ = quantize(settings(), tmp_path, finished={index: kept[index] for index in (0, 1)})
    assert ["recorded" not in layer for layer in resumed] == [True, True, False]
    assert resumed[2]["recorded"] == recorded[1][2]["recorded"]


def test_learned_clipping_is_recorded_against_its_start(tmp_path):
    config = replace(settings(learned=True), training=TrainingSettings(epochs=6))
    _, figures, kept = quantize(config, tmp_path)
    clip, logits = figures[0]["recorded"]["groups"][3]["clip"], kept[0].state.clips["mlp.down_proj"]
    assert clip["start"] == pytest.approx(0.982, abs=1e-3)
    for side, logit in zip(("low", "high"), logits, strict=True):
        assert clip[side] == pytest.approx(torch.quantile(logit.sigmoid(), torch.tensor(QUANTILES)).tolist(), rel=1e-5)
    assert clip["low"][0] < clip["start"] < clip["low"][-1]
    assert all(group["weight_sqnr_db"] > 5 for group in figures[0]["recorded"]["groups"])


def test_a_run_without_transform_has_no_blocks_and_no_search(tmp_path):
    _, figures, _ = quantize(settings(smooth=False, transform=Transform.NONE), tmp_path)
    tensors, _ = read_tensors(tmp_path / "layer_000.safetensors")
    assert not [name for name in tensors if "/blocks/" in name or "/search/" in name]
    assert [stage["name"] for stage in figures[0]["recorded"]["groups"][0]["stages"]] == ["input"]


def test_the_bundled_models_planted_neurons_are_where_the_record_says(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-llama", local_files_only=True).requires_grad_(False)
    planted = json.loads((ASSETS / "tiny-llama/outliers.json").read_text())["massive"]
    config = QuantSettings(BitSettings(8, 8), transform=Transform.NONE)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-llama", local_files_only=True)
    text = (ASSETS / "stories/test.txt").read_text(encoding="utf-8")[:2000]
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :128]
    figures = quantize_model(
        model, decoder_spec(model.config), tokens, None, config, CPU, observers=[Recorder(tmp_path)]
    )
    for layer in figures:
        neurons = [neuron for each in planted if each["layer"] == layer["layer"] for neuron in each["neurons"]]
        assert layer["recorded"]["groups"][3]["stages"][0]["channel"] in neurons


@pytest.mark.parametrize("shape", [(3, 5), (64, 256), (65, 257), (200, 700)])
def test_a_landscape_holds_the_largest_entry_of_every_bin(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    row, channel = shape[0] * 2 // 3, shape[1] - 1
    x[row, channel] = -50.0
    found = landscape(x)
    tall, wide = bin_size(shape[0], MOST_TOKENS), bin_size(shape[1], MOST_CHANNELS)
    assert found.shape[0] <= MOST_TOKENS
    assert found.shape[1] <= MOST_CHANNELS
    assert found[row // tall, channel // wide] == 50
    for i, j in ((0, 0), (len(found) - 1, 0), (0, found.shape[1] - 1)):
        expected = x[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide].abs().max()
        assert found[i, j].float() == pytest.approx(expected.item(), rel=1e-2)


def test_the_extreme_is_found_with_its_place():
    x = torch.ones(1, 7, 9)
    x[0, 4, 2] = -30.0
    assert extreme(x) == {"peak": 30.0, "row": 4, "channel": 2, "peak_to_median": 30.0}
    assert extreme(torch.zeros(2, 2))["peak_to_median"] is None


def test_stages_begin_with_the_activation_before_smoothing_however_it_was_smoothed():
    x, scale = torch.randn(1, 5, 8), torch.rand(8) + 0.5
    none, permutations = torch.empty(0, 4, 4), torch.empty(0, 8, dtype=torch.int64)
    online = stages_of(x, DualTransform(none, permutations, scale), None)
    folded = stages_of(x / scale, DualTransform(none, permutations), scale)
    torch.testing.assert_close(online, folded)
    torch.testing.assert_close(online["input"], x)


def test_noise_figures_are_those_of_the_textbook():
    signal, noise = torch.full((2, 4), 10.0), torch.tensor([[1.0] * 4, [0.0] * 4])
    assert sqnr_db(signal, noise) == pytest.approx(20 + 10 * math.log10(2))
    assert sqnr_db(signal, torch.zeros_like(signal)) is None
    assert token_error(signal, noise).tolist() == pytest.approx([0.1, 0.0])
