"""The operators of `duquant.ops.triton`, and how their kernels are launched: tile sizes, parts, memory in between."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from duquant.formats import SCALE_LIMITS, ZERO_LIMITS, IntegerFormat
from duquant.ops.triton_product import (
    EXACT_STEPS,
    finish,
    product,
    product_bytes,
    product_few,
    row_words,
    unpack_bytes,
)
from duquant.ops.triton_quantize import MATRIX_FACTOR, ROUNDING, quantize, rotate, rotate_halves
from duquant.ops.triton_tools import interpreted, triton
from duquant.packing import packed_width

PART_ELEMENTS = 2**24  # of the rows that are rotated at once: two float32 copies of so many are 128 MB
HALVED_BLOCKS = (16, 32, 64, 128)  # rotations that fit a program twice in float16
HALVES = (64, 4, 1)  # rows, warps, stages of `rotate_halves`
ROTATING_PROGRAMS = 4  # for each multiprocessor: each reads the rotation once
MANY_ROWS = 128  # a tile of `product_bytes`: from here on unpacking the weight first pays
BYTE_TILE = (128, 128, 4, 3)  # rows, outputs, warps, stages of `product_bytes`
WORD_TILE = (8, 128, 4, 3)  # outputs, numbers of 32 bits, warps, stages of `row_words`
FEW_ROWS = 16  # up to here the weight is all the traffic, and the channels are dealt to several programs
UNPACKED = 4096  # packed bytes that a program unpacks
PROGRAMS_PER_PROCESSOR = 4  # enough loads in flight to keep the memory of a GPU busy
AS_WRITTEN = {"enable_fp_fusion": False}  # a product that is added is rounded first, as elsewhere: the same last bits


def ranges(scale: Tensor) -> int:
    """How many ranges a row has: of scales [·, 1] or [·, C/g, 1]."""
    return scale.shape[1] if scale.dim() == 3 else 1


def power_of_two(number: int, least: int, most: int) -> int:
    """The power of two that holds `number`, between two others."""
    return min(max(1 << (number - 1).bit_length(), least), most)


@torch.library.custom_op("duquant::triton_quantize_rows", mutates_args=())
def quantize_rows(
    x: Tensor,
    rotations: Tensor,
    permutations: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    low_ratio: Tensor,
    high_ratio: Tensor,
    bits: int,
    symmetric: int,
    group_size: int | None,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`duquant.ops.triton.quantize_rows`, in the types an operator of torch has."""
    results = _empty_rows(x, IntegerFormat(bits), group_size, packed)
    if x.numel():
        with on(x.device):
            for part in row_parts(*x.shape):
                y = transformed(x[part], rotations, permutations, scale)
                outputs = [each[part] for each in results]
                left = None if len(rotations) else scale
                _launch_rounding(y, left, shift, low_ratio, high_ratio, outputs, group_size, bits, symmetric, packed)
    return results


@quantize_rows.register_fake
def _(x, rotations, permutations, scale, shift, low_ratio, high_ratio, bits, symmetric, group_size, packed):
    return _empty_rows(x, IntegerFormat(bits), group_size, packed)


def _empty_rows(
    x: Tensor, form: IntegerFormat, group_size: int | None, packed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `quantize_rows` returns, not yet filled."""
    rows, channels = x.shape
    shape = (rows, 1) if group_size is None else (rows, channels // group_size, 1)
    codes = x.new_empty((rows, packed_width(channels, form) if packed else channels), dtype=torch.uint8)
    scales, zeros = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return codes, scales, zeros, x.new_empty(shape, dtype=torch.int32)


def transformed(x: Tensor, rotations: Tensor, permutations: Tensor, scale: Tensor | None) -> Tensor:
    """x [T, C] behind all rotations, float32; if there are none, x as it is, not divided by the scale either."""
    y = x.contiguous()
    for index, rotation in enumerate(rotations):
        permutation, gathered = permutations[index - 1].contiguous() if index else None, index + 1 < len(rotations)
        y = _rotated(y, rotation.contiguous(), permutation, None if index else scale, gathered)
    return y


def row_parts(rows: int, channels: int) -> list[slice]:
    """Slices of the rows that are transformed one after the other, whole tiles each."""
    step = 16 if interpreted() else max(64, PART_ELEMENTS // channels // 64 * 64)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _rotated(x: Tensor, rotation: Tensor, permutation: Tensor | None, scale: Tensor | None, gathered: bool) -> Tensor:
    """One rotation of all blocks of `x` [T, C], permuted before: float32 [T, C], laid out [C, T] if `gathered` next."""
    rows, channels = x.shape
    size = len(rotation)
    y = torch.empty((channels, rows) if gathered else (rows, channels), dtype=torch.float32, device=x.device)
    y = y.T if gathered else y
    if size in HALVED_BLOCKS:
        most, warps, stages = HALVES
        block_t = 16 if interpreted() else power_of_two(rows, 16, most)
        tiles, blocks = triton.cdiv(rows, block_t), channels // size
        each = max(1, tiles * blocks // (processors(x.device) * ROTATING_PROGRAMS))
        rotate_halves[(tiles, triton.cdiv(blocks, each))](
            x, y, rotation, permutation, scale, rows, channels, *x.stride(), *y.stride(), each,
            B=size, GATHER=permutation is not None, SCALED=scale is not None,
            EXACT=x.dtype is torch.float16 and scale is None, MATRIX_FACTOR=MATRIX_FACTOR, BLOCK_T=block_t,
            num_warps=warps if block_t == most else 4, num_stages=stages, **AS_WRITTEN,
        )  # fmt: skip
        return y
    block_n = power_of_two(size, 16, 128)

    def grid(meta: dict) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_T"]), channels // size * triton.cdiv(size, block_n)

    rotate[grid](
        x, y, rotation, permutation, scale, rows, channels, _rows_key(rows), *x.stride(), *y.stride(),
        B=size, GATHER=permutation is not None, SCALED=scale is not None, PRECISION=_precision(x.device),
        BLOCK_N=block_n, BLOCK_K=power_of_two(size, 16, 32),
    )  # fmt: skip
    return y


def _launch_rounding(
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    low_ratio: Tensor,
    high_ratio: Tensor,
    outputs: list[Tensor],
    group_size: int | None,
    bits: int,
    symmetric: int,
    packed: bool,
) -> None:
    """`quantize` over the vectors of y [T, C]; `outputs`: codes, scales, zero points and sums, to be filled."""
    channels = y.shape[1]
    length = group_size or channels
    vectors, block = y.numel() // length, power_of_two(length, 16, 64 if interpreted() else 4096)
    block_v = power_of_two(4096 // block, 1, 32)
    quantize[(triton.cdiv(vectors, block_v),)](
        y, scale, shift, low_ratio, high_ratio, *outputs, vectors, channels, length, *SCALE_LIMITS, *ZERO_LIMITS,
        BITS=bits, SYMMETRIC=symmetric, SCALED=scale is not None, SHIFTED=shift is not None,
        PER_BYTE=8 // bits if packed else 1, INVERTED=inverted(y.device), ROUNDING=ROUNDING,
        BLOCK_V=block_v, BLOCK_C=block, num_warps=power_of_two(block * block_v // 512, 1, 8), **AS_WRITTEN,
    )  # fmt: skip


def _precision(device: torch.device) -> str:
    """How tensor cores multiply float32: each factor as a sum of TF32 numbers, about as exact as float32."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def inverted(device: torch.device) -> bool:
    """Whether torch divides by a number there by multiplying with its reciprocal, the last bit of which shows."""
    return device.type == "cuda"


def processors(device: torch.device) -> int:
    """How many multiprocessors there are; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _rows_key(rows: int) -> int:
    """Numbers of rows that share a configuration: prompts have all lengths, and each would be measured."""
    return power_of_two(rows, 1, 8192)


def on(device: torch.device) -> AbstractContextManager:
    """Inside the block Triton launches on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@torch.library.custom_op("duquant::triton_linear", mutates_args=())
def linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    sums: Tensor,
    values: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    sums_of_weight: Tensor | None,
    bias: Tensor | None,
    bits: int,
    input_bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """`duquant.ops.triton.linear`, in the types an operator of torch has."""
    (rows, channels), outputs = codes.shape, len(values)
    y = codes.new_empty((rows, outputs), dtype=dtype)
    if not y.numel():
        return y
    numbers = ranges(scale), ranges(weight_scale)
    sides = (codes, scale, zero, sums), (values, weight_scale, weight_zero, sums_of_weight)
    tensors = [None if each is None else each.contiguous() for side in sides for each in side] + [bias, y]
    options = {
        "X_OFFSET": 128 if input_bits == 8 else 0,
        "W_OFFSET": 128 if bits == 8 else 0,
        "BITS": bits,
        "W_SUMS": sums_of_weight is not None,
        "BIASED": bias is not None,
        **AS_WRITTEN,
    }
    with on(codes.device):
        if rows == 1 and max(numbers) == 1 and _in_words(tensors, channels, bits, input_bits):
            _launch_row(tensors, outputs, channels, options["BIASED"])
        elif rows <= FEW_ROWS and max(numbers) == 1:
            _launch_few(tensors, rows, outputs, channels, options)
        elif rows >= MANY_ROWS and max(numbers) == 1 and options["W_SUMS"] and channels % _byte_block() == 0:
            _launch_bytes(tensors, rows, outputs, channels, options)
        else:
            _launch(tensors, rows, outputs, channels, numbers, options)
    return y


@linear.register_fake
def _(codes, scale, zero, sums, values, weight_scale, weight_zero, sums_of_weight, bias, bits, input_bits, dtype):
    return codes.new_empty((codes.shape[0], values.shape[0]), dtype=dtype)


def _launch(
    tensors: list[Tensor | None], rows: int, outputs: int, channels: int, numbers: tuple[int, int], options: dict
) -> None:
    """`product` over tiles of rows and outputs; `numbers`: how many ranges a row of the input and of the weight has."""
    groups, most = max(numbers), 64 if interpreted() else 128
    length = channels // groups
    block = min(length & -length, most) if groups > 1 else most
    product[lambda meta: (triton.cdiv(rows, meta["BLOCK_T"]) * triton.cdiv(outputs, meta["BLOCK_O"]),)](
        *tensors, rows, outputs, channels, tensors[4].shape[1], _rows_key(rows), groups, *numbers,
        PER_BYTE=8 // options["BITS"], MASKED=channels % block != 0, X_SUMS=numbers[0] == groups,
        GROUPED=groups > 1, BLOCK_C=block, **{**options, "W_SUMS": options["W_SUMS"] and numbers[1] == groups},
    )  # fmt: skip


def _byte_block() -> int:
    """Of how many channels a step of `product_bytes` is."""
    return 32 if interpreted() else 128


def _launch_bytes(tensors: list[Tensor | None], rows: int, outputs: int, channels: int, options: dict) -> None:
    """`unpack_bytes` of the whole weight, and `product_bytes`; the codes of 8 bits of an input are moved first."""
    number, values = 8 // options["BITS"], tensors[4]
    # a number of `number` bytes for every packed byte; channels that do not fill it are not to be multiplied
    weight = values.new_empty(values.shape, dtype={1: torch.int8, 2: torch.int16, 4: torch.int32}[number])
    unpack_bytes[(triton.cdiv(values.numel(), UNPACKED),)](
        values, weight, values.numel(), BITS=options["BITS"], PER_BYTE=number, W_OFFSET=options["W_OFFSET"],
        BLOCK=UNPACKED, num_warps=4,
    )  # fmt: skip
    codes = tensors[0] ^ 128 if options["X_OFFSET"] else tensors[0]
    sides = [codes.view(torch.int8), *tensors[1:4], weight.view(torch.int8), *tensors[5:]]
    shared = {name: value for name, value in options.items() if name != "W_SUMS"}
    block_t, block_o, warps, stages = (16, 32, 4, 1) if interpreted() else BYTE_TILE
    product_bytes[(triton.cdiv(rows, block_t) * triton.cdiv(outputs, block_o),)](
        *sides, rows, outputs, channels, BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_C=_byte_block(),
        num_warps=warps, num_stages=stages, **shared,
    )  # fmt: skip


def _in_words(tensors: list[Tensor | None], channels: int, bits: int, input_bits: int) -> bool:
    """Whether `row_words` reads these: 4 bits on both sides, whole numbers of 32 bits in a row, where such may lie."""
    codes, values, sums_of_weight = tensors[0], tensors[4], tensors[7]
    aligned = channels % 8 == 0 and codes.data_ptr() % 8 == 0 and values.data_ptr() % 4 == 0
    return bits == 4 and input_bits <= 4 and sums_of_weight is not None and aligned


def _launch_row(tensors: list[Tensor | None], outputs: int, channels: int, biased: bool) -> None:
    """`row_words` over tiles of outputs."""
    block_o, least, warps, stages = WORD_TILE
    # long rows are taken in wider steps, so that there are at most EXACT_STEPS
    block_w = power_of_two(triton.cdiv(channels // 8, EXACT_STEPS), 4 if interpreted() else least, 2**20)
    sides = [tensors[0].view(torch.uint64), *tensors[1:4], tensors[4].view(torch.uint32), *tensors[5:]]
    row_words[(triton.cdiv(outputs, block_o),)](
        *sides, outputs, channels, BIASED=biased, BLOCK_O=block_o, BLOCK_W=block_w, STAGES=stages,
        num_warps=warps, **AS_WRITTEN,
    )  # fmt: skip


def _launch_few(tensors: list[Tensor | None], rows: int, outputs: int, channels: int, options: dict) -> None:
    """`product_few` over tiles of outputs and parts of the channels, and `finish` if there is more than one part."""
    y = tensors[-1]
    number, block_t, block_o = 8 // options["BITS"], 1 if rows == 1 else FEW_ROWS, 32
    block = 64 if interpreted() else 256 * (number if rows == 1 else 1)
    splits = _splits(outputs, channels // (4 * block), block_o, y.device)
    parts = part_sums = None
    if splits > 1:
        parts = y.new_empty((splits, outputs, rows), dtype=torch.int32)
        part_sums = None if options["W_SUMS"] else y.new_empty((splits, outputs), dtype=torch.int32)
    shared = {**options, "SPLITS": splits, "BLOCK_T": block_t}
    product_few[lambda meta: (triton.cdiv(outputs, meta["BLOCK_O"]), splits)](
        *tensors, parts, part_sums, rows, outputs, channels, tensors[4].shape[1],
        PER_BYTE=number, BLOCK_C=block, **shared,
    )  # fmt: skip
    if splits > 1:
        of_ranges = [each for index, each in enumerate(tensors) if index not in (0, 4)]
        finish[(triton.cdiv(outputs, block_o),)](
            *of_ranges, parts, part_sums, rows, outputs, channels, BLOCK_O=block_o, **shared
        )


def _splits(outputs: int, most: int, block_o: int, device: torch.device) -> int:
    """To how many programs the channels are dealt, a power of two up to `most`: as many as keep the device busy."""
    wanted = processors(device) * PROGRAMS_PER_PROCESSOR // triton.cdiv(outputs, block_o)
    return 1 << max(0, min(wanted, most).bit_length() - 1)
