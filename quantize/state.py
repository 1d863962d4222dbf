"""What quantizing one layer decided: enough to do it again, bit for bit, without searching or training."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from duquant.formats import Codes
from duquant.packing import PackedCodes
from quantize.spec import DecoderSpec

CODES = ("values", "scale", "zero", "base")  # the parts of `Codes`, and with `channels` those of `PackedCodes`
COMPACT = {torch.int64: torch.int32}  # permutations; everything else keeps its dtype, so that the result is the same


@dataclass(frozen=True)
class GroupState:
    """One input group: the smoothing scale as computed [C] (None without smoothing), rotations [n+1, B, B] and
    permutations [n, C]. `shift` [C] of the transformed input, its clip `ratios` [2] and the `base` [1] of its format,
    where there are any. `order` [C]: the permutation of its channels that was folded upstream, behind the scale, if one
    was."""

    scale: Tensor | None
    rotations: Tensor
    permutations: Tensor
    shift: Tensor | None = None
    ratios: Tensor | None = None
    base: Tensor | None = None
    order: Tensor | None = None

    def to(self, device: torch.device) -> "GroupState":
        """The same with its tensors on `device`."""
        return GroupState(**{name: tensor.to(device) for name, tensor in self.tensors().items()} | self._absent())

    def tensors(self) -> dict[str, Tensor]:
        """Field → tensor, of those that are there."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: tensor for name, tensor in values.items() if tensor is not None}

    def _absent(self) -> dict[str, None]:
        return {each.name: None for each in fields(self) if getattr(self, each.name) is None}


@dataclass
class LayerState:
    """Groups by name, and by path the clip logits (low, high) of linears with learned clipping.

    `weights`, by path: codes that depend on samples, so that they cannot be made again without. `attention`: tensors of
    the attention quantizer under their names in its `state_dict`; `values` [kv heads, D, D]: the matrices folded into v
    and o. `stored`: this is a saved model's layer. All its weights are in `weights`, and what goes upstream is in them
    already and not here.
    """

    groups: dict[str, GroupState] = field(default_factory=dict)
    clips: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    weights: dict[str, PackedCodes | Codes | Tensor] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)
    values: Tensor | None = None
    stored: bool = False

    @property
    def scales(self) -> dict[str, Tensor]:
        """The smoothing scales by group name."""
        return {name: group.scale for name, group in self.groups.items() if group.scale is not None}

    @property
    def orders(self) -> dict[str, Tensor]:
        """The orders of channels that were folded upstream by group name."""
        return {name: group.order for name, group in self.groups.items() if group.order is not None}

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(iter(self.groups.values())).rotations.device

    def tensors(self) -> dict[str, Tensor]:
        """Flat and compact, on the host: `groups.<name>.<field>`, `weights.<path>.<part>` and so on."""
        return {name: tensor.cpu().to(COMPACT.get(tensor.dtype, tensor.dtype)) for name, tensor in self._named()}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name, group in self.groups.items():
            for part, tensor in group.tensors().items():
                yield f"groups.{name}.{part}", tensor
        for path, (low, high) in self.clips.items():
            yield f"clips.{path}.low", low
            yield f"clips.{path}.high", high
        for path, codes in self.weights.items():
            for part, tensor in codes.tensors().items():
                yield f"weights.{path}.{part}", tensor
        for name, tensor in self.attention.items():
            yield f"attention.{name}", tensor
        if self.values is not None:
            yield "values", self.values

    def to(self, device: torch.device) -> "LayerState":
        """The same state with its tensors on `device`."""

        def moved(tensors: dict) -> dict:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        clips = {path: (low.to(device), high.to(device)) for path, (low, high) in self.clips.items()}
        values = None if self.values is None else self.values.to(device)
        parts = (moved(self.weights), moved(self.attention), values, self.stored)
        return LayerState(moved(self.groups), clips, *parts)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], spec: DecoderSpec) -> "LayerState":
        """The inverse of `tensors`. Raises KeyError, naming it, for a tensor that is not there."""
        state = cls(values=tensors.get("values"))
        for group in spec.groups:
            prefix = f"groups.{group.name}"
            permutations = tensors[f"{prefix}.permutations"].to(torch.int64)
            scale, *others = (tensors.get(f"{prefix}.{part}") for part in ("scale", "shift", "ratios", "base"))
            order = tensors.get(f"{prefix}.order")
            order = None if order is None else order.to(torch.int64)
            found = GroupState(scale, tensors[f"{prefix}.rotations"], permutations, *others, order)
            state.groups[group.name] = found
            for path in group.linears:
                if f"clips.{path}.low" in tensors:
                    state.clips[path] = (tensors[f"clips.{path}.low"], tensors[f"clips.{path}.high"])
                if f"weights.{path}.{CODES[0]}" in tensors:
                    state.weights[path] = read_codes(tensors, f"weights.{path}")
        inner = "attention."
        state.attention = {name.removeprefix(inner): each for name, each in tensors.items() if name.startswith(inner)}
        return state


def read_codes(tensors: dict[str, Tensor], prefix: str) -> PackedCodes | Codes:
    """What `tensors()` of either wrote; whole bytes for every code were written by earlier versions."""
    parts = {part: tensors.get(f"{prefix}.{part}") for part in CODES}
    channels = tensors.get(f"{prefix}.channels")
    return Codes(**parts) if channels is None else PackedCodes(**parts, channels=channels.item())


@dataclass(frozen=True)
class FinishedLayer:
    """What was decided for a layer, and its figures (those of `LayerReport`, as JSON)."""

    state: LayerState
    figures: dict
