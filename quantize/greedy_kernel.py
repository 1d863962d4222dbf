"""A greedy step in one launch on a GPU: rows are rotated where they lie, and their extremes found on the way.

Tiles of rows are multiplied by S(d) on the tensor cores, factors taken as sums of two float16 numbers. A step is exact
to 2⁻²² of a row's largest entry, n steps to n times that, since tensor cores cut sums off: where two channels tie
closer, either may be exchanged. The rotation itself is multiplied up in float64, as everywhere.
"""

from __future__ import annotations  # the annotations name what is not there without Triton

from functools import cache

import torch
from torch import Tensor

from duquant.ops.fused import tried
from duquant.ops.triton import available
from duquant.ops.triton_launch import AS_WRITTEN, HALVED_BLOCKS, on, processors
from duquant.ops.triton_quantize import MATRIX_FACTOR, halves, nothing, power_of_two
from duquant.ops.triton_tools import interpreted, jit, tl, triton

TILE = (32, 4, 2)  # rows, warps, programs for each multiprocessor


@jit(do_not_specialize=["number"])
def rotate_rows(
    x, step, lows, highs, exchanges, rows, number, B: tl.constexpr, MATRIX_FACTOR: tl.constexpr, BLOCK_T: tl.constexpr
):
    """x [rows, B] ← x · S(d) for step `number`, d being the channel of the largest magnitude before it.

    `lows`, `highs` [steps + 1, B]: the channels' extremes before each step; those behind it are widened to them.
    """
    k = tl.arange(0, B)
    before, behind = number * B + k, (number + 1) * B + k
    d = tl.argmax(tl.maximum(tl.load(highs + before), -tl.load(lows + before)), axis=0)
    if tl.program_id(0) == 0:
        tl.store(exchanges + number, d.to(tl.int64))
    index = tl.where(k == d, 0, tl.where(k == 0, d, k))
    r_high, r_low = halves(tl.load(step + index[:, None] * B + index[None, :]) * MATRIX_FACTOR)
    low, high = nothing(B)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_T), tl.num_programs(0)):
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        at, inside = t.to(tl.int64)[:, None] * B + k[None, :], (t < rows)[:, None] & (k < B)[None, :]
        part = tl.load(x + at, mask=inside, other=0)
        factor, inverse = power_of_two(tl.max(tl.abs(part), axis=1))
        x_high, x_low = halves(part * factor[:, None])
        total = tl.dot(x_low, r_high, tl.dot(x_high, r_low))
        total = tl.dot(x_high, r_high, total) * (inverse * (1.0 / MATRIX_FACTOR))[:, None]
        tl.store(x + at, total, mask=inside)
        low = tl.minimum(low, tl.min(tl.where(inside, total, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, total, float("-inf")), axis=0))
    tl.atomic_min(lows + behind, low, sem="relaxed")
    tl.atomic_max(highs + behind, high, sem="relaxed")


def serves(columns: Tensor) -> bool:
    """Whether `take_steps` takes `columns` [B, A]."""
    fits = len(columns) in HALVED_BLOCKS and columns.dtype is torch.float32
    return fits and type(columns) is Tensor and columns.device.type == "cuda" and works("cuda", len(columns))


@cache
def works(device: str, size: int) -> bool:
    """Whether steps on blocks of `size` are those that are exact on a type of device. Tried and announced once."""
    if not available(torch.device(device)):
        return False
    return tried(f"a greedy step on blocks of {size}", lambda: trial(torch.device(device), size))


def trial(device: torch.device, size: int) -> bool:
    """Whether two steps on a few rows exchange the right channels, and leave what is right in float64 to 2⁻¹⁸."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, size, generator=generator)
    x[40, 1] = 100
    step = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    found, exchanges, *_ = take_steps(
        x.to(device).T, torch.ones(1, dtype=torch.int64, device=device), step.to(device), 2
    )
    exact, expected = x.double(), [1]
    for _ in range(2):
        index = torch.arange(size)
        index[0], index[expected[-1]] = expected[-1], 0
        exact = exact @ step.double()[index][:, index]
        expected.append(int(exact.abs().amax(dim=0).argmax()))
    close = (found.T.cpu() - exact).abs().max() < exact.abs().max() * 2**-18
    return exchanges.tolist() == expected and bool(close)


def take_steps(columns: Tensor, exchange: Tensor, step: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize.greedy.take_steps` by the rule of channels; `columns` [B, A] are laid out as rows, here as there."""
    size, active = columns.shape
    rows, step = columns.T.clone(memory_format=torch.contiguous_format), step.contiguous()
    # before the first step all that is known is what it exchanges
    lows, highs = (torch.full((count + 1, size), sign * torch.inf, device=rows.device) for sign in (1, -1))
    highs[0].index_fill_(0, exchange, torch.inf)
    exchanges = exchange.new_empty(count)
    most, warps, programs = TILE
    block = 16 if interpreted() else most
    programs = min(triton.cdiv(active, block), processors(rows.device) * programs)
    with on(rows.device):
        for number in range(count):
            rotate_rows[(programs,)](
                rows, step, lows, highs, exchanges, active, number,
                B=size, MATRIX_FACTOR=MATRIX_FACTOR, BLOCK_T=block, num_warps=warps, num_stages=1, **AS_WRITTEN,
            )  # fmt: skip
    lows, highs = lows[1:], highs[1:]
    last = torch.maximum(highs[-1], -lows[-1]).argmax().view(1)
    return rows.T, torch.cat([exchanges, last]), lows.amin(dim=1), highs.amax(dim=1)
