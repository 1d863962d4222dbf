"""What all kernels have in common: codes of rows with their sums, and the three steps of an integer product."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from duquant.formats import Codes, IntegerFormat
from duquant.packing import PackedCodes
from duquant.quantizer import Quantizer

PART_ELEMENTS = 2**19  # of an activation that a CPU works on at once: two megabytes of float32


@dataclass(frozen=True)
class RowCodes:
    """Rows that are quantized with one range each, for the product.

    `values` [T, C] uint8, of `form`; `scale` and `zero` [T, 1] float32; `sums` [T, 1], whole: of the codes of each row.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor
    sums: Tensor
    form: IntegerFormat

    @property
    def codes(self) -> Codes:
        """Without the sums."""
        return Codes(self.values, self.scale, self.zero)

    @cached_property
    def made(self) -> dict[Any, Any]:
        """What a kernel made of them for one linear, for the next ones that read them."""
        return {}


class Kernel(Protocol):
    """Integer products on one kind of device, in three steps. `weight` is whatever `prepare` returns."""

    name: str
    recovers: bool
    traceable: bool  # by torch.compile

    def serves(self, x: IntegerFormat, weight: IntegerFormat) -> bool:
        """Whether it multiplies codes of these formats, one range to a row each."""

    def encode(self, x: Tensor, transform: nn.Module, shift: Tensor | None, quantizer: Quantizer) -> RowCodes:
        """The codes of T(x) − shift, `x` [T, C]: those that fake quantization rounds to."""

    def prepare(self, packed: PackedCodes, sums: Tensor, form: IntegerFormat, keep: bool) -> Any:
        """What the product reads of a weight [O, C]; `sums` [O] of its codes. `keep`: fast, else small."""

    def packed(self, weight: Any, form: IntegerFormat) -> Tensor:
        """The packed codes of what `prepare` kept, where `recovers` says so: they need not be held beside it."""

    def linear(self, x: RowCodes, weight: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x̂ ŵᵀ + b [T, O] in `dtype`, rounded to it from float32."""


def encode(x: Tensor, transform: nn.Module, shift: Tensor | None, quantizer: Quantizer) -> RowCodes:
    """`Kernel.encode` in torch, some rows at a time: all that is made of them stays in caches."""

    def encoded(rows: Tensor) -> tuple[Tensor, ...]:
        rows = transform(rows)
        rows = quantizer.vectors(rows if shift is None else rows - shift)
        parameters = quantizer.parameters(rows)
        rounded = quantizer.format.rounded(rows, parameters)
        sums = rounded.sum(dim=1, keepdim=True)  # whole numbers below 2^24: exact
        return rounded.to(quantizer.format.dtype), *(each.float() for each in (*parameters, sums))

    number = -(-x.numel() // PART_ELEMENTS) if x.device.type == "cpu" else 1
    parts = [encoded(part) for part in (x.chunk(number) if number > 1 else [x])]
    joined = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts, strict=True))
    return RowCodes(*joined, quantizer.format)
