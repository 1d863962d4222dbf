"""Looking on while layers are quantized: progress, tracking, checkpoints, the report. Nothing here changes a result."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantize.spec import DecoderSpec, InputGroup
from quantize.state import FinishedLayer

logger = logging.getLogger(__name__)


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
        """The `OpenLinear` at `path` is about to be rounded, with its final clip; also in a layer that is restored."""

    def group_built(self, layer: nn.Module, group: InputGroup, kwargs: dict, folded: Tensor | None) -> None:
        """The linears of a group are replaced. `folded` [C]: what was divided out of its input upstream, if it was."""

    def layer_built(self, layer: nn.Module, kwargs: dict) -> dict:
        """`layer` is quantized; what is returned joins its figures, under names of the observer's own."""
        return {}

    def layer_restored(self, layer: nn.Module, kwargs: dict) -> None:
        """`layer` was quantized as an earlier run had decided."""

    def layer_done(self, index: int, finished: FinishedLayer, restored: bool) -> None:
        """Everything of layer `index` is known."""


class LayerLog(Observer):
    """One line per group with the probe's peak through the stages, and one for the layer."""

    def layer_done(self, index: int, finished: FinishedLayer, restored: bool) -> None:
        """Log the layer."""
        if restored:
            logger.info("layer %d: from the checkpoint", index)
            return
        for group in finished.figures["groups"]:
            logger.info("layer %d %s: %s", index, group["name"], describe_group(group))
        trained = describe_training(finished.figures["training"])
        logger.info("layer %d: relative output error %.4f%s", index, finished.figures["output_error"], trained)


def describe_training(training: dict | None) -> str:
    """What training did to the loss, to stand behind other figures; empty without training."""
    if training is None:
        return ""
    told = (
        f", training loss {training['loss_before']:.3e} → {training['loss_after']:.3e} in {training['seconds']:.1f} s"
    )
    norms = training["gradient_norms"]
    if norms and norms[-1] is not None:
        told += f", gradient norm {norms[0] or 0:.1e} → {norms[-1]:.1e}"
    return told + (f" ({training['restored']} steps were not finite)" if training["restored"] else "")


def describe_group(group: dict) -> str:
    """For example `peak 41.2 → smoothed 9.8 → rotation 1 2.3 (37 steps) → permutation 1 2.3 (spread 1.9 → 1.0) …`."""
    parts, spread, steps = [], group["stages"][0]["spread"], iter(group["steps"])
    for stage in group["stages"]:
        note = ""
        if stage["name"].startswith("rotation"):
            note = f" ({next(steps)} steps)"
        elif stage["name"].startswith("permutation"):
            note = f" (block spread {spread:.2f} → {stage['spread']:.2f})"
        parts.append(f"{stage['name']} {stage['peak']:.4g}{note}")
        spread = stage["spread"]
    order = f"; order {group['order']}" if group.get("order") else ""
    return f"peak {' → '.join(parts)}; scale {group['scale']}{order}"
