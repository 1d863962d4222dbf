"""Two things that every part of the arithmetic needs: enough precision, and large tensors in small pieces."""

import torch
from torch import Tensor

PART_ELEMENTS = 2**20  # of a large weight that are worked on at once: small enough for caches and for reused memory
GPU_PART_ELEMENTS = 2**25  # on a GPU, where launches are what costs: 128 MB in float32


def widen(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def extremes(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The least and the largest entries of `x` along a dimension, which goes."""
    # a CPU reads twice in a tenth of the time that it takes for both at once, which older torch cannot differentiate
    if x.device.type == "cpu" or x.requires_grad:
        return x.amin(dim=dim), x.amax(dim=dim)
    return torch.aminmax(x, dim=dim)


def row_parts(weight: Tensor) -> list[slice]:
    """Slices of the first dimension that cut `weight` [O, …] into parts of a size whose temporary copies are cheap."""
    elements = PART_ELEMENTS if weight.device.type == "cpu" else GPU_PART_ELEMENTS
    rows = max(1, elements // max(1, weight[0].numel())) if len(weight) else 1
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]
