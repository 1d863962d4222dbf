"""Integer products on CPUs that multiply bytes (VNNI), through oneDNN as torch offers it.

A weight at rest is packed. What a product reads is made of it at every call, for some outputs at a time, a byte for a
code, which `torch._int_mm` multiplies; or once, in oneDNN's own order, for `qlinear_pointwise`: half the size of a
float16 weight. The latter takes the unsigned bytes of an activation as they are (given signed ones it goes a way that
is a thousand times slower), the former signed bytes only.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from duquant.formats import IntegerFormat
from duquant.ops.base import RowCodes, encode
from duquant.packing import PackedCodes, pack_last, unpack
from duquant.quantizer import Quantizer

PART_CODES = 2**22  # codes of a packed weight that are bytes at once


class ByteWeight(NamedTuple):
    """A weight [O, C] for the product, ŵ = s_w (b − z_w).

    `values`: its packed codes b; or, if they are kept, b − h as int8 in oneDNN's order; h is half of the codes' range.
    `scale` s_w [O]; `sides` [2, O]: −s_w Σ(b − h) and −s_w (z_w − h), which are small: float32 loses little of them.
    """

    values: PackedCodes | Tensor
    scale: Tensor
    sides: Tensor
    form: IntegerFormat


class ByteKernel:
    """`Kernel` on a CPU with VNNI."""

    name, recovers = "oneDNN, bytes (VNNI)", True
    traceable = False  # oneDNN's own tensors

    @staticmethod
    def available() -> bool:
        """Whether this machine has the instructions, and this torch the operators."""
        operators = hasattr(torch, "_int_mm") and hasattr(torch.ops.onednn, "qlinear_pointwise")
        return operators and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()

    def serves(self, x: IntegerFormat, weight: IntegerFormat) -> bool:
        """Codes of up to 8 bits."""
        return x.bits <= 8 and weight.bits <= 8

    def encode(self, x: Tensor, transform: nn.Module, shift: Tensor | None, quantizer: Quantizer) -> RowCodes:
        """See `Kernel.encode`."""
        return encode(x, transform, shift, quantizer)

    def prepare(self, packed: PackedCodes, sums: Tensor, form: IntegerFormat, keep: bool) -> ByteWeight:
        """See `Kernel.prepare`."""
        scale, zero, half = packed.scale.flatten(), packed.zero.flatten(), half_range(form)
        sides = torch.stack(((sums - half * packed.channels).to(zero.dtype), zero - half)).mul_(-scale)
        values = torch.ops.onednn.qlinear_prepack(signed_bytes(packed, form), None) if keep else packed
        return ByteWeight(values, scale, sides, form)

    def packed(self, weight: ByteWeight, form: IntegerFormat) -> Tensor:
        """See `Kernel.packed`."""
        return pack_last(weight.values.to_dense().t().view(torch.uint8) + half_range(form), form)

    def linear(self, x: RowCodes, weight: ByteWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Kernel.linear`; off by a few units in the last place, in float32, of the largest term."""
        multiply = _multiply_packed if isinstance(weight.values, PackedCodes) else _multiply_kept
        # y = s_x (s_w a(b − h)ᵀ − z_x s_w Σ(b − h) − (Σa − C z_x) s_w (z_w − h) + bias/s_x): all but the product, as a
        # product of matrices of rank 3
        columns, rows = [x.zero, x.sums - x.values.shape[1] * x.zero], weight.sides
        if bias is not None:
            columns, rows = [*columns, 1 / x.scale], torch.cat((rows, bias[None].to(rows.dtype)))
        return multiply(x, weight, columns, rows).to(dtype)


def half_range(form: IntegerFormat) -> int:
    """h: codes less this are signed bytes about zero."""
    return 2 ** (form.bits - 1)


def signed_bytes(packed: PackedCodes, form: IntegerFormat) -> Tensor:
    """b − h [O, C], int8."""
    return (unpack(packed, form).values - half_range(form)).view(torch.int8).contiguous()


def _multiply_kept(x: RowCodes, weight: ByteWeight, columns: list[Tensor], rows: Tensor) -> Tensor:
    zeros = torch.zeros(len(weight.scale), dtype=torch.int64)
    inputs, result = (
        (x.values, 1.0, 0, weight.values, weight.scale, zeros, None),
        (1.0, 0, torch.float32, "none", [], ""),
    )
    product = torch.ops.onednn.qlinear_pointwise(*inputs, *result)
    return product.addmm_(torch.cat(columns, dim=1), rows).mul_(x.scale)


def _multiply_packed(x: RowCodes, weight: ByteWeight, columns: list[Tensor], rows: Tensor) -> Tensor:
    values, (zero, *others) = x.values, columns
    if x.form.bits == 8:
        values, zero = values.bitwise_xor(128), zero - 128  # signed bytes
    y, left = torch.empty(len(values), len(weight.scale)), torch.cat((zero, *others), dim=1)
    step = max(1, PART_CODES // weight.values.channels)
    for start in range(0, len(weight.scale), step):
        part = slice(start, start + step)
        other = signed_bytes(weight.values.rows(part), weight.form)
        product = torch._int_mm(values.view(torch.int8), other.t()).float().mul_(weight.scale[part])
        torch.mul(product.addmm_(left, rows[:, part]), x.scale, out=y[:, part])
    return y
