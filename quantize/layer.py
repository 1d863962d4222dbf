"""One decoder layer, from full precision to quantized: the story of the method."""

import time
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from quantize.attention import AttentionQuantizer, attach_, head_hadamard
from quantize.clipping import LearnedClip, NoClip, fixed_clip
from quantize.config import GqaSmooth, QuantConfig, SmoothConfig, Transform, WeightPeak
from quantize.linear import QuantLinear
from quantize.lwc import Samples, TrainingReport, train_clipping_
from quantize.observe import advance_, capture_rows, require_finite, run
from quantize.quantizer import Quantizer, make_quantizer
from quantize.record import Recorder
from quantize.smoothing import column_peak, scale_columns_, smoothing_scale
from quantize.spec import Absorber, DecoderSpec, InputGroup, SharedRows
from quantize.state import GroupState, LayerState
from quantize.transform import TRANSFORMS, DualTransform, Stage, measure_stage


@dataclass
class LayerInputs:
    """What flows from layer to layer.

    `probe` [P, T, C] and `kwargs`, the layer's other arguments, are on the layer's device. `teacher` and `student`
    [n, T, C], the calibration samples in the full-precision and in the quantized network, are on the host, advanced in
    place, and None where nothing is trained. Of the `total` samples each process has its part.
    """

    probe: Tensor
    kwargs: dict
    teacher: Tensor | None = None
    student: Tensor | None = None
    total: int = 0


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
    """Figures of one layer; `output_error` is ‖ŷ − y‖/‖y‖ on the probe, quantized against full precision.

    `recorded` are those that the report adds.
    """

    layer: int
    output_error: float
    groups: tuple[GroupReport, ...]
    training: TrainingReport | None = None
    recorded: dict | None = None
    search_seconds: float = field(default=0.0, compare=False)

    def figures(self) -> dict:
        """As JSON; without the search's seconds, since two runs of one layer have the same figures."""
        figures = asdict(self)
        del figures["search_seconds"]
        return figures


def quantize_layer(
    layer: nn.Module,
    index: int,
    spec: DecoderSpec,
    inputs: LayerInputs,
    activation_peaks: dict[str, Tensor] | None,
    config: QuantConfig,
    recorder: Recorder | None = None,
) -> tuple[LayerState, LayerReport]:
    """Quantize `layer` in place and advance `inputs` through it; return what was decided, and the figures.

    `spec` is that of this layer. `activation_peaks` (by full linear name, [C]) are needed for smoothing. The result
    depends on the arguments alone: the random rotations come from a generator of this layer. A `recorder` looks on.
    """
    probe, dtype = inputs.probe, inputs.probe.dtype
    if recorder is not None:
        recorder.begin(layer, index, spec, inputs.kwargs)
    reference = run(layer, probe, inputs.kwargs)
    targets = teacher_targets_(layer, inputs, config)
    widen_linears_(layer, spec)
    scales = smoothing_scales(layer, index, spec, activation_peaks, config.smooth) if config.smooth else {}
    applied = fold_scales_(layer, spec, scales, config.smooth)
    attach_attention_quantizer_(layer.get_submodule(spec.attention), config, probe.device)
    generator = layer_generator(config.seed, index)
    state, reports, search_seconds = LayerState(), [], 0.0
    for group in spec.groups:
        x = capture_rows(layer, group.inputs, probe, inputs.kwargs)
        require_finite(x, spec.linear_key(index, group.linears[0]))
        started = time.perf_counter()
        transform, report = find_transform(x, group, applied.get(group.name), config, generator, recorder)
        search_seconds += time.perf_counter() - started
        reports.append(report)
        state.groups[group.name] = GroupState(scales.get(group.name), transform.rotations, transform.permutations)
        for path in group.linears:
            linear = replace_linear_(layer, path, transform, config)
            if not config.clip.learned:
                if recorder is not None:
                    recorder.weight(group, path, linear)
                linear.bake_(dtype)
        if recorder is not None:
            folded = applied.get(group.name) if transform.scale is None else None
            recorder.group(layer, group, inputs.kwargs, folded)
    training = None
    if config.clip.learned:
        samples = Samples(inputs.student, targets, inputs.total)
        training = train_clipping_(layer, samples, inputs.kwargs, config.training)
        state.clips = bake_learned_(layer, spec, dtype, recorder)
    inputs.probe = run(layer, probe, inputs.kwargs)
    if inputs.student is not None:
        advance_(layer, inputs.student, inputs.kwargs, probe.device)
    error = (inputs.probe - reference).float().norm() / reference.float().norm()
    recorded = None if recorder is None else recorder.finish(layer, inputs.kwargs)
    return state, LayerReport(index, error.item(), tuple(reports), training, recorded, search_seconds)


def restore_layer(
    layer: nn.Module,
    spec: DecoderSpec,
    inputs: LayerInputs | None,
    state: LayerState,
    config: QuantConfig,
    dtype: torch.dtype,
) -> None:
    """Quantize `layer` in place as `state` says, and advance `inputs` through it unless they are None.

    The operations are those of `quantize_layer`, without its search and training, so the result is the same bit for
    bit.
    """
    if inputs is not None and inputs.teacher is not None:
        advance_(layer, inputs.teacher, inputs.kwargs, inputs.probe.device)
    widen_linears_(layer, spec)
    applied = fold_scales_(layer, spec, state.scales, config.smooth)
    device = next(layer.parameters()).device
    attach_attention_quantizer_(layer.get_submodule(spec.attention), config, device)
    for group in spec.groups:
        found = state.groups[group.name]
        online = None if absorbers(group, config.smooth) else applied.get(group.name)
        transform = DualTransform(found.rotations, found.permutations, online)
        for path in group.linears:
            linear = replace_linear_(layer, path, transform, config)
            if path in state.clips:
                linear.weight_quantizer.clip.set_(*state.clips[path])
            linear.bake_(dtype)
    if inputs is not None:
        inputs.probe = run(layer, inputs.probe, inputs.kwargs)
        if inputs.student is not None:
            advance_(layer, inputs.student, inputs.kwargs, inputs.probe.device)


def teacher_targets_(layer: nn.Module, inputs: LayerInputs, config: QuantConfig) -> tuple[Tensor, ...]:
    """Advance the teacher through the full-precision `layer`; return the targets of training (none without it).

    The first target is the teacher's output. With `--aug_loss` the second is the full-precision layer's output on the
    student's input.
    """
    if inputs.teacher is None:
        return ()
    advance_(layer, inputs.teacher, inputs.kwargs, inputs.probe.device)
    if not config.training.augmented:
        return (inputs.teacher,)
    own = inputs.student.clone()
    advance_(layer, own, inputs.kwargs, inputs.probe.device)
    return inputs.teacher, own


def bake_learned_(
    layer: nn.Module, spec: DecoderSpec, dtype: torch.dtype, recorder: Recorder | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Bake every linear with its trained clip; return the logits (low, high) by path."""
    logits = {}
    for group, path in ((each, path) for each in spec.groups for path in each.linears):
        linear = layer.get_submodule(path)
        if recorder is not None:
            recorder.weight(group, path, linear)
        if isinstance(linear.weight_quantizer, Quantizer):
            logits[path] = linear.weight_quantizer.clip.logits()
        linear.bake_(dtype)
    return logits


def widen_linears_(layer: nn.Module, spec: DecoderSpec) -> None:
    """Hold the weights of all linears in float32 (at least) while they are scaled and rotated; baking narrows them."""
    for group in spec.groups:
        for path in group.linears:
            for parameter in layer.get_submodule(path).parameters():
                parameter.data = parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def smoothing_scales(
    layer: nn.Module, index: int, spec: DecoderSpec, activation_peaks: dict[str, Tensor], config: SmoothConfig
) -> dict[str, Tensor]:
    """The smoothing scale [C] of every group, by name, from the layer's weights as they are now."""
    scales = {}
    for group in spec.groups:
        alone = config.weight_peak is WeightPeak.REPRESENTATIVE and group.representative is not None
        paths = (group.representative,) if alone else group.linears
        weight_peak = column_peak([layer.get_submodule(path).weight for path in paths])
        key = spec.linear_key(index, group.representative or group.linears[0])
        activation_peak = activation_peaks[key].to(weight_peak.device)
        for absorber in absorbers(group, config):
            if isinstance(absorber, SharedRows):
                activation_peak, weight_peak = absorber.share(activation_peak), absorber.share(weight_peak)
        scales[group.name] = smoothing_scale(activation_peak, weight_peak, config.alpha)
    return scales


def absorbers(group: InputGroup, smooth: SmoothConfig | None) -> tuple[Absorber, ...]:
    """What takes the group's scale upstream; without any, it stays online.

    Scales that heads have to share are a choice (`--gqa_smooth fold`): they fit each head less well.
    """
    fold_shared = smooth is not None and smooth.gqa is GqaSmooth.FOLD
    return tuple(each for each in group.absorbers if fold_shared or not isinstance(each, SharedRows))


def fold_scales_(
    layer: nn.Module, spec: DecoderSpec, scales: dict[str, Tensor], smooth: SmoothConfig | None
) -> dict[str, Tensor]:
    """Fold the scales of all groups into the layer, in place; return those that were really applied.

    A group without absorber is left alone: its scale is for the transform to apply online.
    """
    applied = dict(scales)
    for group in spec.groups:
        found = absorbers(group, smooth)
        if group.name not in scales or not found:
            continue
        for absorber in found:
            applied[group.name] = absorber.absorb_(layer, applied[group.name])
        scale_columns_([layer.get_submodule(path) for path in (*group.linears, *group.readers)], applied[group.name])
    return applied


def attach_attention_quantizer_(attention: nn.Module, config: QuantConfig, device: torch.device) -> None:
    """Quantize q, k (with a Hadamard of the head, where the transform rotates) and v of this layer."""
    bits = config.bits
    matrix = head_hadamard(attention.head_dim, device) if config.transform.rotates else None
    qk_quantizer = make_quantizer(bits.activation, False, fixed_clip(config.clip.activation_ratio))
    v_quantizer = make_quantizer(bits.activation, False, NoClip())
    attach_(attention, AttentionQuantizer(matrix, qk_quantizer, v_quantizer))


def find_transform(
    x: Tensor,
    group: InputGroup,
    scale: Tensor | None,
    config: QuantConfig,
    generator: torch.Generator,
    recorder: Recorder | None = None,
) -> tuple[DualTransform, GroupReport]:
    """The transform of one group for its input `x` [P, T, C], which a folded scale has already divided."""
    block_size = config.rotation.block_size_for(x.shape[-1]) if config.transform is not Transform.NONE else 1
    folded = absorbers(group, config.smooth)
    smoothed = x.to(torch.promote_types(x.dtype, torch.float32))
    stages = [measure_stage("input", smoothed, block_size)]
    if scale is not None:
        original, smoothed = (smoothed * scale, smoothed) if folded else (smoothed, smoothed / scale)
        stages = [measure_stage("input", original, block_size), measure_stage("smoothed", smoothed, block_size)]
    found = TRANSFORMS[config.transform](smoothed, block_size, config.rotation, generator)
    transform = DualTransform(found.rotations, found.permutations, None if folded else scale)
    if recorder is not None:
        recorder.searched(group, found.peaks)
    where = "none" if scale is None else describe_folding(folded)
    return transform, GroupReport(group.name, block_size, where, (*stages, *found.stages), found.steps)


def describe_folding(absorbers: tuple[Absorber, ...]) -> str:
    """Where a group's scale is, for the log: `online`, or `folded into mlp.up_proj`."""
    others = f" and {len(absorbers) - 1} like it" if len(absorbers) > 1 else ""
    return f"folded into {absorbers[0]}{others}" if absorbers else "online"


def replace_linear_(
    layer: nn.Module, path: str, transform: DualTransform, config: QuantConfig, baked: bool = False
) -> QuantLinear:
    """Put a `QuantLinear` with the group's `transform` in the place of the linear at `path`, and return it."""
    bits, clip, replaced = config.bits, config.clip, layer.get_submodule(path)
    weight_clip = fixed_clip(clip.weight_ratio)
    if clip.learned:
        groups = 1 if bits.group_size is None else replaced.in_features // bits.group_size
        ranges = (replaced.out_features, 1) if groups == 1 else (replaced.out_features, groups, 1)
        weight_clip = LearnedClip(ranges).to(replaced.weight.device)
    weight_quantizer = make_quantizer(bits.weight, bits.symmetric, weight_clip, bits.group_size)
    input_quantizer = make_quantizer(bits.activation, False, fixed_clip(clip.activation_ratio))
    linear = QuantLinear(replaced, transform, weight_quantizer, input_quantizer, baked)
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, linear)
    return linear


def layer_generator(seed: int, index: int) -> torch.Generator:
    """The random generator of one layer: a function of the seed and the layer alone, on the CPU whatever the device."""
    return torch.Generator().manual_seed(seed * 100_003 + index)
