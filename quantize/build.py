"""From what was decided to a quantized layer: the only place where one is built.

Fresh, resumed, streamed and loaded layers and those of the paper's own checkpoints all go through `LayerBuilder`: a run
that still decides calls its steps one by one, everybody else calls `build_`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from duquant.attention import attach_, make_attention_quantizer
from duquant.formats import Codes, number_format
from duquant.linear import GroupInput, QuantLinear
from duquant.quantizer import make_quantizer
from duquant.tensors import widen
from duquant.transform import DualTransform
from quantize.observer import Observer
from quantize.rounding import OpenLinear
from quantize.settings import GqaSmooth, QuantSettings, SmoothSettings
from quantize.smoothing import scale_columns_
from quantize.spec import Absorber, DecoderSpec, InputGroup, SharedRows
from quantize.state import GroupState, LayerState


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
    builder.begin_(state.scales, state.device, stored=bool(state.weights))
    for group in spec.groups:
        builder.open_(group, state.groups[group.name], state.weights)
        builder.round_(group, state.clips)


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

    def begin_(self, scales: Mapping[str, Tensor], device: torch.device, stored: bool = False) -> None:
        """Fold the smoothing scales [C] by group, and quantize q, k and v; all of it is on `device`.

        With `stored` the weights come later, as codes; scales that were folded are in them and not in `scales`.
        """
        if not stored:
            widen_linears_(self.layer, self.spec)
        self.scales = fold_scales_(self.layer, self.spec, scales, self.settings.smooth)
        attention = self.layer.get_submodule(self.spec.attention)
        attach_(attention, make_attention_quantizer(self.scheme, attention.head_dim, device))

    def online_scale(self, group: InputGroup) -> Tensor | None:
        """The scale [C] that the group's transform divides by; None if there is none or it is upstream."""
        return None if absorbers(group, self.settings.smooth) else self.scales.get(group.name)

    def folded_scale(self, group: InputGroup) -> Tensor | None:
        """The scale [C] that was divided out upstream, if one was."""
        return self.scales.get(group.name) if absorbers(group, self.settings.smooth) else None

    def open_(
        self, group: InputGroup, state: GroupState, weights: Mapping[str, Codes | Tensor] | None = None
    ) -> DualTransform:
        """Put what the group's transform makes of them in the place of its linears; return the transform.

        Weights that are known already, by path, are final; the others wait for `round_`.
        """
        transform = DualTransform(state.rotations, state.permutations, self.online_scale(group))
        # of linears that see other tokens each (experts), none reads what another one has read
        readers = 1 if group.observed else len(group.linears)
        shared = GroupInput(transform, make_quantizer(self.scheme.input), readers)
        for path in group.linears:
            linear = self.layer.get_submodule(path)
            bias = None if linear.bias is None else linear.bias.detach()
            if weights and path in weights:
                self._replace_(path, QuantLinear(weights[path], number_format(self.scheme.weight), bias, shared))
            else:
                weight = transform.transform_weight(linear.weight.detach())
                learned = self.settings.training is not None
                self._replace_(path, OpenLinear(weight, bias, self.scheme.weight, shared, learned))
        return transform

    def round_(self, group: InputGroup, clips: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
        """Round the group's weights for good, under the clip logits (low, high) by path where they are given."""
        for path in group.linears:
            linear = self.layer.get_submodule(path)
            if not isinstance(linear, OpenLinear):
                continue
            if clips and path in clips:
                linear.clip.set_(*clips[path])
            for observer in self.observers:
                observer.rounding(group, path, linear)
            self._replace_(path, linear.rounded(self.dtype))

    def _replace_(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.layer.get_submodule(parent), name, module)


def widen_linears_(layer: nn.Module, spec: DecoderSpec) -> None:
    """Hold the weights of all linears in at least float32 while they are scaled and rotated; rounding narrows them."""
    for group in spec.groups:
        for path in group.linears:
            for parameter in layer.get_submodule(path).parameters():
                parameter.data = widen(parameter)


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
