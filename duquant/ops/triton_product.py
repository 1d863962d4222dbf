"""Triton kernels that multiply codes; `duquant.ops.triton` launches them.

Products and sums of codes are integers of 32 bits, which is exact; scales and zero points come in at the end.
"""

from __future__ import annotations  # the annotations name what is not there without Triton

from duquant.ops.triton_tools import autotuned, jit, tl

# few, for each is compiled and measured when a shape first comes; the first is what the interpreter runs
PRODUCT_CONFIGS = [(32, 64, 4, 4), (64, 64, 4, 4), (128, 128, 8, 3)]  # rows, outputs, warps, stages
FEW_CONFIGS = [(32, 4, 5), (64, 4, 3), (64, 8, 4)]  # outputs, warps, stages
EXACT_STEPS = 32  # of `row_words`, each of which adds two products of codes four times: 32 · 4 · 2 · 15² < 2¹⁶


@jit
def centred(codes, OFFSET: tl.constexpr):
    """Codes (uint8) minus OFFSET, int8. OFFSET is 128, or 0 where no code exceeds 127."""
    if OFFSET == 128:
        return (codes ^ 128).to(tl.int8, bitcast=True)  # the highest bit turned over is 128 less, read as signed
    else:  # noqa: RET505 - only one branch is compiled
        return codes.to(tl.int8)


@jit
def unpacked(values, BITS: tl.constexpr, PER_BYTE: tl.constexpr):
    """The codes [R, W · PER_BYTE] of packed bytes [R, W], uint8."""
    MASK: tl.constexpr = 2**BITS - 1
    if PER_BYTE == 1:
        return values
    elif PER_BYTE == 2:  # noqa: RET505 - only one branch is compiled
        return tl.interleave(values & MASK, values >> BITS & MASK)
    else:
        even = tl.interleave(values & MASK, values >> 2 * BITS & MASK)
        return tl.interleave(even, tl.interleave(values >> BITS & MASK, values >> 3 * BITS & MASK))


@jit
def code_product(
    x, w, rows, outputs, channels, width, t, o, first, last,
    X_OFFSET: tl.constexpr, W_OFFSET: tl.constexpr, BITS: tl.constexpr, PER_BYTE: tl.constexpr, MASKED: tl.constexpr,
    X_SUMS: tl.constexpr, W_SUMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Σ b'·a' [O, T] over the channels first … last, for a' = a − X_OFFSET and b' = b − W_OFFSET, with Σa' and Σb'.

    The sums are zeros where they are already known (X_SUMS, W_SUMS). The weight is the first factor: tensor cores take
    that one from registers, where it was unpacked, and the other as it is.
    """
    product = tl.zeros([BLOCK_O, BLOCK_T], tl.int32)
    x_sum = tl.zeros([BLOCK_T], tl.int32)
    w_sum = tl.zeros([BLOCK_O], tl.int32)
    x_rows = x + (t % rows).to(tl.int64)[None, :] * channels
    w_rows = w + (o % outputs).to(tl.int64)[:, None] * width
    for step in range(first // BLOCK_C, tl.cdiv(last, BLOCK_C)):
        start = step * BLOCK_C  # a multiple, as the compiler sees, so that 16 bytes are loaded at once
        c = start + tl.arange(0, BLOCK_C)
        byte = start // PER_BYTE + tl.arange(0, BLOCK_C // PER_BYTE)
        if MASKED:  # what is outside becomes 0 once the offset is taken off
            a = tl.load(x_rows + c[:, None], mask=(c < channels)[:, None], other=X_OFFSET)
            packed = tl.load(w_rows + byte[None, :], mask=(byte < width)[None, :], other=W_OFFSET)
        else:
            a = tl.load(x_rows + c[:, None])
            packed = tl.load(w_rows + byte[None, :])
        a = centred(a, X_OFFSET)
        b = centred(unpacked(packed, BITS, PER_BYTE), W_OFFSET)
        product = tl.dot(b, a, product, out_dtype=tl.int32)
        if not X_SUMS:
            x_sum += tl.sum(a.to(tl.int32), axis=0)
        if not W_SUMS:
            w_sum += tl.sum(b.to(tl.int32), axis=1)
    return product, x_sum, w_sum


@jit
def row_product(
    x, w, outputs, channels, width, o, first, last,
    X_OFFSET: tl.constexpr, W_OFFSET: tl.constexpr, BITS: tl.constexpr, PER_BYTE: tl.constexpr,
    W_SUMS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `code_product` for one row of x, without tensor cores, of whose tiles a single row would fill a sixteenth.

    Every thread adds up its own bytes of the weight; they are summed over the threads once, at the end.
    """
    BLOCK_W: tl.constexpr = BLOCK_C // PER_BYTE
    products = tl.zeros([BLOCK_O, BLOCK_W], tl.int32)
    codes = tl.zeros([BLOCK_O, BLOCK_W], tl.int32)
    w_rows = w + (o % outputs).to(tl.int64)[:, None] * width
    for start in tl.range(first, last, BLOCK_C, num_stages=4):  # without a dot, only this prefetches
        byte = start // PER_BYTE + tl.arange(0, BLOCK_W)
        packed = tl.load(w_rows + byte[None, :], mask=(byte < width)[None, :], other=W_OFFSET)
        for lane in tl.static_range(PER_BYTE):
            c = byte * PER_BYTE + lane
            a = centred(tl.load(x + c, mask=c < channels, other=X_OFFSET), X_OFFSET).to(tl.int32)
            code = packed if PER_BYTE == 1 else packed >> lane * BITS & 2**BITS - 1
            b = centred(code, W_OFFSET).to(tl.int32)
            products += b * a[None, :]
            if not W_SUMS:
                codes += b
    return tl.sum(products, axis=1)[:, None], tl.sum(codes, axis=1)


@jit
def decoded(
    product, x_sum, w_sum, x_scale, x_zero, w_scale, w_zero, count,
    X_OFFSET: tl.constexpr, W_OFFSET: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """s_x s_w Σ (a − z_x)(b − z_w) [O, T] from Σb'a', Σa' and Σb' over `count` channels, float32.

    Of a zero point the whole part within the range of codes is taken off in integers, which is exact; the rest, which
    is 0 unless a range lies on one side of 0, in float32.
    """
    x_whole = tl.minimum(tl.maximum(x_zero, 0.0), 255.0).to(tl.int32)
    w_whole = tl.minimum(tl.maximum(w_zero, 0.0), LARGEST * 1.0).to(tl.int32)
    x_rest = x_zero - x_whole.to(tl.float32)
    w_rest = w_zero - w_whole.to(tl.float32)
    x_sum -= count * (x_whole - X_OFFSET)  # Σ (a − whole)
    whole = product - w_sum[:, None] * (x_whole - X_OFFSET)[None, :] - (w_whole - W_OFFSET)[:, None] * x_sum[None, :]
    w_sum -= count * (w_whole - W_OFFSET)
    exact = whole.to(tl.float32) - x_rest[None, :] * w_sum.to(tl.float32)[:, None]
    exact -= w_rest[:, None] * (x_sum.to(tl.float32) - count * x_rest)[None, :]
    return exact * x_scale[None, :] * w_scale[:, None]


@jit
def write(y, result, bias, rows, outputs, t, o, BIASED: tl.constexpr):
    """Store result [O, T], plus the bias, as y [T, O]."""
    if BIASED:
        result += tl.load(bias + o, mask=o < outputs, other=0).to(tl.float32)[:, None]
    at = y + t.to(tl.int64)[None, :] * outputs + o[:, None]
    tl.store(at, result.to(y.dtype.element_ty), mask=(t < rows)[None, :] & (o < outputs)[:, None])


@jit
def decode_and_write(
    total, w_sum, x_scales, x_zeros, x_sums, w_scales, w_zeros, w_sums, bias, y, rows, outputs, channels, t, o,
    X_OFFSET: tl.constexpr, W_OFFSET: tl.constexpr, BITS: tl.constexpr, W_SUMS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """y [T, O] from products [O, T] over all channels, with one range per row of x and of w."""
    x_row, w_row = t % rows, o % outputs
    if W_SUMS:
        w_sum = tl.load(w_sums + w_row) - W_OFFSET * channels
    result = decoded(
        total, tl.load(x_sums + x_row) - X_OFFSET * channels, w_sum,
        tl.load(x_scales + x_row), tl.load(x_zeros + x_row),
        tl.load(w_scales + w_row).to(tl.float32), tl.load(w_zeros + w_row).to(tl.float32),
        channels, X_OFFSET, W_OFFSET, 2**BITS - 1,
    )  # fmt: skip
    write(y, result, bias, rows, outputs, t, o, BIASED)


@autotuned(("BLOCK_T", "BLOCK_O"), PRODUCT_CONFIGS, ["rows_key", "outputs", "channels", "groups", "BITS"])
@jit
def product(
    x, x_scales, x_zeros, x_sums, w, w_scales, w_zeros, w_sums, bias, y,
    rows, outputs, channels, width, rows_key, groups, x_groups, w_groups,
    X_OFFSET: tl.constexpr, W_OFFSET: tl.constexpr, BITS: tl.constexpr, PER_BYTE: tl.constexpr, MASKED: tl.constexpr,
    X_SUMS: tl.constexpr, W_SUMS: tl.constexpr, BIASED: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y [T, O] for one tile of rows and outputs: an integer product per group of channels, added up in float32.

    `x_groups` and `w_groups`, the ranges of a row: `groups`, or 1 for one that holds for all of them.
    """
    tiles_t = tl.cdiv(rows, BLOCK_T)
    tiles_o = tl.cdiv(outputs, BLOCK_O)
    # tiles that run at the same time share rows and weights, so that these come from the L2 cache
    tile_o, tile_t = tl.swizzle2d(tl.program_id(0) // tiles_t, tl.program_id(0) % tiles_t, tiles_o, tiles_t, 8)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    x_row, w_row = t % rows, o % outputs
    if GROUPED:
        count = channels // groups
        result = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
        for group in range(groups):
            total, x_sum, w_sum = code_product(
                x, w, rows, outputs, channels, width, t, o, group * count, (group + 1) * count,
                X_OFFSET, W_OFFSET, BITS, PER_BYTE, MASKED, X_SUMS, W_SUMS, BLOCK_T, BLOCK_O, BLOCK_C,
            )  # fmt: skip
            if X_SUMS:
                x_sum = tl.load(x_sums + x_row * groups + group) - X_OFFSET * count
            if W_SUMS:
                w_sum = tl.load(w_sums + w_row * groups + group) - W_OFFSET * count
            x_range = x_row * x_groups + group % x_groups
            w_range = w_row * w_groups + group % w_groups
            result += decoded(
                total, x_sum, w_sum, tl.load(x_scales + x_range), tl.load(x_zeros + x_range),
                tl.load(w_scales + w_range).to(tl.float32), tl.load(w_zeros + w_range).to(tl.float32), count,
                X_OFFSET, W_OFFSET, 2**BITS - 1,
            )  # fmt: skip
        write(y, result, bias, rows, outputs, t, o, BIASED)
    else:
        total, _, w_sum = code_product(
            x, w, rows, outputs, channels, width, t, o, 0, channels,
            X_OFFSET, W_OFFSET, BITS, PER_BYTE, MASKED, True, W_SUMS, BLOCK_T, BLOCK_O, BLOCK_C,
        )  # fmt: skip
        decode_and_write(
            total, w_sum, x_scales, x_zeros, x_sums, w_scales, w_zeros, w_sums, bias, y,
            rows, outputs, channels, t, o, X_OFFSET, W_OFFSET, BITS, W_SUMS, BIASED,
        )  # fmt: skip


@jit
def row_words(
    x, x_scales, x_zeros, x_sums, w, w_scales, w_zeros, w_sums, bias, y, outputs, channels,
    BIASED: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [1, O] for codes of 4 bits on both sides: x [C] as numbers of 64 bits, w [O, C/2] as numbers of 32 bits.

    A number of w holds 8 codes, of which the bits 4k … 4k + 3 and 16 + 4k … are those of the channels k and k + 4. With
    the codes of x the other way round, (b_k + 2¹⁶ b_{k+4}) · (a_{k+4} + 2¹⁶ a_k) mod 2³² has b_k a_k + b_{k+4} a_{k+4}
    in its upper half: one multiplication for two products. Both halves of a sum stay below 2¹⁶ for EXACT_STEPS steps.
    """
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    words = channels // 8
    w_rows = w + (o % outputs).to(tl.int64)[:, None] * words
    total = tl.zeros([BLOCK_O, BLOCK_W], tl.uint32)
    for start in tl.range(0, words, BLOCK_W, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK_W)
        a = tl.load(x + i, mask=i < words, other=0)
        b = tl.load(w_rows + i[None, :], mask=(i < words)[None, :], other=0)
        lower, upper = a.to(tl.uint32), (a >> 32).to(tl.uint32)
        for k in tl.static_range(4):
            pair = (upper >> 8 * k & 15) | ((lower >> 8 * k & 15) << 16)
            total += (b >> 4 * k & 0x000F000F) * pair[None, :]
    whole = tl.sum((total >> 16).to(tl.int32), axis=1)
    decode_and_write(
        whole[:, None], 0, x_scales, x_zeros, x_sums, w_scales, w_zeros, w_sums, bias, y,
        1, outputs, channels, tl.arange(0, 1), o, 0, 0, 4, True, BIASED,
    )  # fmt: skip


@autotuned(("BLOCK_O",), FEW_CONFIGS, ["BLOCK_T", "outputs", "channels", "BITS"])
@jit
def product_few(
    x, x_scales, x_zeros, x_sums, w, w_scales, w_zeros, w_sums, bias, y, parts, part_sums,
    rows, outputs, channels, width,
    X_OFFSET: tl.constexpr, W_OFFSET: tl.constexpr, BITS: tl.constexpr, PER_BYTE: tl.constexpr,
    W_SUMS: tl.constexpr, BIASED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `product` for at most BLOCK_T rows, without groups; the channels are dealt to SPLITS programs.

    With more than one split the integers go to `parts` [SPLITS, O, T] and `part_sums` [SPLITS, O], for `finish`.
    """
    t = tl.arange(0, BLOCK_T)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    each = tl.cdiv(tl.cdiv(channels, BLOCK_C), SPLITS) * BLOCK_C
    first, last = split * each, tl.minimum(split * each + each, channels)
    if BLOCK_T == 1:
        total, w_sum = row_product(
            x, w, outputs, channels, width, o, first, last,
            X_OFFSET, W_OFFSET, BITS, PER_BYTE, W_SUMS, BLOCK_O, BLOCK_C,
        )  # fmt: skip
    else:
        total, _, w_sum = code_product(
            x, w, rows, outputs, channels, width, t, o, first, last,
            X_OFFSET, W_OFFSET, BITS, PER_BYTE, True, True, W_SUMS, BLOCK_T, BLOCK_O, BLOCK_C,
        )  # fmt: skip
    if SPLITS == 1:
        decode_and_write(
            total, w_sum, x_scales, x_zeros, x_sums, w_scales, w_zeros, w_sums, bias, y,
            rows, outputs, channels, t, o, X_OFFSET, W_OFFSET, BITS, W_SUMS, BIASED,
        )  # fmt: skip
    else:
        at = parts + (split * outputs + o[:, None]) * rows + t[None, :]
        tl.store(at, total, mask=(o < outputs)[:, None] & (t < rows)[None, :])
        if not W_SUMS:
            tl.store(part_sums + split * outputs + o, w_sum, mask=o < outputs)


@jit
def finish(
    x_scales, x_zeros, x_sums, w_scales, w_zeros, w_sums, bias, y, parts, part_sums, rows, outputs, channels,
    X_OFFSET: tl.constexpr, W_OFFSET: tl.constexpr, BITS: tl.constexpr,
    W_SUMS: tl.constexpr, BIASED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y [T, O] from what the splits of `product_few` left."""
    t = tl.arange(0, BLOCK_T)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = (o < outputs)[:, None] & (t < rows)[None, :]
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.int32)
    w_sum = tl.zeros([BLOCK_O], tl.int32)
    for split in range(SPLITS):
        total += tl.load(parts + (split * outputs + o[:, None]) * rows + t[None, :], mask=inside, other=0)
        if not W_SUMS:
            w_sum += tl.load(part_sums + split * outputs + o, mask=o < outputs, other=0)
    decode_and_write(
        total, w_sum, x_scales, x_zeros, x_sums, w_scales, w_zeros, w_sums, bias, y,
        rows, outputs, channels, t, o, X_OFFSET, W_OFFSET, BITS, W_SUMS, BIASED,
    )  # fmt: skip


@jit
def unpack_bytes(w, b, count, BITS: tl.constexpr, PER_BYTE: tl.constexpr, W_OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    """Codes less W_OFFSET, int8, of `count` packed bytes; `b`: integers as wide as the codes of one byte are many.

    Code i of a byte is moved from bit i · BITS to bit 8i.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.load(w + at, mask=at < count, other=0)
    if PER_BYTE == 1:
        spread = centred(packed, W_OFFSET)
    else:
        packed = packed.to(b.dtype.element_ty)
        spread = packed & 2**BITS - 1
        for index in tl.static_range(1, PER_BYTE):
            spread |= (packed & (2**BITS - 1) << index * BITS) << index * (8 - BITS)
    tl.store(b + at, spread, mask=at < count)


@jit
def product_bytes(
    x, x_scales, x_zeros, x_sums, w, w_scales, w_zeros, w_sums, bias, y, rows, outputs, channels,
    X_OFFSET: tl.constexpr, W_OFFSET: tl.constexpr, BITS: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `product` for codes less their offsets, int8: x [T, C] and w [O, C], without groups; BLOCK_C divides C.

    Both factors go from memory to the tensor cores through shared memory alone.
    """
    tiles_t = tl.cdiv(rows, BLOCK_T)
    tiles_o = tl.cdiv(outputs, BLOCK_O)
    tile_t, tile_o = tl.swizzle2d(tl.program_id(0) // tiles_o, tl.program_id(0) % tiles_o, tiles_t, tiles_o, 8)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    x_at = x + (t % rows).to(tl.int64)[:, None] * channels + c[None, :]
    w_at = w + (o % outputs).to(tl.int64)[None, :] * channels + c[:, None]
    total = tl.zeros([BLOCK_T, BLOCK_O], tl.int32)
    for _ in range(0, channels, BLOCK_C):
        total = tl.dot(tl.load(x_at), tl.load(w_at), total, out_dtype=tl.int32)
        x_at += BLOCK_C
        w_at += BLOCK_C
    decode_and_write(
        tl.trans(total), 0, x_scales, x_zeros, x_sums, w_scales, w_zeros, w_sums, bias, y,
        rows, outputs, channels, t, o, X_OFFSET, W_OFFSET, BITS, True, BIASED,
    )  # fmt: skip
