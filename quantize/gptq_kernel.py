"""The columns of a block that GPTQ rounds in turn, in one launch on a GPU: rows share nothing, and stay in registers.

By torch a column is nine launches, and a model of 7B has 745,000 columns. The arithmetic is torch's, but that products
are rounded before they are added.
"""

from __future__ import annotations  # the annotations name what is not there without Triton

from functools import cache

import torch
from torch import Tensor

from duquant.formats import Format, IntegerFormat
from duquant.ops.fused import tried
from duquant.ops.triton import available
from duquant.ops.triton_launch import AS_WRITTEN, on, power_of_two
from duquant.ops.triton_quantize import ROUNDING, rounded
from duquant.ops.triton_tools import interpreted, jit, tl, triton

TILE = (4, 1)  # rows, warps: sums over a row need none of another warp
ALIKE = 0.98  # of a trial's rows: one may have a weight on a tie, behind which it is another


@jit
def round_block(
    weight, now, errors, scale, zero, upper, rows, columns, w_row, w_column, s_row, s_column, z_row, z_column, u_row,
    BITS: tl.constexpr, ROUNDING: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """`quantize.gptq.round_columns` of `weight` into `now`, `errors` [rows, columns], of columns ≤ BLOCK_B.

    Strides: `w_row`, …; those of `now` and `errors` are (columns, 1), the second of `upper` is 1.
    """
    o, k = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_B)
    inside = (o < rows)[:, None] & (k < columns)[None, :]
    row, at = o.to(tl.int64)[:, None], o.to(tl.int64)[:, None] * columns + k[None, :]
    left = tl.load(weight + row * w_row + k[None, :] * w_column, mask=inside, other=0)
    steps = tl.load(scale + row * s_row + k[None, :] * s_column, mask=inside, other=1)
    zeros = tl.load(zero + row * z_row + k[None, :] * z_column, mask=inside, other=0)
    off = tl.zeros([BLOCK_O, BLOCK_B], tl.float32)
    for j in range(columns):
        own = (k == j)[None, :]
        w = tl.sum(tl.where(own, left, 0), axis=1)
        step, middle = tl.sum(tl.where(own, steps, 0), axis=1), tl.sum(tl.where(own, zeros, 0), axis=1)
        kept = (rounded(w, step, middle, BITS, ROUNDING) - middle) * step
        error = tl.div_rn(w - kept, tl.broadcast_to(tl.load(upper + j * u_row + j), w.shape))
        later = tl.load(upper + j * u_row + k, mask=(k > j) & (k < columns), other=0)
        left -= error[:, None] * later[None, :]
        off = tl.where(own, error[:, None], off)
    tl.store(now + at, left, mask=inside)
    tl.store(errors + at, off, mask=inside)


def serves(weight: Tensor, form: Format) -> bool:
    """Whether `round_columns` takes blocks like `weight` [O, B] for codes of this format."""
    if type(weight) is not Tensor or weight.device.type != "cuda" or weight.dtype is not torch.float32:
        return False
    return isinstance(form, IntegerFormat) and works("cuda", form)


@cache
def works(device: str, form: IntegerFormat) -> bool:
    """Whether the kernel rounds as torch does on a type of device. Tried and announced once."""
    what = f"GPTQ's rounding of a block to {form.bits} bits"
    return available(torch.device(device)) and tried(what, lambda: trial(torch.device(device), form))


def trial(device: torch.device, form: IntegerFormat) -> bool:
    """Whether all rows but a few of some have the codes and the errors that torch finds on a CPU."""
    from quantize.gptq import round_columns as by_torch  # which looks for this module

    generator = torch.Generator().manual_seed(0)
    weight, upper = (torch.randn(64, 24, generator=generator) for _ in range(2))
    upper = upper[:24].triu() / 10 + torch.eye(24)
    own = form.parameters(*(each[:, None].expand(-1, 24) for each in torch.aminmax(weight, dim=1)))
    expected, errors = by_torch(weight, *own, upper, form)
    now, found = (each.cpu() for each in round_columns(*(each.to(device) for each in (weight, *own, upper)), form))
    same = form.encode(now, own).values == form.encode(expected, own).values
    close = torch.isclose(found, errors, rtol=0, atol=2**-16)
    return bool((same & close).all(dim=1).double().mean() >= ALIKE)


def round_columns(
    weight: Tensor, scale: Tensor, zero: Tensor, upper: Tensor, form: IntegerFormat
) -> tuple[Tensor, Tensor]:
    """`quantize.gptq.round_columns` by the kernel, for float32."""
    (rows, columns), (most, warps) = weight.shape, TILE
    most = 16 if interpreted() else most
    now, errors = weight.new_empty(2, rows, columns)
    upper = upper if upper.stride(1) == 1 else upper.contiguous()
    with on(weight.device):
        round_block[(triton.cdiv(rows, most),)](
            weight, now, errors, scale, zero, upper, rows, columns,
            *weight.stride(), *scale.stride(), *zero.stride(), upper.stride(0),
            BITS=form.bits, ROUNDING=ROUNDING, BLOCK_O=most, BLOCK_B=power_of_two(columns, 16, 64),
            num_warps=warps, **AS_WRITTEN,
        )  # fmt: skip
    return now, errors
