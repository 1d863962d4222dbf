"""The walk over the layers, on every kind of decoder layer that is supported."""

import copy
import itertools
import json
import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import families
import pytest
import torch
from conftest import VOCABULARY, random_tokens, tiny_config, tiny_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, PretrainedConfig

from duquant.attention import install
from duquant.linear import GroupInput, QuantLinear
from duquant.quantizer import NoClip
from models import decoder_spec
from quantize.bits import BitSettings, ClipSettings
from quantize.inputs import LayerInputs
from quantize.layer import decide
from quantize.observe import layer_calls
from quantize.observer import LayerLog, describe_group
from quantize.quantization import PROBE_SAMPLES, check_shapes, make_probe, other_blocks, quantize_model
from quantize.rotation_settings import GivenSize, RotationOrder, RotationSettings, SearchRule, Transform
from quantize.scales import group_peaks, smoothing_scales
from quantize.settings import Probe, QuantSettings, SmoothSettings, WeightPeak
from quantize.state import FinishedLayer, LayerState
from quantize.statistics import channel_statistics
from utils.errors import InputError

CPU = torch.device("cpu")
TOKENS = random_tokens(6, 24)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def mistral_config() -> MistralConfig:
    """Llama's tiny config with a window shorter than the calibration samples."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shared = {name: getattr(tiny_config(), name) for name in (*names, "head_dim", "max_position_embeddings")}
    return MistralConfig(vocab_size=VOCABULARY, sliding_window=7, tie_word_embeddings=False, **shared)


CONFIGS = {
    "llama, GQA": tiny_config(),
    "llama, no GQA": tiny_config(num_key_value_heads=6),
    "llama, biases": tiny_config(attention_bias=True, mlp_bias=True),
    "llama, biases, no GQA": tiny_config(attention_bias=True, mlp_bias=True, num_key_value_heads=6),
    "llama, scaled rope": tiny_config(rope_parameters=LLAMA3_ROPE),
    "mistral, sliding window": mistral_config(),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make_model(config: PretrainedConfig | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights, an outlier channel behind every norm, and biases that are not zero."""
    config = copy.deepcopy(config or CONFIGS["llama, GQA"])
    torch.manual_seed(0)
    model = (MistralForCausalLM if isinstance(config, MistralConfig) else LlamaForCausalLM)(config)
    model = model.to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
            parameter[3] *= 20
        elif name.endswith("bias"):
            parameter.normal_(std=0.3)
        else:
            parameter.mul_(4)
    return model


def settings(wbits: int = 4, abits: int = 4, alpha: float | None = 0.6, **changes) -> QuantSettings:
    smooth = None if alpha is None else SmoothSettings(alpha)
    rotation = RotationSettings(block_size=16, steps=24)
    return replace(QuantSettings(bits=BitSettings(wbits, abits), smooth=smooth, rotation=rotation), **changes)


def quantize(model: nn.Module, config: QuantSettings, tokens: Tensor = TOKENS):
    """Quantize a copy; return it with the figures."""
    model = copy.deepcopy(model)
    spec = decoder_spec(model.config)
    peaks = None if config.smooth is None else channel_statistics(model, spec, tokens, CPU).scales
    return model, [readable(figures) for figures in quantize_model(model, spec, tokens, peaks, config, CPU)]


def readable(figures: dict) -> SimpleNamespace:
    """Figures as they come back from JSON, with attributes for keys."""
    return json.loads(json.dumps(figures, allow_nan=False), object_hook=lambda fields: SimpleNamespace(**fields))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def same_parameters(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules have the same tensors, codes and all, to the bit."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def linear_paths(model: nn.Module) -> set[str]:
    return {path for group in decoder_spec(model.config).groups for path in group.linears}


@every_config
@pytest.mark.parametrize("times", [0, 1, 2])
def test_smoothing_and_rotating_without_rounding_change_nothing(config, times):
    model = make_model(config, torch.float64)
    rotation = RotationSettings(block_size=16, steps=24, permutation_times=times)
    transformed, _ = quantize(model, settings(16, 16, rotation=rotation))
    assert relative_error(logits(transformed), logits(model)) < 3e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"smooth": SmoothSettings(0.6, WeightPeak.GROUP)},
        {"smooth": SmoothSettings(0.0)},
        {"smooth": SmoothSettings(1.0)},
        {"smooth": None},
        *({"transform": transform} for transform in Transform if transform is not Transform.DUAL),
        {"transform": Transform.NONE, "smooth": None},
        {"probe": Probe.SAMPLE},
        {"rotation": RotationSettings(block_size=None, steps=8)},
        {"rotation": RotationSettings(block_size=-1, steps=8)},
        {"rotation": RotationSettings(block_size=8, steps=8, rule=SearchRule.ROW, order=RotationOrder.QR)},
        {"rotation": RotationSettings(block_size=8, steps=0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama, GQA", "llama, biases, no GQA"])
def test_no_setting_changes_an_unquantized_model(name, changes):
    model = make_model(CONFIGS[name], torch.float64)
    transformed, _ = quantize(model, settings(16, 16, **changes))
    assert relative_error(logits(transformed), logits(model)) < 3e-6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_both_attention_implementations_are_left_exact(implementation):
    model = make_model(dtype=torch.float64)
    model.set_attn_implementation(implementation)
    transformed, _ = quantize(model, settings(16, 16))
    assert relative_error(logits(transformed), logits(model)) < 3e-6


@every_config
def test_every_linear_of_every_layer_is_replaced_and_rounded_for_good(config):
    model, _ = quantize(make_model(config), settings())
    for layer in model.model.layers:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, QuantLinear)}
        assert linears.keys() == linear_paths(model)
        assert all(linear.packed_codes is not None for linear in linears.values())
        assert not any(isinstance(module, nn.Linear) for module in layer.modules())
        assert layer.self_attn.qkv_quantizer is not None
    assert isinstance(model.lm_head, nn.Linear)


@every_config
def test_linears_of_a_group_share_their_input(config):
    model, _ = quantize(make_model(config), settings())
    for layer in model.model.layers:
        groups = [
            {id(layer.get_submodule(path).group) for path in group.linears}
            for group in decoder_spec(model.config).groups
        ]
        assert [len(found) for found in groups] == [1, 1, 1, 1]
        assert len(set.union(*groups)) == 4


@every_config
def test_eight_bits_come_close_and_four_bits_less_so(config):
    model = make_model(config)
    errors = [relative_error(logits(quantize(model, settings(bits, bits))[0]), logits(model)) for bits in (8, 4)]
    assert errors[0] < 0.05
    assert errors[0] < errors[1] < 1


def test_every_ingredient_lowers_the_error_of_four_bits_on_outliers():
    model = make_model()
    plain = settings(4, 4, None, transform=Transform.NONE)
    ways = [plain, settings(4, 4, 0.5, transform=Transform.NONE), settings(4, 4, 0.5)]
    rounded, smoothed, rotated = (relative_error(logits(quantize(model, way)[0]), logits(model)) for way in ways)
    assert rotated < smoothed < rounded


@pytest.mark.parametrize(("group_size", "symmetric"), [(None, False), (8, False), (None, True)])
def test_rounded_weights_take_no_more_values_than_their_bits_allow(group_size, symmetric):
    model, _ = quantize(make_model(), settings(bits=BitSettings(3, 4, group_size, symmetric)))
    for path in linear_paths(model):
        weight = model.model.layers[1].get_submodule(path).weight
        assert max(len(chunk.unique()) for row in weight for chunk in row.split(group_size or len(row))) <= 2**3
        assert (len(weight[0].unique()) > 2**3) == (group_size is not None)
        if symmetric:  # the largest magnitude is three whole steps from zero
            steps = weight / (weight.abs().amax(dim=1, keepdim=True) / 3)
            torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("wbits", "abits"), [(4, 16), (16, 4)])
def test_sixteen_bits_leave_one_side_unquantized(wbits, abits):
    model, _ = quantize(make_model(), settings(wbits, abits))
    layer = model.model.layers[0]
    for path in linear_paths(model):
        linear = layer.get_submodule(path)
        assert isinstance(linear.group.quantizer, nn.Identity) == (abits == 16)
        assert (len(linear.weight[0].unique()) > 16) == (linear.packed_codes is None) == (wbits == 16)
    attention = layer.self_attn.qkv_quantizer
    for quantizer in (attention.query, attention.key, attention.value):
        assert isinstance(quantizer, nn.Identity) == (abits == 16)


def test_clip_ratios_reach_what_they_are_for():
    layer = quantize(make_model(), settings(clip=ClipSettings(activation_ratio=0.9)))[0].model.layers[0]
    assert layer.mlp.down_proj.group.quantizer.clip.ratio == 0.9
    assert layer.self_attn.qkv_quantizer.query.clip.ratio == 0.9
    assert layer.self_attn.qkv_quantizer.key.clip.ratio == 0.9
    assert isinstance(layer.self_attn.qkv_quantizer.value.clip, NoClip)
    widths = []
    for ratio in (None, 0.5):
        model, _ = quantize(make_model(), settings(4, 16, clip=ClipSettings(weight_ratio=ratio)))
        low, high = model.model.layers[0].self_attn.q_proj.weight.aminmax(dim=1)
        widths.append(high - low)
    torch.testing.assert_close(widths[1], widths[0] / 2, atol=0, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_stays_one_and_comes_close(dtype):
    model = make_model()
    expected = logits(model)
    half, reports = quantize(copy.deepcopy(model).to(dtype), settings(8, 8))
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert all(transform.rotations.dtype == torch.float32 for transform in transforms_of(half))
    assert relative_error(logits(half).float(), expected) < 0.05
    assert all(0 < report.output_error < 0.05 for report in reports)


def transforms_of(model: nn.Module) -> list[nn.Module]:
    return [module.group.transform for module in model.modules() if isinstance(module, QuantLinear)]


@every_config
def test_quantizing_twice_gives_the_same_to_the_bit(config):
    model = make_model(config)
    first, first_reports = quantize(model, settings())
    torch.manual_seed(4321)
    torch.randn(7)
    second, second_reports = quantize(model, settings())
    assert same_parameters(first, second)
    assert first_reports == second_reports
    assert torch.equal(logits(first), logits(second))


def test_another_seed_finds_other_rotations():
    model = make_model()
    first, second = (quantize(model, settings(seed=seed))[0] for seed in (2, 3))
    for one, other in zip(transforms_of(first), transforms_of(second), strict=True):
        assert not torch.equal(one.rotations, other.rotations)


def test_every_layer_and_group_has_rotations_of_its_own():
    model, _ = quantize(make_model(), settings())
    found = {id(transform): transform.rotations for transform in transforms_of(model)}.values()
    assert len(found) == 8
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(found, 2))


def test_a_layer_s_result_depends_on_its_arguments_alone():
    """Layer 1 by itself, in a process where nothing was quantized, against layer 1 after other work and noise."""
    model = make_model()
    spec = decoder_spec(model.config)
    peaks = channel_statistics(model, spec, TOKENS, CPU).scales
    install(model)
    calls = layer_calls(model, spec, TOKENS, CPU)

    def inputs() -> LayerInputs:
        return LayerInputs(make_probe(calls.hidden, Probe.MEAN), calls.kwargs[1])

    alone, alone_inputs = copy.deepcopy(model.model.layers[1]), inputs()
    _, alone_report = decide(alone, 1, spec, alone_inputs, peaks, settings())

    torch.manual_seed(999)
    quantize(make_model(CONFIGS["llama, biases"]), settings(3, 3))
    zeroth = copy.deepcopy(model.model.layers[0])
    decide(zeroth, 0, spec, inputs(), peaks, settings())
    later, later_inputs = copy.deepcopy(model.model.layers[1]), inputs()
    _, later_report = decide(later, 1, spec, later_inputs, peaks, settings())
    assert same_parameters(alone, later)
    assert torch.equal(alone_inputs.probe, later_inputs.probe)
    assert alone_report == later_report


def test_statistics_and_calibration_arguments_are_left_alone():
    model = make_model()
    spec = decoder_spec(model.config)
    peaks = channel_statistics(model, spec, TOKENS, CPU).scales
    before = {name: peak.clone() for name, peak in peaks.items()}
    calls = layer_calls(model, spec, TOKENS, CPU)
    probe = calls.hidden.clone()
    decide(model.model.layers[0], 0, spec, LayerInputs(probe, calls.kwargs[0]), peaks, settings())
    assert all(torch.equal(peak, before[name]) for name, peak in peaks.items())
    assert torch.equal(probe, calls.hidden)


@every_config
def test_smoothing_goes_where_the_config_says(config):
    shared_heads = config.num_key_value_heads != config.num_attention_heads
    model, reports = quantize(make_model(config), settings(16, 16))
    o_scale = "online" if shared_heads else "folded into self_attn.v_proj"
    for report in reports:
        assert [group.scale for group in report.groups] == [
            "folded into input_layernorm",
            o_scale,
            "folded into post_attention_layernorm",
            "folded into mlp.up_proj",
        ]
    for layer in model.model.layers:
        online = {path for path in linear_paths(model) if layer.get_submodule(path).group.transform.scale is not None}
        assert online == ({"self_attn.o_proj"} if shared_heads else set())


def test_smoothing_scale_looks_at_the_representative_or_at_the_whole_group():
    model = make_model()
    spec = decoder_spec(model.config)
    peaks = channel_statistics(model, spec, TOKENS, CPU).scales
    layer = model.model.layers[0]
    layer.self_attn.k_proj.weight[:, 5] *= 100
    found = {}
    for kind in WeightPeak:
        found[kind] = smoothing_scales(layer, spec, group_peaks(0, spec, peaks), SmoothSettings(0.5, weight_peak=kind))
        weights = [layer.self_attn.q_proj.weight]
        if kind is WeightPeak.GROUP:
            weights += [layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
        peak = torch.cat(weights).abs().amax(dim=0)
        expected = (peaks["model.layers.0.self_attn.q_proj"] / peak).sqrt()
        torch.testing.assert_close(found[kind]["qkv"], expected, atol=0, rtol=1e-5)
    representative, group = found[WeightPeak.REPRESENTATIVE], found[WeightPeak.GROUP]
    assert group["qkv"][5] < representative["qkv"][5] / 5
    assert torch.equal(group["down"], representative["down"])


@every_config
def test_no_bias_is_created_and_none_is_lost(config):
    model = make_model(config)
    before = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    quantized, _ = quantize(model, settings())
    assert {name for name, _ in quantized.named_parameters() if name.endswith("bias")} == before
    assert bool(before) == bool(getattr(config, "attention_bias", False))


def test_mean_probe_is_one_sample_and_sample_probe_is_the_first_few():
    hidden = torch.randn(7, 5, 8)
    torch.testing.assert_close(make_probe(hidden, Probe.MEAN), hidden.mean(dim=0, keepdim=True))
    sample = make_probe(hidden, Probe.SAMPLE)
    assert torch.equal(sample, hidden[:PROBE_SAMPLES])
    assert sample.data_ptr() != hidden.data_ptr()
    assert make_probe(hidden[:2], Probe.SAMPLE).shape == (2, 5, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mean_probe_of_half_precision_samples_is_summed_in_float32(dtype):
    hidden = torch.full((64, 1, 2), 3000.0, dtype=dtype)
    probe = make_probe(hidden, Probe.MEAN)
    assert probe.dtype == dtype
    assert torch.equal(probe, hidden[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_mean_probe_needs_no_wide_copy_of_the_samples(dtype):
    hidden = torch.randn(32, 16, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        probe = make_probe(hidden, Probe.MEAN)
    allocated = max(event.cpu_memory_usage for event in watched.events())
    assert 0 < allocated <= 4 * hidden[0].numel()
    wide = hidden.mean(dim=0, keepdim=True, dtype=torch.float32)
    torch.testing.assert_close(probe, wide.to(dtype), atol=1e-7, rtol=torch.finfo(dtype).eps)
    assert dtype is not torch.float32 or torch.equal(probe, wide)


def test_the_kind_of_probe_decides_the_rotations():
    models = [quantize(make_model(), settings(probe=probe))[0] for probe in Probe]
    for number, model in enumerate(models):
        assert not any(same_parameters(model, other) for other in models[:number])


@pytest.mark.parametrize(("block_size", "expected"), [(None, [48, 96, 48, 80]), (-1, [48, 96, 48, 80]), (8, [8] * 4)])
def test_block_sizes_follow_the_width_of_each_group(block_size, expected):
    rotation = RotationSettings(block_size=block_size, steps=4)
    model, reports = quantize(make_model(), settings(rotation=rotation))
    for report in reports:
        assert [group.block_size for group in report.groups] == expected
    first = model.model.layers[0]
    sizes = [
        first.get_submodule(group.linears[0]).group.transform.rotations.shape[-1] for group in decoder_groups(model)
    ]
    assert sizes == expected


def decoder_groups(model: nn.Module):
    return decoder_spec(model.config).groups


def test_auto_block_size_stays_within_its_limit():
    wide = make_model(tiny_config(intermediate_size=320))
    _, reports = quantize(wide, settings(rotation=RotationSettings(block_size=None, steps=4)))
    assert [group.block_size for group in reports[0].groups] == [48, 96, 48, 80]


def test_a_block_size_that_does_not_divide_stops_before_anything_is_changed():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    config = settings(rotation=RotationSettings(block_size=24))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj: 80 input channels .*--block_size 24"):
        quantize_model(model, decoder_spec(model.config), TOKENS, None, config, CPU)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shapes_are_checked_without_weights():
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(tiny_config())
    check_shapes(skeleton, decoder_spec(skeleton.config), settings())
    with pytest.raises(InputError, match="--block_size 32"):
        check_shapes(skeleton, decoder_spec(skeleton.config), settings(rotation=RotationSettings(block_size=32)))


WIDE = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 24}  # q, k, v, gate and up 128; o 96; down 80


def test_without_a_block_size_every_width_that_128_does_not_divide_has_what_auto_gives_it():
    wide = make_model(tiny_config(**WIDE))
    found = {}
    for size in (128, None):
        model, reports = quantize(wide, settings(rotation=RotationSettings(block_size=size, steps=4)))
        found[size] = logits(model), [group.block_size for group in reports[0].groups]
    assert found[128][1] == found[None][1] == [128, 96, 128, 80]
    assert torch.equal(found[128][0], found[None][0])


def test_without_a_block_size_widths_that_128_divides_have_what_128_gives_them():
    model = make_model(tiny_config(hidden_size=256, head_dim=64, num_attention_heads=4, intermediate_size=384))
    assert other_blocks(model, decoder_spec(model.config), settings(rotation=RotationSettings())) is None
    made = [settings(rotation=RotationSettings(size, steps=4)) for size in (128, GivenSize(128))]
    usual, named = (quantize(model, each) for each in made)
    assert [group.block_size for group in usual[1][0].groups] == [128] * 4
    assert torch.equal(logits(usual[0]), logits(named[0]))


def test_it_is_said_which_linears_have_other_blocks_than_usual():
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(tiny_config(**WIDE))
    spec = decoder_spec(skeleton.config)
    usual = settings(rotation=RotationSettings())
    assert other_blocks(skeleton, spec, usual) == (
        "block size 128 does not divide every width: it is 80 for 80 channels (model.layers.0.mlp.down_proj, …), "
        "96 for 96 channels (model.layers.0.self_attn.o_proj, …)"
    )
    for silent in (
        settings(16, 16, rotation=RotationSettings()),
        settings(rotation=RotationSettings(), transform=Transform.NONE),
        settings(rotation=RotationSettings(None)),
        settings(rotation=RotationSettings(16)),
    ):
        assert other_blocks(skeleton, spec, silent) is None


@pytest.mark.parametrize("times", [0, 2])
def test_reports_hold_every_layer_group_stage_and_step(times):
    rotation = RotationSettings(block_size=16, steps=24, permutation_times=times)
    _, reports = quantize(make_model(), settings(rotation=rotation))
    assert [report.layer for report in reports] == [0, 1]
    turns = [name for index in range(1, times + 1) for name in (f"rotation {index}", f"permutation {index}")]
    for report in reports:
        assert 0 < report.output_error < 1
        assert [group.name for group in report.groups] == ["qkv", "o", "gate_up", "down"]
        for group in report.groups:
            names = ["input", "smoothed", *turns, f"rotation {times + 1}"]
            assert [stage.name for stage in group.stages] == names
            assert len(group.steps) == times + 1
            assert all(0 <= steps <= 24 for steps in group.steps)
            assert all(stage.peak > 0 for stage in group.stages)


def test_reports_without_smoothing_and_transform_hold_the_input_alone():
    _, reports = quantize(make_model(), settings(alpha=None, transform=Transform.NONE))
    for group in reports[0].groups:
        assert [stage.name for stage in group.stages] == ["input"]
        assert (group.steps, group.scale) == ([], "none")


def test_reported_input_peak_does_not_depend_on_smoothing():
    """The probe before smoothing, although the layer's own norm has already divided it."""
    model = make_model()
    (plain, *_), (smoothed, *_) = (quantize(model, settings(16, 16, alpha))[1] for alpha in (None, 0.6))
    for one, other in zip(plain.groups, smoothed.groups, strict=True):
        assert other.stages[0].peak == pytest.approx(one.stages[0].peak, rel=1e-4)
        assert other.stages[1].peak < other.stages[0].peak


def test_output_error_is_that_of_the_layer_on_the_probe():
    _, exact = quantize(make_model(dtype=torch.float64), settings(16, 16))
    assert all(report.output_error < 1e-6 for report in exact)
    errors = [quantize(make_model(), settings(bits, bits))[1][0].output_error for bits in (3, 4, 8)]
    assert errors[0] > errors[1] > errors[2] > 1e-4


def test_reports_go_into_json_and_back():
    model = make_model()
    figures = quantize_model(model, decoder_spec(model.config), TOKENS, None, settings(alpha=None), CPU)
    back = json.loads(json.dumps(figures, allow_nan=False))
    assert back[1]["groups"][3]["stages"][0] == figures[1]["groups"][3]["stages"][0]
    assert back[0]["groups"][0]["steps"] == list(figures[0]["groups"][0]["steps"])


def test_a_log_line_tells_the_story_of_a_group(caplog):
    _, reports = quantize(make_model(), settings())
    with caplog.at_level(logging.INFO, logger="quantize.observer"):
        told = json.loads(json.dumps(reports, default=vars))
        for report in told:
            LayerLog().layer_done(report["layer"], FinishedLayer(LayerState(), report), restored=False)
    assert len(caplog.messages) == 2 * (4 + 1)
    group = reports[1].groups[3]
    line = describe_group(told[1]["groups"][3])
    assert f"layer 1 down: {line}" in caplog.messages
    assert line.startswith(f"peak input {group.stages[0].peak:.4g} → smoothed ")
    assert f"({group.steps[0]} steps)" in line
    assert f"({group.steps[1]} steps)" in line
    assert line.endswith("scale folded into mlp.up_proj")
    assert caplog.messages[-1] == f"layer 1: relative output error {reports[1].output_error:.4f}"


def test_a_layer_is_searched_on_what_the_quantized_layers_before_it_produce():
    """The second layer's probe has gone through the quantized first layer, not the original one."""
    model = make_model()
    coarse, fine = (quantize(model, settings(bits, bits))[1] for bits in (2, 16))
    assert coarse[0].groups[0].stages[0].peak == pytest.approx(fine[0].groups[0].stages[0].peak, rel=1e-6)
    assert coarse[1].groups[0].stages[0].peak != pytest.approx(fine[1].groups[0].stages[0].peak, rel=1e-3)


def test_without_smoothing_no_statistics_are_needed():
    model = tiny_model()
    reports = quantize_model(model, decoder_spec(model.config), TOKENS, None, settings(alpha=None), CPU)
    assert len(reports) == 2


def attention_quantizers(**bits) -> nn.Module:
    made, _ = quantize(make_model(), settings(bits=BitSettings(4, 4, **bits)))
    return made.model.layers[1].self_attn.qkv_quantizer


@pytest.mark.parametrize("role", ["query", "key", "value"])
def test_bits_of_a_role_reach_its_quantizer_and_no_other(role):
    quantizers = attention_quantizers(**{role: 6})
    for each in ("query", "key", "value"):
        assert getattr(quantizers, each).format.bits == (6 if each == role else 4)


@pytest.mark.parametrize("role", ["query", "key", "value"])
def test_sixteen_bits_leave_one_role_alone(role):
    quantizers = attention_quantizers(**{role: 16})
    inputs = {each: torch.randn(1, 2, 5, 16) for each in ("query", "key", "value")}
    for each, found in zip(inputs, quantizers(*inputs.values()), strict=True):
        exact = inputs[each] if each == "value" else inputs[each] @ quantizers.matrix
        assert torch.equal(found, exact) == (each == role)


def test_groups_and_symmetry_of_activations_reach_the_inputs_of_linears():
    bits = BitSettings(4, 4, act_group_size=8, act_symmetric=True)
    layer = quantize(make_model(), settings(bits=bits))[0].model.layers[0]
    for path in linear_paths_of(layer):
        quantizer = layer.get_submodule(path).group.quantizer
        assert (quantizer.group_size, quantizer.format.symmetric) == (8, True)
        assert not layer.get_submodule(path).format.symmetric
    quantizers = layer.self_attn.qkv_quantizer
    for each in (quantizers.query, quantizers.key, quantizers.value):
        assert (each.group_size, each.format.symmetric) == (None, True)


def linear_paths_of(layer: nn.Module) -> list[str]:
    return [path for path, module in layer.named_modules() if isinstance(module, QuantLinear)]


def test_clips_of_keys_and_values_reach_them():
    clip = ClipSettings(activation_ratio=0.9, kv_ratio=0.7)
    quantizers = quantize(make_model(), settings(clip=clip))[0].model.layers[0].self_attn.qkv_quantizer
    found = [each.clip.ratio for each in (quantizers.query, quantizers.key, quantizers.value)]
    assert found == [0.9, 0.7, 0.7]


def test_an_activation_group_size_that_does_not_divide_names_the_linear():
    model = make_model()
    config = settings(bits=BitSettings(4, 4, act_group_size=32))
    with pytest.raises(InputError, match=r"q_proj: 48 input channels do not divide by --act_group_size 32"):
        quantize_model(model, decoder_spec(model.config), TOKENS, None, config, CPU)


def inputs_computed(model: nn.Module) -> Counter:
    """How often each layer transformed and rounded an input in one forward pass."""
    counts, handles = Counter(), []
    for index, layer in enumerate(model.model.layers):
        shared = [each for each in layer.modules() if isinstance(each, GroupInput)]
        count = partial(lambda index, *_: counts.update([index]), index)
        handles += [each.quantizer.register_forward_hook(count) for each in shared]
    logits(model)
    for handle in handles:
        handle.remove()
    return counts


@every_config
def test_a_layer_transforms_and_rounds_four_inputs_for_its_seven_linears(config):
    model, _ = quantize(make_model(config), settings())
    assert inputs_computed(model) == {0: 4, 1: 4}
    assert inputs_computed(model) == {0: 4, 1: 4}


def test_a_mixture_transforms_and_rounds_two_inputs_of_attention_and_two_of_every_expert_called():
    model, _ = families.quantize(families.make_model("mixtral"), families.settings())
    called = []
    for layer in model.model.layers:
        for expert in layer.mlp.experts:
            expert.register_forward_hook(lambda *_, index=layer.self_attn.layer_idx: called.append(index))
    counts = inputs_computed(model)
    experts = Counter(called)
    assert min(experts.values()) > 1
    assert counts == {index: 2 + 2 * count for index, count in experts.items()}


def test_between_layers_nothing_of_an_input_is_held():
    model, _ = quantize(make_model(), settings())
    logits(model)
    shared = [module for module in model.modules() if isinstance(module, GroupInput)]
    assert len(shared) == 8
    assert not any(isinstance(value, Tensor) for each in shared for value in vars(each).values())


def test_a_quantized_model_holds_codes_and_no_float_copies_of_its_weights():
    original = make_model()
    weights = sum(module.weight.nbytes for module in original.model.layers.modules() if isinstance(module, nn.Linear))
    model, _ = quantize(original, settings())
    logits(model)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert 8 * sum(linear.codes.nbytes for linear in linears) == weights
    held = [value for linear in linears for value in (*vars(linear).values(), *linear.buffers(recurse=False))]
    floats = [each for each in held if isinstance(each, Tensor) and each.is_floating_point()]
    assert sum(each.nbytes for each in floats) < 0.2 * weights  # scales and zero points
