"""What quantizing one layer decided: enough to do it again, bit for bit, without searching or training."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duquant.formats import Codes
from quantize.spec import DecoderSpec

COMPACT = {torch.int64: torch.int32}  # permutations; everything else keeps its dtype, so that the result is the same


@dataclass(frozen=True)
class GroupState:
    """One input group: the smoothing scale as computed [C] (None without smoothing), rotations [n+1, B, B] and
    permutations [n, C]."""

    scale: Tensor | None
    rotations: Tensor
    permutations: Tensor

    def to(self, device: torch.device) -> "GroupState":
        """The same with its tensors on `device`."""
        scale = None if self.scale is None else self.scale.to(device)
        return GroupState(scale, self.rotations.to(device), self.permutations.to(device))


@dataclass
class LayerState:
    """Groups by name, and by path the clip logits (low, high) of linears with learned clipping.

    `weights`, by path, are those of a saved model: they were scaled, transformed and rounded then, and the scales of
    its groups are those that stay online.
    """

    groups: dict[str, GroupState] = field(default_factory=dict)
    clips: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    weights: dict[str, Codes | Tensor] = field(default_factory=dict)

    @property
    def scales(self) -> dict[str, Tensor]:
        """The smoothing scales by group name."""
        return {name: group.scale for name, group in self.groups.items() if group.scale is not None}

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(iter(self.groups.values())).rotations.device

    def tensors(self) -> dict[str, Tensor]:
        """Flat and compact, on the host: `groups.<name>.<field>` and `clips.<path>.<low|high>`."""
        return {name: tensor.cpu().to(COMPACT.get(tensor.dtype, tensor.dtype)) for name, tensor in self._named()}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name, group in self.groups.items():
            if group.scale is not None:
                yield f"groups.{name}.scale", group.scale
            yield f"groups.{name}.rotations", group.rotations
            yield f"groups.{name}.permutations", group.permutations
        for path, (low, high) in self.clips.items():
            yield f"clips.{path}.low", low
            yield f"clips.{path}.high", high

    def to(self, device: torch.device) -> "LayerState":
        """The same state with its tensors on `device`."""
        groups = {name: group.to(device) for name, group in self.groups.items()}
        clips = {path: (low.to(device), high.to(device)) for path, (low, high) in self.clips.items()}
        return LayerState(groups, clips, {path: weight.to(device) for path, weight in self.weights.items()})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], spec: DecoderSpec) -> "LayerState":
        """The inverse of `tensors`. Raises KeyError, naming it, for a tensor that is not there."""
        state = cls()
        for group in spec.groups:
            prefix = f"groups.{group.name}"
            permutations = tensors[f"{prefix}.permutations"].to(torch.int64)
            scale = tensors.get(f"{prefix}.scale")
            state.groups[group.name] = GroupState(scale, tensors[f"{prefix}.rotations"], permutations)
            for path in group.linears:
                if f"clips.{path}.low" in tensors:
                    state.clips[path] = (tensors[f"clips.{path}.low"], tensors[f"clips.{path}.high"])
        return state


@dataclass(frozen=True)
class FinishedLayer:
    """What was decided for a layer, and its figures (those of `LayerReport`, as JSON)."""

    state: LayerState
    figures: dict
