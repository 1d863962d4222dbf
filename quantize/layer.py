"""One decoder layer, from full precision to quantized: the story of the method."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from duquant.tensors import widen
from quantize.build import LayerBuilder, absorbers, describe_folding
from quantize.observe import advance_, capture_rows, layer_output, require_finite
from quantize.observer import Observer
from quantize.rounding import OpenLinear
from quantize.settings import QuantSettings, SmoothSettings, Transform, WeightPeak
from quantize.smoothing import column_peak, smoothing_scale
from quantize.spec import DecoderSpec, SharedRows
from quantize.state import GroupState, LayerState
from quantize.training import Samples, TrainingReport, train_clipping_
from quantize.transforms import TRANSFORMS, Stage, TransformSearch, measure_stage


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

    def advance_teacher_(self, layer: nn.Module) -> None:
        """Bring the full-precision network's samples behind `layer`, which is still in full precision."""
        if self.teacher is not None:
            advance_(layer, self.teacher, self.kwargs, self.probe.device)

    def advance_(self, layer: nn.Module) -> None:
        """Bring the quantized network's samples, and the probe, behind `layer`, which is quantized."""
        self.probe = layer_output(layer, self.probe, self.kwargs)
        if self.student is not None:
            advance_(layer, self.student, self.kwargs, self.probe.device)


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

    `added` are those of observers.
    """

    layer: int
    output_error: float
    groups: tuple[GroupReport, ...]
    training: TrainingReport | None = None
    added: dict = field(default_factory=dict)
    search_seconds: float = field(default=0.0, compare=False)

    def figures(self) -> dict:
        """As JSON; without the search's seconds, since two runs of one layer have the same figures."""
        figures = asdict(self)
        del figures["search_seconds"]
        return figures | figures.pop("added")


def decide(
    layer: nn.Module,
    index: int,
    spec: DecoderSpec,
    inputs: LayerInputs,
    activation_peaks: dict[str, Tensor] | None,
    settings: QuantSettings,
    observers: Sequence[Observer] = (),
) -> tuple[LayerState, LayerReport]:
    """Decide how `layer` is quantized; return that, and the figures.

    What is decided for a group depends on everything upstream being quantized already, so `layer` is built as it goes
    and is what `build_` would make of the state; `inputs` are advanced through it. `spec` is that of this layer.
    `activation_peaks` (by full linear name, [C]) are needed for smoothing. The result depends on the arguments alone:
    the random rotations come from a generator of this layer.
    """
    probe, kwargs = inputs.probe, inputs.kwargs
    for observer in observers:
        observer.layer_begins(layer, index, spec, kwargs)
    reference = layer_output(layer, probe, kwargs)
    targets = teacher_targets_(layer, inputs, settings)
    state = LayerState()
    builder = LayerBuilder(layer, spec, settings, probe.dtype, observers)
    scales = smoothing_scales(layer, index, spec, activation_peaks, settings.smooth) if settings.smooth else {}
    builder.begin_(scales, probe.device)
    generator = layer_generator(settings.seed, index)
    reports, search_seconds = [], 0.0
    for group in spec.groups:
        x = capture_rows(layer, group.inputs, probe, kwargs)
        require_finite(x, spec.linear_key(index, group.linears[0]))
        started = time.perf_counter()
        search, stages = search_transform(
            x, builder.folded_scale(group), builder.online_scale(group), settings, generator
        )
        search_seconds += time.perf_counter() - started
        where = describe_folding(absorbers(group, settings.smooth)) if settings.smooth else "none"
        reports.append(GroupReport(group.name, block_size(x.shape[-1], settings), where, stages, search.steps))
        for observer in observers:
            observer.searched(group, search.peaks)
        state.groups[group.name] = GroupState(scales.get(group.name), search.rotations, search.permutations)
        builder.open_(group, state.groups[group.name])
        if settings.training is None:
            builder.round_(group)
        for observer in observers:
            observer.group_built(layer, group, kwargs, builder.folded_scale(group))
    training = None
    if settings.training is not None:
        samples = Samples(inputs.student, targets, inputs.total)
        training = train_clipping_(layer, samples, kwargs, settings.training)
        state.clips = clip_logits(layer, spec)
        for group in spec.groups:
            builder.round_(group)
    inputs.advance_(layer)
    error = (inputs.probe - reference).float().norm() / reference.float().norm()
    added = {name: value for each in observers for name, value in each.layer_built(layer, kwargs).items()}
    return state, LayerReport(index, error.item(), tuple(reports), training, added, search_seconds)


def teacher_targets_(layer: nn.Module, inputs: LayerInputs, settings: QuantSettings) -> tuple[Tensor, ...]:
    """Advance the teacher through the full-precision `layer`; return the targets of training (none without it).

    The first target is the teacher's output. With `--aug_loss` the second is the full-precision layer's output on the
    student's input.
    """
    inputs.advance_teacher_(layer)
    if settings.training is None:
        return ()
    if not settings.training.augmented:
        return (inputs.teacher,)
    own = inputs.student.clone()
    advance_(layer, own, inputs.kwargs, inputs.probe.device)
    return inputs.teacher, own


def clip_logits(layer: nn.Module, spec: DecoderSpec) -> dict[str, tuple[Tensor, Tensor]]:
    """The trained logits (low, high) by path."""
    linears = {path: layer.get_submodule(path) for group in spec.groups for path in group.linears}
    return {
        path: linear.clip.logits()
        for path, linear in linears.items()
        if isinstance(linear, OpenLinear) and linear.clip is not None
    }


def smoothing_scales(
    layer: nn.Module, index: int, spec: DecoderSpec, activation_peaks: dict[str, Tensor], smooth: SmoothSettings
) -> dict[str, Tensor]:
    """The smoothing scale [C] of every group, by name, from the layer's weights as they are now."""
    scales = {}
    for group in spec.groups:
        alone = smooth.weight_peak is WeightPeak.REPRESENTATIVE and group.representative is not None
        paths = (group.representative,) if alone else group.linears
        weight_peak = column_peak([layer.get_submodule(path).weight for path in paths])
        key = spec.linear_key(index, group.representative or group.linears[0])
        activation_peak = activation_peaks[key].to(weight_peak.device)
        for absorber in absorbers(group, smooth):
            if isinstance(absorber, SharedRows):
                activation_peak, weight_peak = absorber.share(activation_peak), absorber.share(weight_peak)
        scales[group.name] = smoothing_scale(activation_peak, weight_peak, smooth.alpha)
    return scales


def block_size(channels: int, settings: QuantSettings) -> int:
    """Channels per block of an activation with that many channels; 1 where nothing is transformed."""
    return settings.rotation.block_size_for(channels) if settings.transform is not Transform.NONE else 1


def search_transform(
    x: Tensor, folded: Tensor | None, online: Tensor | None, settings: QuantSettings, generator: torch.Generator
) -> tuple[TransformSearch, tuple[Stage, ...]]:
    """The transform for a group's input `x` [..., C], and the stages the input went through.

    A `folded` scale [C] has divided `x` already, an `online` one has not.
    """
    size = block_size(x.shape[-1], settings)
    smoothed = widen(x)
    stages = [measure_stage("input", smoothed if folded is None else smoothed * folded, size)]
    if online is not None:
        smoothed = smoothed / online
    if folded is not None or online is not None:
        stages.append(measure_stage("smoothed", smoothed, size))
    search = TRANSFORMS[settings.transform](smoothed, size, settings.rotation, generator)
    return search, (*stages, *search.stages)


def layer_generator(seed: int, index: int) -> torch.Generator:
    """The random generator of one layer: a function of the seed and the layer alone, on the CPU whatever the device."""
    return torch.Generator().manual_seed(seed * 100_003 + index)
