"""The walk over the decoder layers: each is visited once, by everything that has something to do with it.

    walk(layers, passengers)

`layers` come from the model in memory (`layers_in_memory`) or from its files, one at a time (`models.streaming`); a
passenger carries hidden states from layer to layer: calibration samples for statistics, the probe of the quantization,
test windows of the full-precision network before it and of the quantized network behind it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from quantize.sizes import activation_bytes, layer_groups, widest
from quantize.spec import DecoderSpec
from utils.batching import BatchSize
from utils.capacity import SPARE, free_device_memory
from utils.device import on_device
from utils.log import progress


class Passenger(Protocol):
    """What goes from layer to layer."""

    def visit(self, index: int, layer: nn.Module) -> None:
        """Use `layer`, number `index`, which is on the device; all layers before it were visited."""


def walk(layers: Iterable[nn.Module], passengers: Sequence[Passenger], count: int, label: str = "layers") -> None:
    """Let every passenger, in order, visit each of the `count` layers; `label` is for the progress that is shown."""
    with torch.no_grad():
        for index, layer in enumerate(progress(layers, label, unit="layer", total=count)):
            for passenger in passengers:
                passenger.visit(index, layer)


def layers_in_memory(model: nn.Module, spec: DecoderSpec, device: torch.device) -> Iterator[nn.Module]:
    """The decoder layers of `model`, each on `device` while it is in use and on the host before and after."""
    for layer in spec.decoder_layers(model):
        with on_device(layer, device):
            yield layer


def fit_(batches: BatchSize, layer: nn.Module, spec: DecoderSpec, hidden: Tensor, device: torch.device) -> None:
    """Lower a size that was not given to what fits beside `layer`, with its `spec`, and all else on a GPU by now.

    The samples of `hidden` [n, T, C] may go through a layer whose inputs are rounded.
    """
    free = free_device_memory(device)
    if free is not None:
        width = widest(linear for _, members in layer_groups(layer, spec) for linear in members)
        window = activation_bytes(hidden.shape[1], width, hidden.dtype.itemsize, rounded=True)
        batches.fit_(free * (1 - SPARE), window)
