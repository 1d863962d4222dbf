"""Looking on while layers are quantized: progress, tracking, checkpoints, the report. Nothing here changes a result."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantize.spec import DecoderSpec, InputGroup
from quantize.state import FinishedLayer


class Observer:
    """Is told of every step; each method does nothing until a subclass needs it.

    Layers and activations are those of the run, on its device: they are looked at and left as they are.
    """

    def samples(self, hidden: Tensor, device: torch.device) -> None:
        """The calibration samples [N, T, C] that will enter the first layer, on the host."""

    def layer_begins(self, layer: nn.Module, index: int, spec: DecoderSpec, kwargs: dict) -> None:
        """`layer` is about to be quantized; it is in full precision. `kwargs`: what it is called with."""

    def searched(self, group: InputGroup, peaks: Sequence[Tensor]) -> None:
        """A transform was searched; `peaks` as in `TransformSearch`."""

    def rounding(self, group: InputGroup, path: str, linear: nn.Module) -> None:
        """The `OpenLinear` at `path` is about to be rounded, with its final clip."""

    def group_built(self, layer: nn.Module, group: InputGroup, kwargs: dict, folded: Tensor | None) -> None:
        """The linears of a group are replaced. `folded` [C]: what was divided out of its input upstream, if it was."""

    def layer_built(self, layer: nn.Module, kwargs: dict) -> dict:
        """`layer` is quantized; what is returned joins its figures, under names of the observer's own."""
        return {}

    def layer_restored(self, layer: nn.Module, kwargs: dict) -> None:
        """`layer` was quantized as an earlier run had decided."""

    def layer_done(self, index: int, finished: FinishedLayer, restored: bool) -> None:
        """Everything of layer `index` is known."""
