"""One decoder layer, from full precision to quantized: the story of the method."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from duquant.linear import GroupInput
from duquant.tensors import widen
from duquant.transform import DualTransform
from quantize.build import FullPrecision, LayerBuilder, absorbers, describe_folding, describe_order, narrowed
from quantize.group_input import fit_input, measure_input
from quantize.heads import decide_heads, multiplied_columns, order_in_heads, rotated_energy, value_matrices
from quantize.inputs import LayerInputs
from quantize.learned import LearnedLayer
from quantize.learning import train_transform
from quantize.observe import advance_, capture_rows, known_outputs, layer_output, require_finite
from quantize.observer import Observer
from quantize.rotation_settings import Transform
from quantize.rounding import Moments, OpenLinear
from quantize.samples import GroupRows, KnownOutputs, moment_of, parts_of
from quantize.scales import group_peaks, smoothing_scales
from quantize.settings import Probe, QuantSettings, SmoothMeasure, SmoothSettings
from quantize.spec import DecoderSpec, InputGroup
from quantize.state import GroupState, LayerState
from quantize.training import Samples, TrainingReport, train_clipping_
from quantize.transforms import TRANSFORMS, Stage, TransformSearch, channel_peak, measure_stage


@dataclass(frozen=True)
class GroupReport:
    """Figures of one input group: block size, where the scale went, the probe at every stage, steps kept.

    `clip`: the searched ratio of its input, None where it was not searched. `order`: where its channels were put into
    another order, None where the transform does not.
    """

    name: str
    block_size: int
    scale: str
    stages: tuple[Stage, ...]
    steps: tuple[int, ...]
    clip: float | None = None
    order: str | None = None


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
    `activation_peaks` (by full linear name, [C]) are needed for smoothing by peaks. The result depends on the arguments
    alone: the random rotations come from a generator of this layer.
    """
    for observer in observers:
        observer.layer_begins(layer, index, spec, inputs.kwargs)
    reference = layer_output(layer, inputs.probe, inputs.kwargs)
    untouched = FullPrecision(layer, spec) if settings.learns_transform else None
    decision = Decision(layer, index, spec, inputs, settings, observers)
    targets = teacher_targets_(layer, inputs, settings)
    samples = Samples(inputs.student, targets, inputs.total)
    decision.begin_(activation_peaks)
    training = None
    for group in spec.groups:
        if settings.learns_transform:  # nothing upstream is opened, and all of it runs
            with narrowed(layer, spec, decision.builder.dtype):
                decision.decide_(group)
            continue
        decision.decide_(group)
        decision.open_(group)
        if settings.training is None:
            decision.round_(group)
            decision.tell_built(group)
    if settings.learns_transform:
        training = decision.learn_(samples, untouched)
    elif settings.training is not None:
        training = train_clipping_(layer, samples, inputs.kwargs, settings.training)
        decision.state.clips = clip_logits(layer, spec)
    for group in spec.groups if settings.training is not None else ():
        if settings.learns_transform:
            decision.fit_(group)
            decision.open_(group)
        decision.round_(group)
        decision.tell_built(group)
    inputs.advance_(layer, decision.probed, decision.known)
    error = (inputs.probe - reference).float().norm() / reference.float().norm()
    added = {name: value for each in observers for name, value in each.layer_built(layer, inputs.kwargs).items()}
    figures = (error.item(), tuple(decision.reports), training, added, decision.search_seconds)
    return decision.state, LayerReport(index, *figures)


class Decision:
    """One layer on its way from full precision: what is known of it, and what was decided so far."""

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        spec: DecoderSpec,
        inputs: LayerInputs,
        settings: QuantSettings,
        observers: Sequence[Observer],
    ):
        self.layer, self.index, self.spec, self.inputs, self.settings = layer, index, spec, inputs, settings
        self.observers, self.state, self.reports = observers, LayerState(), []
        self.builder = LayerBuilder(layer, spec, settings, inputs.probe.dtype, observers)
        self.generator, self.search_seconds = layer_generator(settings.seed, index), 0.0
        self.view = inputs.view(layer, spec, settings) if settings.views_layers else None
        self.rows: GroupRows | None = None  # of the group that is being decided
        self.shared: dict[str, GroupInput] = {}
        self.known = KnownOutputs(spec.attention, inputs.allocate)
        self.x: Tensor | None = None  # what the probe gives the group that is being decided
        self.probed: dict[str, Tensor] = {}  # what the probe gives modules whose inputs will not change any more

    def begin_(self, activation_peaks: dict[str, Tensor] | None) -> None:
        """Decide what is done to heads, and the smoothing scales; fold them."""
        settings, state, view = self.settings, self.state, self.view
        if settings.extras.value_rotation:
            state.values = value_matrices(view.heads["value"], self.layer, self.spec, settings.extras)
            self.builder.rotate_values_(state)
            view.heads["value"] = torch.einsum("nhd,hde->nhe", view.heads["value"], state.values)
        if view is not None:
            state.attention = decide_heads(view.heads, settings.scheme, settings.extras)
        device = self.inputs.probe.device
        scales = {} if settings.smooth is None else self._scales(settings.smooth, activation_peaks)
        for group, scale in scales.items():
            state.groups[group] = GroupState(scale, *[torch.empty(0, device=scale.device)] * 2)
        self.builder.fold_(state)
        if settings.transform.orders_channels:
            self._order_()
        self.builder.attach_(state, device)

    def _order_(self) -> None:
        """Decide in which order the channels of groups are to be, by what the probe gives them, and put them so.

        The layer is scaled and rounds nothing yet. What is known of its full-precision activations follows.
        """
        layer, inputs, state = self.layer, self.inputs, self.state
        with narrowed(layer, self.spec, self.builder.dtype):
            peaks = {
                group: channel_peak(widen(capture_rows(layer, group.inputs, inputs.probe, inputs.kwargs)))
                for group in self.spec.groups
                if group.ordered
            }
        for group, peak in peaks.items():
            online, none = self.builder.online_scale(group), torch.empty(0, device=peak.device)
            peak = peak if online is None else peak / online
            order = group.ordered[0].permutation(peak, block_size(len(peak), self.settings))
            if torch.equal(order, torch.arange(len(order), device=order.device)):
                continue
            state.groups[group.name] = replace(state.groups.get(group.name, GroupState(None, none, none)), order=order)
        self.builder.order_(state.orders)
        mean, order = state.attention.get("value.mean"), state.orders.get("o")
        if mean is not None and order is not None:
            state.attention["value.mean"] = mean.gather(-1, order_in_heads(order, mean.shape))

    def _scales(self, smooth: SmoothSettings, activation_peaks: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """The smoothing scale [C] of every group, by name, from the layer's weights as they are now."""
        layer, spec, matrices = self.layer, self.spec, self.state.values
        if smooth.measure is SmoothMeasure.PEAK:
            peaks = group_peaks(self.index, spec, activation_peaks)
            if matrices is not None:  # the statistics are of what o_proj's input was before
                peaks["o"] = self.inputs.rows(layer, next(each for each in spec.groups if each.name == "o")).peak()
            return smoothing_scales(layer, spec, peaks, smooth)
        energies = dict(self.view.energies)
        if matrices is not None:
            energies["o"] = rotated_energy(self.view.outputs, matrices)
        return smoothing_scales(layer, spec, energies, smooth)

    def decide_(self, group: InputGroup) -> None:
        """Search the group's transform, fit what rounds its input, and open its linears."""
        builder, settings, inputs = self.builder, self.settings, self.inputs
        self.rows = inputs.rows(self.layer, group, self.known) if settings.reads_rows else None
        with known_outputs(self.layer, self.probed, self.spec.attention):
            self.x = x = capture_rows(self.layer, group.inputs, inputs.probe, inputs.kwargs)
        require_finite(x, self.spec.linear_key(self.index, group.linears[0]))
        online, folded = builder.online_scale(group), builder.folded_scale(group)
        if settings.probe is Probe.PEAKS:
            x = self.rows.largest(settings.probe_tokens, online)
        started = time.perf_counter()
        search, stages = search_transform(x, folded, online, settings, self.generator)
        self.search_seconds += time.perf_counter() - started
        for observer in self.observers:
            observer.searched(group, search.peaks)
        order = self.state.orders.get(group.name)
        state = GroupState(self.state.scales.get(group.name), search.rotations, search.permutations, order=order)
        if self.rows is not None:
            state = fit_input(state, self.rows, DualTransform(state.rotations, state.permutations, online), settings)
        self.state.groups[group.name] = state
        where = describe_folding(absorbers(group, settings.smooth)) if settings.smooth else "none"
        clip = None if state.ratios is None else state.ratios[0].item()
        size = block_size(x.shape[-1], settings)
        moved = describe_order(group, order) if settings.transform.orders_channels else None
        self.reports.append(GroupReport(group.name, size, where, stages, search.steps, clip, moved))

    def open_(self, group: InputGroup) -> None:
        """Put what the group's transform makes of them in the place of its linears."""
        self.shared[group.name] = self.builder.open_(group, self.state)

    def tell_built(self, group: InputGroup) -> None:
        """Say that the group's linears are replaced."""
        for observer in self.observers:
            observer.group_built(self.layer, group, self.inputs.kwargs, self.builder.folded_scale(group))

    def learn_(self, samples: Samples, untouched: FullPrecision) -> TrainingReport:
        """Train transforms, scales and clips from what was decided; begin the layer anew with what was learned."""
        learned = LearnedLayer(self.layer, self.spec, self.state, self.builder)
        report = train_transform(learned, samples, self.inputs.kwargs, self.settings.training)
        self.state = learned.learned()
        untouched.restore_()
        self.builder = LayerBuilder(self.layer, self.spec, self.settings, self.builder.dtype, self.observers)
        self.builder.rotate_values_(self.state)
        self.builder.begin_(self.state, self.inputs.probe.device)
        return report

    def fit_(self, group: InputGroup) -> None:
        """Measure the group's input anew, behind what is rounded upstream by now."""
        if not self.settings.reads_rows:
            return
        self.rows = self.inputs.rows(self.layer, group, self.known)
        state = self.state.groups[group.name]
        transform = DualTransform(state.rotations, state.permutations, self.builder.online_scale(group))
        self.state.groups[group.name] = measure_input(state, self.rows, transform, self.settings)

    def round_(self, group: InputGroup) -> None:
        """Round the group's weights, by what samples give them if that is asked for; everything upstream is rounded."""
        moments = None
        if self.settings.rounds_by_data:
            # where clips were trained the rows were read before, with other weights upstream
            trained = self.settings.training is not None and not self.settings.learns_transform
            self.rows = self.inputs.rows(self.layer, group, self.known) if trained else self.rows
            moments = self._moments(group)
            require_finite(moments.hessian, moments.name)
        self.builder.round_(group, self.state, moments)
        if self.rows is not None and group.closes is not None:
            self.known.close_(self.layer, group, self.rows, tuple(self.inputs.student.shape[:2]))
        if self.settings.training is None and group.closes is not None:
            self.probed[group.closes] = self.layer.get_submodule(group.linears[0])(self.x)
        self.rows = self.x = None

    def _moments(self, group: InputGroup) -> Moments:
        """What samples give the group's linears, and beside it what the full-precision network would give them.

        The latter, transformed and shifted alike, only where it is aimed at; not of experts, which are given other
        tokens in each network.
        """
        rows, shared = self.rows, self.shared[group.name]
        name, given = self.spec.linear_key(self.index, group.name), map(shared, rows.parts())
        if not self.settings.aims_at_teacher or len(group.inputs) > 1:
            return Moments(name, moment_of((x,) for x in given))
        folded, matrices = self.builder.folded_scale(group), self.state.values
        order = self.state.orders.get(group.name)

        def aimed() -> Iterator[Tensor]:
            for x in parts_of(self.view.rows[group.name], rows.device):
                if group.name == "o" and matrices is not None:
                    x = multiplied_columns(x, matrices.to(x.dtype))
                x = x if order is None else x[:, order]
                y = shared.transform(x if folded is None else x / folded)
                yield y if shared.shift is None else y - shared.shift

        both = moment_of(zip(given, aimed(), strict=True))
        return Moments(name, *both.tensor_split(2))


def teacher_targets_(layer: nn.Module, inputs: LayerInputs, settings: QuantSettings) -> tuple[Tensor, ...]:
    """Advance the teacher through the full-precision `layer`; return the targets of training (none without it).

    The first target is the teacher's output. With `--aug_loss` the second is the full-precision layer's output on the
    student's input.
    """
    if not settings.views_layers:  # else they went behind it while it was looked at
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
