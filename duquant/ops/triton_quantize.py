"""Triton kernels that transform activations and round them; `duquant.ops.triton` launches them.

The arithmetic is that of `duquant.formats` in float32: divisions are rounded correctly, rounding is to even.
"""

from __future__ import annotations  # the annotations name what is not there without Triton

from duquant.ops.triton_tools import autotuned, jit, tl

ROUNDING = 1.5 * 2**23  # x + this − this: for |x| < 2²² the float nearest to x that is an integer, ties to even

# rows, warps, stages; the first is what the interpreter runs
ROTATE_CONFIGS = [(16, 4, 2), (32, 4, 2), (64, 8, 2)]


@autotuned(("BLOCK_T",), ROTATE_CONFIGS, ["rows_key", "channels", "B"])
@jit
def rotate(
    x, y, rotation, permutation, scale,
    rows, channels, rows_key, x_row, x_channel, y_row, y_channel,
    B: tl.constexpr, GATHER: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[t, bB + j] = Σ_k x[t, p(bB + k)] / s[p(bB + k)] · R[k, j], float32, for one tile of rows and columns.

    p is the permutation, or the identity without GATHER; s is 1 without SCALED. Strides: `x_row`, `x_channel`, ….
    """
    COLUMN_TILES: tl.constexpr = (B + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(1) // COLUMN_TILES * B
    j = tl.program_id(1) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    x_rows = x + t.to(tl.int64)[:, None] * x_row
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, B, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        channel = first + k
        if GATHER:
            channel = tl.load(permutation + channel, mask=k < B, other=0)
        inside = (t < rows)[:, None] & (k < B)[None, :]
        part = tl.load(x_rows + channel.to(tl.int64)[None, :] * x_channel, mask=inside, other=0).to(tl.float32)
        if SCALED:
            divisor = tl.load(scale + channel, mask=k < B, other=1).to(tl.float32)
            part = tl.div_rn(part, tl.broadcast_to(divisor[None, :], part.shape))
        matrix = tl.load(rotation + k[:, None] * B + j[None, :], mask=(k < B)[:, None] & (j < B)[None, :], other=0)
        total = tl.dot(part, matrix.to(tl.float32), total, input_precision=PRECISION)
    y_at = y + t.to(tl.int64)[:, None] * y_row + (first + j).to(tl.int64)[None, :] * y_channel
    tl.store(y_at, total, mask=(t < rows)[:, None] & (j < B)[None, :])


@jit
def vector_part(
    y, scale, shift, vectors, v, i, channels, length, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Channels `i` of the vectors `v`, divided by their scale and less their shift, float32, and which exist."""
    inside = (v < vectors)[:, None] & (i < length)[None, :]
    at = v.to(tl.int64)[:, None] * length + i[None, :]
    part = tl.load(y + at, mask=inside, other=0).to(tl.float32)
    if SCALED:
        part = tl.div_rn(part, tl.load(scale + at % channels, mask=inside, other=1).to(tl.float32))
    if SHIFTED:
        part -= tl.load(shift + at % channels, mask=inside, other=0).to(tl.float32)
    return part, inside


@jit
def quantize(
    y, scale, shift, low_ratio, high_ratio, codes, scales, zeros, sums, vectors, channels, length,
    scale_low, scale_high, zero_low, zero_high,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, PER_BYTE: tl.constexpr,
    ROUNDING: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Codes, scale, zero point and sum of codes of some vectors y [vectors, length], each with a range of its own.

    A row of `channels` holds channels / length vectors. PER_BYTE codes go into a byte; `codes` [vectors, ⌈length / n⌉].
    """
    LARGEST: tl.constexpr = 2**BITS - 1
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    low = tl.full([BLOCK_V], float("inf"), tl.float32)
    high = tl.full([BLOCK_V], float("-inf"), tl.float32)
    for start in range(0, length, BLOCK_C):
        i = start + tl.arange(0, BLOCK_C)
        part, inside = vector_part(y, scale, shift, vectors, v, i, channels, length, SCALED, SHIFTED)
        low = tl.minimum(low, tl.min(tl.where(inside, part, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(inside, part, float("-inf")), axis=1))
    low *= tl.load(low_ratio).to(tl.float32)
    high *= tl.load(high_ratio).to(tl.float32)
    if SYMMETRIC:
        half = tl.full([BLOCK_V], 2 ** (BITS - 1) - 1, tl.float32)
        step = tl.div_rn(tl.maximum(tl.abs(low), tl.abs(high)), half)
        step = tl.minimum(tl.maximum(step, scale_low), scale_high)
        zero = half
    else:
        step = tl.div_rn(high - low, tl.full([BLOCK_V], LARGEST, tl.float32))
        step = tl.minimum(tl.maximum(step, scale_low), scale_high)
        zero = tl.minimum(tl.maximum(tl.div_rn(-low, step), zero_low), zero_high)
        zero = zero + ROUNDING - ROUNDING
    tl.store(scales + v, step, mask=v < vectors)
    tl.store(zeros + v, zero, mask=v < vectors)
    total = tl.zeros([BLOCK_V], tl.int32)
    width = (length + PER_BYTE - 1) // PER_BYTE
    steps = tl.broadcast_to(step[:, None], [BLOCK_V, BLOCK_C])
    for start in range(0, length, BLOCK_C):
        i = start + tl.arange(0, BLOCK_C)
        part, inside = vector_part(y, scale, shift, vectors, v, i, channels, length, SCALED, SHIFTED)
        # beyond 2²² the sum below is no integer, but far outside the codes all the same
        code = tl.div_rn(part, steps) + ROUNDING - ROUNDING + zero[:, None]
        code = tl.minimum(tl.maximum(code, 0.0), LARGEST * 1.0).to(tl.int32)
        code = tl.where(inside, code, 0)
        total += tl.sum(code, axis=1)
        if PER_BYTE > 1:
            lanes = tl.reshape(code, [BLOCK_V, BLOCK_C // PER_BYTE, PER_BYTE])
            code = tl.sum(lanes << (tl.arange(0, PER_BYTE) * BITS)[None, None, :], axis=2)
        byte = start // PER_BYTE + tl.arange(0, BLOCK_C // PER_BYTE)
        at = v.to(tl.int64)[:, None] * width + byte[None, :]
        tl.store(codes + at, code.to(tl.uint8), mask=(v < vectors)[:, None] & (byte < width)[None, :])
    tl.store(sums + v, total, mask=v < vectors)
