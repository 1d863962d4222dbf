"""Two things that every part of the arithmetic needs: enough precision, and large tensors in small pieces."""

import torch
from torch import Tensor

PART_ELEMENTS = 2**20  # of a large weight that are worked on at once: small enough for caches and for reused memory


def widen(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def row_parts(weight: Tensor) -> list[slice]:
    """Slices of the first dimension that cut `weight` [O, …] into parts of a size whose temporary copies are cheap."""
    rows = max(1, PART_ELEMENTS // max(1, weight[0].numel())) if len(weight) else 1
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]
