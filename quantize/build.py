"""From what was decided to a quantized layer: the only place where one is built.

Fresh, resumed, streamed and loaded layers and those of the paper's own checkpoints all go through `LayerBuilder`: a run
that still decides calls its steps one by one, everybody else calls `build_`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from duquant.attention import attach_, make_attention_quantizer
from duquant.linear import GroupInput, QuantLinear
from duquant.quantizer import FoundClip, make_quantizer
from duquant.scheme import number_format
from duquant.tensors import widen
from duquant.transform import DualTransform
from quantize.heads import rotate_values_
from quantize.observer import Observer
from quantize.permutation import permute_columns_
from quantize.rounding import Moments, OpenLinear, data_codes, share_base_
from quantize.settings import GqaSmooth, QuantSettings, SmoothSettings
from quantize.smoothing import scale_columns_
from quantize.spec import Absorber, DecoderSpec, InputGroup, SharedRows
from quantize.state import LayerState


def build_(
    layer: nn.Module,
    spec: DecoderSpec,
    state: LayerState,
    settings: QuantSettings,
    dtype: torch.dtype,
    observers: Sequence[Observer] = (),
) -> None:
    """Quantize `layer`, whose spec is `spec`, as `state` says: the same bits as when that was decided.

    `dtype`: of the model. The layer is in full precision, or, where `state` has its weights, without any. `observers`
    are told of what is rounded, and of nothing else.
    """
    builder = LayerBuilder(layer, spec, settings, dtype, observers)
    builder.rotate_values_(state)
    builder.begin_(state, state.device)
    for group in spec.groups:
        builder.open_(group, state)
        builder.round_(group, state)


class FullPrecision:
    """A decoder layer as it was before anything was done to it, which makes new tensors and new modules only."""

    def __init__(self, layer: nn.Module, spec: DecoderSpec):
        self.layer, self.attention = layer, layer.get_submodule(spec.attention)
        paths = {path for group in spec.groups for path in group.linears}
        self.linears = {path: layer.get_submodule(path) for path in paths}
        self.parameters = {name: (each, each.data) for name, each in layer.named_parameters()}

    def restore_(self) -> None:
        """Make it so again."""
        attach_(self.attention, None)
        for path, linear in self.linears.items():
            parent, _, name = path.rpartition(".")
            setattr(self.layer.get_submodule(parent), name, linear)
        for parameter, data in self.parameters.values():
            parameter.data = data


class LayerBuilder:
    """Turns one decoder layer into a quantized one, in the order of its methods."""

    def __init__(
        self,
        layer: nn.Module,
        spec: DecoderSpec,
        settings: QuantSettings,
        dtype: torch.dtype,
        observers: Sequence[Observer] = (),
    ):
        self.layer, self.spec, self.settings, self.dtype = layer, spec, settings, dtype
        self.scheme, self.observers = settings.scheme, observers
        self.scales: dict[str, Tensor] = {}

    def rotate_values_(self, state: LayerState) -> None:
        """Fold the matrices of v's heads into v and o, if there are any."""
        if state.values is not None:
            rotate_values_(self.layer, self.spec, state.values)

    def begin_(self, state: LayerState, device: torch.device) -> None:
        """Fold the smoothing scales [C] and the orders [C] by group, and quantize q, k and v; all is on `device`."""
        self.fold_(state)
        self.order_(state.orders)
        self.attach_(state, device)

    def fold_(self, state: LayerState) -> None:
        """Fold the smoothing scales [C] by group."""
        if not state.stored:
            widen_linears_(self.layer, self.spec)
        self.scales = fold_scales_(self.layer, self.spec, state.scales, self.settings.smooth)

    def order_(self, orders: Mapping[str, Tensor]) -> None:
        """Put the channels of groups into these orders [C], upstream and in their linears: x P (W P)ᵀ = x Wᵀ."""
        for group in self.spec.groups:
            order = orders.get(group.name)
            if order is None:
                continue
            for rows in group.ordered:
                rows.order_(self.layer, order)
            for path in group.linears:
                permute_columns_(self.layer.get_submodule(path), order)
            if group.name in self.scales:
                self.scales[group.name] = self.scales[group.name][order]

    def attach_(self, state: LayerState, device: torch.device) -> None:
        """Quantize q, k and v from now on."""
        attention = self.layer.get_submodule(self.spec.attention)
        attach_(attention, make_attention_quantizer(self.scheme, attention.head_dim, device, state.attention))

    def online_scale(self, group: InputGroup) -> Tensor | None:
        """The scale [C] that the group's transform divides by, in the order of its channels now; None if there is none.

        There is none either if it is upstream.
        """
        return None if absorbers(group, self.settings.smooth) else self.scales.get(group.name)

    def folded_scale(self, group: InputGroup) -> Tensor | None:
        """The scale [C] that was divided out upstream, if one was."""
        return self.scales.get(group.name) if absorbers(group, self.settings.smooth) else None

    def open_(self, group: InputGroup, state: LayerState) -> GroupInput:
        """Put what the group's transform makes of them in the place of its linears; return what they share.

        They wait for `round_`, unless they are a saved model's.
        """
        own = state.groups[group.name]
        transform = DualTransform(own.rotations, own.permutations, self.online_scale(group))
        clip = None if own.ratios is None else FoundClip(own.ratios)
        # of linears that see other tokens each (experts), none reads what another one has read
        readers = 1 if group.observed else len(group.linears)
        quantizer = make_quantizer(self.scheme.input, clip, base=own.base)
        shared = GroupInput(transform, quantizer, readers, own.shift)
        for path in group.linears:
            linear = self.layer.get_submodule(path)
            bias = None if linear.bias is None else linear.bias.detach()
            if state.stored:
                self.replace_(path, QuantLinear(state.weights[path], number_format(self.scheme.weight), bias, shared))
                continue
            weight = transform.transform_weight(linear.weight.detach())
            learned = self.settings.learns_weight_clips
            bias = shifted_bias(bias, weight, own.shift)
            self.replace_(path, OpenLinear(weight, bias, self.scheme.weight, shared, learned))
        if self.scheme.weight.quantized and not state.stored:
            share_base_([self.layer.get_submodule(path) for path in group.linears])
        return shared

    def round_(self, group: InputGroup, state: LayerState, moments: Moments | None = None) -> None:
        """Round the group's weights for good: to the codes of the state, or under its clip logits, where it has them.

        With `moments` the codes are found by what samples give the group, and go into the state.
        """
        linears = {path: self.layer.get_submodule(path) for path in group.linears}
        linears = {path: linear for path, linear in linears.items() if isinstance(linear, OpenLinear)}
        for path, linear in linears.items():
            if path in state.clips:
                linear.clip.set_(*state.clips[path])
            for observer in self.observers:
                observer.rounding(group, path, linear)
        if linears and moments is not None:
            state.weights |= data_codes(linears, moments, self.settings.rounding)
        for path, linear in linears.items():
            if path not in state.weights:
                self.replace_(path, linear.rounded(self.dtype))
                continue
            self.replace_(path, linear.with_codes(state.weights[path], self.dtype))

    def replace_(self, path: str, module: nn.Module) -> None:
        """Put `module` at `path` of the layer."""
        parent, _, name = path.rpartition(".")
        setattr(self.layer.get_submodule(parent), name, module)


def shifted_bias(bias: Tensor | None, weight: Tensor, shift: Tensor | None) -> Tensor | None:
    """b + Ŵz for a transformed weight Ŵ [O, C] whose input lacks z = `shift` [C]: (x − z)Ŵᵀ + zŴᵀ = xŴᵀ."""
    if shift is None:
        return bias
    moved = weight @ shift.to(weight.dtype)
    return moved if bias is None else bias.to(moved.dtype) + moved


def widen_linears_(layer: nn.Module, spec: DecoderSpec) -> None:
    """Hold the weights of all linears in at least float32 while they are scaled and rotated; rounding narrows them."""
    for group in spec.groups:
        for path in group.linears:
            for parameter in layer.get_submodule(path).parameters():
                parameter.data = widen(parameter)


@contextmanager
def narrowed(layer: nn.Module, spec: DecoderSpec, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block the linears that were widened and are not opened yet run in `dtype`, that of their inputs."""
    modules = {path: layer.get_submodule(path) for group in spec.groups for path in group.linears}
    parameters = [each for module in modules.values() if isinstance(module, nn.Linear) for each in module.parameters()]
    wide = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in zip(parameters, wide, strict=True):
            parameter.data = data


def absorbers(group: InputGroup, smooth: SmoothSettings | None) -> tuple[Absorber, ...]:
    """What takes the group's scale upstream; without any, it stays online.

    Scales that heads have to share are a choice (`--gqa_smooth fold`): they fit each head less well.
    """
    fold_shared = smooth is not None and smooth.gqa is GqaSmooth.FOLD
    return tuple(each for each in group.absorbers if fold_shared or not isinstance(each, SharedRows))


def fold_scales_(
    layer: nn.Module, spec: DecoderSpec, scales: Mapping[str, Tensor], smooth: SmoothSettings | None
) -> dict[str, Tensor]:
    """Fold the scales of all groups into the layer, in place; return those that were really applied.

    A group without absorber is left alone: its scale is for the transform to apply online.
    """
    applied = dict(scales)
    for group in spec.groups:
        absorbing = absorbers(group, smooth)
        if group.name not in scales or not absorbing:
            continue
        for absorber in absorbing:
            applied[group.name] = absorber.absorb_(layer, applied[group.name])
        scale_columns_([layer.get_submodule(path) for path in (*group.linears, *group.readers)], applied[group.name])
    return applied


def describe_folding(absorbing: Sequence[Absorber]) -> str:
    """Where a group's scale is, for the log: `online`, or `folded into mlp.up_proj`."""
    others = f" and {len(absorbing) - 1} like it" if len(absorbing) > 1 else ""
    return f"folded into {absorbing[0]}{others}" if absorbing else "online"


def describe_order(group: InputGroup, order: Tensor | None) -> str:
    """Where a group's channels are put into another order, for the log."""
    if order is None:
        return "as it was" + ("" if group.ordered else ", nothing upstream can take another")
    others = f" and {len(group.ordered) - 1} like it" if len(group.ordered) > 1 else ""
    return f"folded into {group.ordered[0]}{others}"
