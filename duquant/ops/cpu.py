"""Integer products on CPUs that multiply bytes (VNNI), through oneDNN as torch offers it.

A weight at rest is packed. What a product reads is made of it at every call, for some outputs at a time, a byte for a
code, which `torch._int_mm` multiplies; or once, in oneDNN's own order, for `qlinear_pointwise`: half the size of a
float16 weight. The latter takes the unsigned bytes of an activation as they are (given signed ones it goes a way that
is a thousand times slower), the former signed bytes only.

At every call the codes of a byte are not put beside each other again, which takes many passes: first come the first
codes of all bytes, then the second, each left in the highest bits of its own byte, and the channels of the activation
come in the same order.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from duquant.formats import IntegerFormat
from duquant.ops.base import RowCodes, encode
from duquant.packing import PackedCodes, pack_last, unpack
from duquant.quantizer import Quantizer

PART_CODES = 2**23  # codes of a packed weight that are bytes at once


class ByteWeight(NamedTuple):
    """A weight [O, C] for the product, ŵ = s_w (b − z_w).

    `values`: its packed codes b; or, if they are kept, b − h as int8 in oneDNN's order; h is half of the codes' range.
    `scale` [O]: s_w, over what the product takes b − h times. `sides` [2, O]: −s_w Σ(b − h) and −s_w (z_w − h), which
    are small: float32 loses little of them.
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
        if not keep:
            return ByteWeight(packed, scale / 2 ** spare_bits(form), sides, form)
        return ByteWeight(torch.ops.onednn.qlinear_prepack(signed_bytes(packed, form), None), scale, sides, form)

    def packed(self, weight: ByteWeight, form: IntegerFormat) -> Tensor:
        """See `Kernel.packed`."""
        return pack_last(weight.values.to_dense().t().view(torch.uint8) + half_range(form), form)

    def linear(self, x: RowCodes, weight: ByteWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Kernel.linear`; off by a few units in the last place, in float32, of the largest term."""
        multiply = _multiply_packed if isinstance(weight.values, PackedCodes) else _multiply_kept
        rows = weight.sides if bias is None else torch.cat((weight.sides, bias[None].to(weight.sides.dtype)))
        return multiply(x, weight, rows).to(dtype)


def half_range(form: IntegerFormat) -> int:
    """h: codes less this are signed bytes about zero."""
    return 2 ** (form.bits - 1)


def spare_bits(form: IntegerFormat) -> int:
    """The bits of a byte that a code leaves."""
    return 8 - form.bits


def signed_bytes(packed: PackedCodes, form: IntegerFormat) -> Tensor:
    """b − h [O, C], int8."""
    return (unpack(packed, form).values - half_range(form)).view(torch.int8).contiguous()


def high_bytes(packed: Tensor, form: IntegerFormat) -> Tensor:
    """2^s (b − h), int8, with s the spare bits of a byte: packed codes [O, W] → [O, n W], first codes first.

    Without its highest bit, and that inverted, a code is b − h in two's complement; so it is in the highest bits of a
    byte, whose others are cleared.
    """
    number, spare = max(1, form.per_byte), spare_bits(form)
    signs = sum(half_range(form) << index * form.bits for index in range(number))
    signed, parts = packed.bitwise_xor(signs), packed.new_empty(len(packed), number, packed.shape[1])
    for index, part in enumerate(parts.unbind(1)):
        torch.bitwise_left_shift(signed, spare - index * form.bits, out=part)
        if index:
            part.bitwise_and_(256 - 2**spare)
    return parts.flatten(1).view(torch.int8)


def in_parts(values: Tensor, number: int) -> Tensor:
    """Channels [T, C] in the order of `high_bytes`: [T, n ⌈C/n⌉], those that are missing 0."""
    if number < 2:
        return values
    missing = -values.shape[1] % number
    values = pad(values, (0, missing)) if missing else values
    return values.unflatten(1, (-1, number)).transpose(1, 2).flatten(1)


def _terms(x: RowCodes) -> Tensor:
    """What the rows have in y = s_x (s_w a(b − h)ᵀ − z_x s_w Σ(b − h) − (Σa − C z_x) s_w (z_w − h) + bias/s_x): [T, 3].

    All but the first product is one of matrices of rank 3; of rank 2 without a bias.
    """
    if "terms" not in x.made:
        x.made["terms"] = torch.cat((x.zero, x.sums - x.values.shape[1] * x.zero, 1 / x.scale), dim=1)
    return x.made["terms"]


def _signed(x: RowCodes, number: int) -> tuple[Tensor, Tensor]:
    """The codes as signed bytes in parts, [T, n ⌈C/n⌉], and the terms [T, 3] that go with them."""
    if number not in x.made:
        values, terms = x.values, _terms(x)
        if x.form.bits == 8:
            values, terms = values.bitwise_xor(128), terms - terms.new_tensor((128, 0, 0))
        x.made[number] = in_parts(values.view(torch.int8), number), terms
    return x.made[number]


@cache
def _zeros(number: int) -> Tensor:
    return torch.zeros(number, dtype=torch.int64)


def _multiply_kept(x: RowCodes, weight: ByteWeight, rows: Tensor) -> Tensor:
    inputs, result = (
        (x.values, 1.0, 0, weight.values, weight.scale, _zeros(len(weight.scale)), None),
        (1.0, 0, torch.float32, "none", [], ""),
    )
    product = torch.ops.onednn.qlinear_pointwise(*inputs, *result)
    return product.addmm_(_terms(x)[:, : len(rows)], rows).mul_(x.scale)


def _multiply_packed(x: RowCodes, weight: ByteWeight, rows: Tensor) -> Tensor:
    values, terms = _signed(x, max(1, weight.form.per_byte))
    terms, packed = terms[:, : len(rows)], weight.values.values
    y, step = torch.empty(len(values), len(packed)), max(1, PART_CODES // weight.values.channels)
    for start in range(0, len(packed), step):
        part = slice(start, start + step)
        product = torch._int_mm(values, high_bytes(packed[part], weight.form).t()).float().mul_(weight.scale[part])
        torch.mul(product.addmm_(terms, rows[:, part]), x.scale, out=y[:, part])
    return y
