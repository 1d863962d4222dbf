"""Triton kernels that transform activations and round them; `duquant.ops.triton` launches them.

The arithmetic is that of `duquant.formats` in float32: divisions are rounded correctly, rounding is to even.
"""

from __future__ import annotations  # the annotations name what is not there without Triton

from duquant.ops.triton_tools import autotuned, jit, tl

ROUNDING = 1.5 * 2**23  # x + this − this: for |x| < 2²² the float nearest to x that is an integer, ties to even
MATRIX_FACTOR = 256.0  # brings a rotation's entries into the middle of what float16 has

# rows, warps, stages; the first is what the interpreter runs
ROTATE_CONFIGS = [(16, 4, 2), (64, 8, 2)]


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
def nothing(SIZE: tl.constexpr):
    """The ends of SIZE ranges in which nothing is: ∞ and −∞."""
    return tl.full([SIZE], float("inf"), tl.float32), tl.full([SIZE], float("-inf"), tl.float32)


@jit
def ends(part, inside, low, high):
    """Ranges low … high widened to a part of their vectors, float32; not numbers where one of it is not."""
    broken = tl.max((part != part).to(tl.int32), axis=1) > 0  # a minimum of Triton passes over those
    least = tl.where(broken, float("nan"), tl.min(tl.where(inside, part, float("inf")), axis=1))
    most = tl.where(broken, float("nan"), tl.max(tl.where(inside, part, float("-inf")), axis=1))
    low = tl.minimum(low, least, propagate_nan=tl.PropagateNan.ALL)
    return low, tl.maximum(high, most, propagate_nan=tl.PropagateNan.ALL)


@jit
def parameters(
    low, high, scale_low, scale_high, zero_low, zero_high,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, INVERTED: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Scale and zero point of ranges low … high, float32.

    SYMMETRIC: `IntegerFormat.kind`. INVERTED: as torch on a GPU, which divides by a number by multiplying with its
    reciprocal.
    """
    FULL: tl.constexpr = SYMMETRIC == 2  # symmetric over the full range
    STEPS: tl.constexpr = 2 ** (BITS - 1) - 1 if SYMMETRIC == 1 else (2**BITS - 1) / (2 if FULL else 1)
    # of a range that is not a number neither is the scale
    span = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL) if SYMMETRIC else high - low
    if INVERTED:  # noqa: SIM108 - only one branch is compiled
        step = span * (1.0 / STEPS)
    else:
        step = tl.div_rn(span, tl.full(span.shape, STEPS, tl.float32))
    if FULL:
        scale_low = 0.0
    step = tl.clamp(step, scale_low, scale_high, propagate_nan=tl.PropagateNan.ALL)
    if FULL:
        step = tl.where(step == 0, 2.0**-23, step)
    if SYMMETRIC:
        zero = tl.full(span.shape, 2 ** (BITS - 1) - (0 if FULL else 1), tl.float32)
    else:
        zero = tl.minimum(tl.maximum(tl.div_rn(-low, step), zero_low), zero_high) + ROUNDING - ROUNDING
    return step, zero


@jit
def rounded(x, steps, zero, BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """The codes of x, float32; `steps` of its shape. Beyond 2²² no integers are added, but far outside the codes."""
    code = tl.div_rn(x, steps) + ROUNDING - ROUNDING + zero
    return tl.minimum(tl.maximum(code, 0.0), 2**BITS - 1.0)


@jit
def quantize(
    y, scale, shift, low_ratio, high_ratio, codes, scales, zeros, sums, vectors, channels, length,
    scale_low, scale_high, zero_low, zero_high,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, PER_BYTE: tl.constexpr,
    INVERTED: tl.constexpr, ROUNDING: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Codes, scale, zero point and sum of codes of some vectors y [vectors, length], each with a range of its own.

    A row of `channels` holds channels / length vectors. PER_BYTE codes go into a byte; `codes` [vectors, ⌈length / n⌉].
    """
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    low, high = nothing(BLOCK_V)
    for start in range(0, length, BLOCK_C):
        i = start + tl.arange(0, BLOCK_C)
        part, inside = vector_part(y, scale, shift, vectors, v, i, channels, length, SCALED, SHIFTED)
        low, high = ends(part, inside, low, high)
    step, zero = parameters(
        low * tl.load(low_ratio).to(tl.float32), high * tl.load(high_ratio).to(tl.float32),
        scale_low, scale_high, zero_low, zero_high, BITS, SYMMETRIC, INVERTED, ROUNDING,
    )  # fmt: skip
    tl.store(scales + v, step, mask=v < vectors)
    tl.store(zeros + v, zero, mask=v < vectors)
    total = tl.zeros([BLOCK_V], tl.int32)
    width = (length + PER_BYTE - 1) // PER_BYTE
    steps = tl.broadcast_to(step[:, None], [BLOCK_V, BLOCK_C])
    for start in range(0, length, BLOCK_C):
        i = start + tl.arange(0, BLOCK_C)
        part, inside = vector_part(y, scale, shift, vectors, v, i, channels, length, SCALED, SHIFTED)
        code = rounded(part, steps, zero[:, None], BITS, ROUNDING).to(tl.int32)
        code = tl.where(inside, code, 0)
        total += tl.sum(code, axis=1)
        if PER_BYTE > 1:
            lanes = tl.reshape(code, [BLOCK_V, BLOCK_C // PER_BYTE, PER_BYTE])
            code = tl.sum(lanes << (tl.arange(0, PER_BYTE) * BITS)[None, None, :], axis=2)
        byte = start // PER_BYTE + tl.arange(0, BLOCK_C // PER_BYTE)
        at = v.to(tl.int64)[:, None] * width + byte[None, :]
        tl.store(codes + at, code.to(tl.uint8), mask=(v < vectors)[:, None] & (byte < width)[None, :])
    tl.store(sums + v, total, mask=v < vectors)


@jit
def fake_quantize(
    x, y, ratios, low_ratio, high_ratio, vectors, length, groups, size_1, size_2,
    x_0, x_1, x_2, y_0, y_1, y_2, scale_low, scale_high, zero_low, zero_high,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, RATIOS: tl.constexpr, INVERTED: tl.constexpr, ROUNDING: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = (q − zero) · scale for the codes q of some vectors of x [·, size_1, size_2, groups · length].

    `x_0` … `y_2`: the strides of the first three dimensions; that of the last is 1. RATIOS: what the ends of a range
    are multiplied by is `ratios` [2], instead of two numbers. WHOLE: a vector fits BLOCK_C, and is read once.
    """
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row, skipped = v // groups, v % groups * length
    first, middle, last = (row // (size_1 * size_2)).to(tl.int64), (row // size_2 % size_1).to(tl.int64), row % size_2
    x_rows = (x + first * x_0 + middle * x_1 + last.to(tl.int64) * x_2 + skipped)[:, None]
    y_rows = (y + first * y_0 + middle * y_1 + last.to(tl.int64) * y_2 + skipped)[:, None]
    i = tl.arange(0, BLOCK_C)[None, :]
    exists = (v < vectors)[:, None]
    if RATIOS:
        low_ratio = tl.load(ratios).to(tl.float32)
        high_ratio = tl.load(ratios + 1).to(tl.float32)
    low, high = nothing(BLOCK_V)
    inside = exists & (i < length)
    part = tl.load(x_rows + i, mask=inside, other=0).to(tl.float32)
    low, high = ends(part, inside, low, high)
    if not WHOLE:
        for start in range(BLOCK_C, length, BLOCK_C):
            inside = exists & (start + i < length)
            part = tl.load(x_rows + start + i, mask=inside, other=0).to(tl.float32)
            low, high = ends(part, inside, low, high)
    step, zero = parameters(
        low * low_ratio, high * high_ratio, scale_low, scale_high, zero_low, zero_high,
        BITS, SYMMETRIC, INVERTED, ROUNDING,
    )  # fmt: skip
    steps = tl.broadcast_to(step[:, None], [BLOCK_V, BLOCK_C])
    if WHOLE:
        result = (rounded(part, steps, zero[:, None], BITS, ROUNDING) - zero[:, None]) * steps
        tl.store(y_rows + i, result.to(y.dtype.element_ty), mask=inside)
    else:
        for start in range(0, length, BLOCK_C):
            inside = exists & (start + i < length)
            part = tl.load(x_rows + start + i, mask=inside, other=0).to(tl.float32)
            result = (rounded(part, steps, zero[:, None], BITS, ROUNDING) - zero[:, None]) * steps
            tl.store(y_rows + start + i, result.to(y.dtype.element_ty), mask=inside)


@jit
def power_of_two(peak):
    """The power of two f with 2¹⁴ ≤ peak · f < 2¹⁵, which float16 holds, and 1 / f; of float32 from 2⁻¹⁰⁷ to 2¹²³."""
    exponent = peak.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 20 << 23), 250 << 23)
    factor = (141 << 23) - (exponent - (127 << 23))
    return factor.to(tl.float32, bitcast=True), (exponent - (14 << 23)).to(tl.float32, bitcast=True)


@jit
def halves(x):
    """float32 as the sum of two float16, exact to 2⁻²² of what is not far below 2⁻²."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@jit(do_not_specialize=["each"])  # or it is compiled anew for one block, and for sixteen
def rotate_halves(
    x, y, rotation, permutation, scale, rows, channels, x_row, x_channel, y_row, y_channel, each,
    B: tl.constexpr, GATHER: tl.constexpr, SCALED: tl.constexpr, EXACT: tl.constexpr, MATRIX_FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """As `rotate` for B of 16, 32, 64 or 128; a program has `each` blocks of its rows, one after the other.

    Factors are float16 numbers, or sums of two: each row of a block is brought to their range by a power of two, and
    what is lost of a product is what float32 loses. EXACT: x is float16, and not scaled.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, B)
    inside = (t < rows)[:, None] & (k < B)[None, :]
    x_rows = x + t.to(tl.int64)[:, None] * x_row
    y_rows = y + t.to(tl.int64)[:, None] * y_row
    entries = tl.load(rotation + k[:, None] * B + k[None, :]).to(tl.float32)
    r_high, r_low = halves(entries * MATRIX_FACTOR)
    block = tl.program_id(1) * each
    for first in range(block * B, tl.minimum((block + each) * B, channels), B):
        channel = first + k
        if GATHER:
            channel = tl.load(permutation + channel)
        part = tl.load(x_rows + channel.to(tl.int64)[None, :] * x_channel, mask=inside, other=0)
        if EXACT:
            total = tl.dot(part, r_high, tl.dot(part, r_low)) * (1.0 / MATRIX_FACTOR)
        else:
            part = part.to(tl.float32)
            if SCALED:
                divisor = tl.load(scale + channel).to(tl.float32)
                part = tl.div_rn(part, tl.broadcast_to(divisor[None, :], part.shape))
            factor, inverse = power_of_two(tl.max(tl.abs(part), axis=1))
            high, low = halves(part * factor[:, None])
            total = tl.dot(low, r_high, tl.dot(high, r_low))
            total = tl.dot(high, r_high, total) * (inverse * (1.0 / MATRIX_FACTOR))[:, None]
        tl.store(y_rows + (first + k).to(tl.int64)[None, :] * y_channel, total, mask=inside)
