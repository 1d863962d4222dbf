"""One decoder layer, from full precision to quantized: the story of the method."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.attention import AttentionQuantizer, attach_, head_hadamard
from quantize.clipping import NoClip, fixed_clip
from quantize.config import QuantConfig, SmoothConfig, Transform, WeightPeak
from quantize.linear import QuantLinear
from quantize.observe import capture_input, require_finite, run
from quantize.quantizer import make_quantizer
from quantize.smoothing import absorb_inverse_, column_peak, scale_columns_, smoothing_scale
from quantize.spec import DecoderSpec, InputGroup
from quantize.transform import TRANSFORMS, DualTransform, Stage, measure_stage


@dataclass(frozen=True)
class LayerInputs:
    """What flows from layer to layer, on the layer's device: the probe [P, T, C] and the layer's other arguments."""

    probe: Tensor
    kwargs: dict


@dataclass(frozen=True)
class GroupReport:
    """Figures of one input group: block size, where the scale went, the probe at every stage, steps kept."""

    name: str
    block_size: int
    scale: str
    stages: tuple[Stage, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class LayerReport:
    """Figures of one layer; `output_error` is ‖ŷ − y‖/‖y‖ on the probe, quantized against full precision."""

    layer: int
    output_error: float
    groups: tuple[GroupReport, ...]


def quantize_layer(
    layer: nn.Module,
    index: int,
    spec: DecoderSpec,
    inputs: LayerInputs,
    activation_peaks: dict[str, Tensor] | None,
    config: QuantConfig,
) -> tuple[Tensor, LayerReport]:
    """Quantize `layer` in place; return the probe [P, T, C] behind it, and the figures.

    `activation_peaks` (by full linear name, [C]) are needed for smoothing. The result depends on the arguments alone:
    the random rotations come from a generator of this layer.
    """
    probe, dtype = inputs.probe, inputs.probe.dtype
    reference = run(layer, probe, inputs.kwargs)
    widen_linears_(layer, spec)
    scales: dict[str, Tensor] = {}
    if config.smooth is not None:
        scales = smooth_layer_(layer, index, spec, activation_peaks, config.smooth)
    attach_attention_quantizer_(layer.get_submodule(spec.attention), config, probe.device)
    generator = layer_generator(config.seed, index)
    reports = []
    for group in spec.groups:
        x = capture_input(layer, group.linears[0], probe, inputs.kwargs)
        require_finite(x, spec.linear_key(index, group.linears[0]))
        transform, report = find_transform(x, group, scales.get(group.name), config, generator)
        reports.append(report)
        for path in group.linears:
            replace_linear_(layer, path, transform, config).bake_(dtype)
    output = run(layer, probe, inputs.kwargs)
    error = (output - reference).float().norm() / reference.float().norm()
    return output, LayerReport(index, error.item(), tuple(reports))


def widen_linears_(layer: nn.Module, spec: DecoderSpec) -> None:
    """Hold the weights of all linears in float32 (at least) while they are scaled and rotated; baking narrows them."""
    for group in spec.groups:
        for path in group.linears:
            for parameter in layer.get_submodule(path).parameters():
                parameter.data = parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def smooth_layer_(
    layer: nn.Module, index: int, spec: DecoderSpec, activation_peaks: dict[str, Tensor], config: SmoothConfig
) -> dict[str, Tensor]:
    """Smooth every group in place; return the scale [C] of each, by group name.

    Scales come from the weights as they were, so the order of groups does not matter. A group without absorber is left
    alone: its scale is for the transform to apply online.
    """
    scales = {}
    for group in spec.groups:
        key = spec.linear_key(index, group.representative)
        paths = group.linears if config.weight_peak is WeightPeak.GROUP else (group.representative,)
        peak = column_peak([layer.get_submodule(path).weight for path in paths])
        scales[group.name] = smoothing_scale(activation_peaks[key].to(peak.device), peak, config.alpha)
    for group in spec.groups:
        if group.absorber is not None:
            scales[group.name] = absorb_inverse_(layer.get_submodule(group.absorber), scales[group.name])
            scale_columns_([layer.get_submodule(path) for path in group.linears], scales[group.name])
    return scales


def attach_attention_quantizer_(attention: nn.Module, config: QuantConfig, device: torch.device) -> None:
    """Quantize q, k (with a Hadamard of the head, unless the transform is the identity) and v of this layer."""
    bits = config.bits
    matrix = head_hadamard(attention.head_dim, device) if config.transform is not Transform.NONE else None
    qk_quantizer = make_quantizer(bits.activation, False, fixed_clip(config.clip.activation_ratio))
    v_quantizer = make_quantizer(bits.activation, False, NoClip())
    attach_(attention, AttentionQuantizer(matrix, qk_quantizer, v_quantizer))


def find_transform(
    x: Tensor, group: InputGroup, scale: Tensor | None, config: QuantConfig, generator: torch.Generator
) -> tuple[DualTransform, GroupReport]:
    """The transform of one group for its input `x` [P, T, C], which a folded scale has already divided."""
    block_size = config.rotation.block_size_for(x.shape[-1]) if config.transform is not Transform.NONE else 1
    folded = group.absorber is not None
    smoothed = x.to(torch.promote_types(x.dtype, torch.float32))
    stages = [measure_stage("input", smoothed, block_size)]
    if scale is not None:
        original, smoothed = (smoothed * scale, smoothed) if folded else (smoothed, smoothed / scale)
        stages = [measure_stage("input", original, block_size), measure_stage("smoothed", smoothed, block_size)]
    found = TRANSFORMS[config.transform](smoothed, block_size, config.rotation, generator)
    transform = DualTransform(found.rotations, found.permutations, None if folded else scale)
    where = "none" if scale is None else f"folded into {group.absorber}" if folded else "online"
    return transform, GroupReport(group.name, block_size, where, (*stages, *found.stages), found.steps)


def replace_linear_(layer: nn.Module, path: str, transform: DualTransform, config: QuantConfig) -> QuantLinear:
    """Put a `QuantLinear` with the group's `transform` in the place of the linear at `path`, and return it."""
    bits, clip = config.bits, config.clip
    weight_quantizer = make_quantizer(bits.weight, bits.symmetric, fixed_clip(clip.weight_ratio), bits.group_size)
    input_quantizer = make_quantizer(bits.activation, False, fixed_clip(clip.activation_ratio))
    linear = QuantLinear(layer.get_submodule(path), transform, weight_quantizer, input_quantizer)
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, linear)
    return linear


def layer_generator(seed: int, index: int) -> torch.Generator:
    """The random generator of one layer: a function of the seed and the layer alone, on the CPU whatever the device."""
    return torch.Generator().manual_seed(seed * 100_003 + index)
