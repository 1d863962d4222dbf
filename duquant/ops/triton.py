"""Quantized linears on a GPU through Triton: rows are transformed and rounded to codes, and codes are multiplied.

    codes, scale, zero, sums = quantize_rows(x, rotations, permutations, low_ratio=0.9, high_ratio=0.9, form=form)
    y = linear(codes, scale, zero, sums, packed, form, bias, x.dtype)

With x̂ = (a − z_x)·s_x and ŵ = (b − z_w)·s_w,

    y = x̂ ŵᵀ = s_x s_w (a·bᵀ − z_x Σb − z_w Σa + C z_x z_w),

one product of integers and the sums of rows. Products go through the int8 tensor cores and are summed in int32, which
is exact; weights stay packed in memory and are unpacked in registers.

Both are custom operators, so `torch.compile` traces through them. On a GPU the first call for a shape measures several
tile sizes (so it cannot be captured in a CUDA graph). With `TRITON_INTERPRET=1` set before Triton is imported
everything runs on tensors of the CPU, slowly.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from duquant.formats import SCALE_LIMITS, ZERO_LIMITS, IntegerFormat, PackedCodes, packed_width, unpack
from duquant.ops.triton_product import finish, product, product_few
from duquant.ops.triton_quantize import ROUNDING, quantize, rotate
from duquant.ops.triton_tools import interpreted, triton
from duquant.tensors import row_parts

FEW_ROWS = 16  # up to here the weight is all the traffic, and the channels are dealt to several programs
PROGRAMS_PER_PROCESSOR = 4  # enough loads in flight to keep the memory of a GPU busy
GROUP_MULTIPLE = 32  # the tensor cores' own step along the channels, for int8
CAPABILITY = (8, 0)  # what Triton supports of NVIDIA's
AS_WRITTEN = {"enable_fp_fusion": False}  # a product that is added is rounded first, as elsewhere: the same last bits


def available(device: torch.device) -> bool:
    """Whether these functions run on tensors of `device`."""
    if triton is None:
        return False
    if interpreted():
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def quantize_rows(
    x: Tensor,
    rotations: Tensor,
    permutations: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    low_ratio: Tensor | float = 1.0,
    high_ratio: Tensor | float = 1.0,
    form: IntegerFormat,
    group_size: int | None = None,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q(T(x Λ⁻¹) − z) of the rows of `x` [T, C] as (codes uint8 [T, C], scale, zero, sums int32 of the codes).

    T is `DualTransform`'s: `rotations` [n+1, B, B] and `permutations` [n, C], or no rotations; Λ is `scale` [C], z is
    `shift` [C]. The last three results are [T, 1], or [T, C/g, 1] with groups of g channels. A range's ends are
    multiplied by the ratios. `packed`: codes as `formats.pack` lays them out, [T, ⌈C/n⌉].

    One launch per rotation, over tiles of rows and blocks, and one that rounds: a single program per tile of rows would
    leave a GPU idle when there are few. What lies between launches is float32: for each rotation 4 bytes per element
    are written and read once; before a permutation they are laid out [C, T], where the gathered channels of
    neighbouring rows are neighbours. Rounding reads twice, the second time from cache. Beside x and the codes a paper's
    transform thus moves 16 bytes per element, most of it within the L2 cache for a few thousand rows.

    Raises ValueError for more than 8 bits, float64, or sizes that do not fit.
    """
    _check_rows(x, rotations, permutations, form, group_size, packed)
    # filled on the device: a tensor made from a number would be copied there, and waited for
    ends = [
        each if isinstance(each, Tensor) else torch.full((), each, dtype=torch.float32, device=x.device)
        for each in (low_ratio, high_ratio)
    ]
    return _quantize_rows(
        x, rotations, permutations, scale, shift, *ends, form.bits, form.symmetric, group_size, packed
    )


def linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    sums: Tensor,
    packed: PackedCodes,
    form: IntegerFormat,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    sums_of_weight: Tensor | None = None,
    input_bits: int = 8,
) -> Tensor:
    """x̂ ŵᵀ + bias [T, O] in `dtype`, from what `quantize_rows` returns and the codes of a weight, of format `form`.

    Groups along the channels of either or both ([·, C/g, 1]) are scaled one by one, in float32. `sums_of_weight`: what
    `weight_sums` returns, which saves adding the codes up again. `input_bits`: below 8 the codes of the input need not
    be moved into the range of int8, which saves an operation per code.

    Exact up to float32's rounding of the sum, of the three factors and of the bias. Raises ValueError for codes of more
    than 8 bits, sums that int32 does not hold, groups of different sizes or of no multiple of 32 channels.
    """
    _check_linear(codes, scale, packed, form)
    return _linear(
        codes, scale, zero, sums, packed.values, packed.scale, packed.zero, sums_of_weight, bias,
        form.bits, input_bits, dtype,
    )  # fmt: skip


def weight_sums(packed: PackedCodes, form: IntegerFormat) -> Tensor:
    """The sum of the codes of every range of a weight: int32 [O], or [O, C/g]."""
    parts = [unpack(packed.rows(part), form).values.sum(-1, dtype=torch.int32) for part in row_parts(packed.values)]
    return torch.cat(parts)


def _check_rows(
    x: Tensor, rotations: Tensor, permutations: Tensor, form: IntegerFormat, group_size: int | None, packed: bool
) -> None:
    """Raise ValueError for what `quantize_rows` does not take."""
    channels = x.shape[-1]
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"rows must be [T, C] in float32, float16 or bfloat16, not {list(x.shape)} in {x.dtype}")
    if form.bits > 8:
        raise ValueError(f"{form.bits} bits: codes here have at most 8")
    if len(rotations) and (len(permutations) != len(rotations) - 1 or channels % rotations.shape[-1]):
        raise ValueError(
            f"{channels} channels: {len(rotations)} rotations of blocks of {rotations.shape[-1]} "
            f"and {len(permutations)} permutations do not fit"
        )
    if group_size is not None and channels % group_size:
        raise ValueError(f"{channels} channels do not divide into groups of {group_size}")
    if group_size is not None and packed and group_size % form.per_byte:
        raise ValueError(f"groups of {group_size} channels do not divide into bytes of {form.per_byte} codes")


def _ranges(scale: Tensor) -> int:
    """How many ranges a row has: of scales [·, 1] or [·, C/g, 1]."""
    return scale.shape[1] if scale.dim() == 3 else 1


def _check_linear(codes: Tensor, scale: Tensor, packed: PackedCodes, form: IntegerFormat) -> None:
    """Raise ValueError for what `linear` does not take."""
    channels, numbers = codes.shape[-1], {_ranges(scale), _ranges(packed.scale)} - {1}
    if codes.dim() != 2 or channels != packed.channels:
        raise ValueError(f"codes {list(codes.shape)} do not fit a weight of {packed.channels} input channels")
    if form.bits > 8:
        raise ValueError(f"{form.bits} bits: codes here have at most 8")
    if len(numbers) > 1:
        raise ValueError(f"{channels} channels: input and weight have groups of different sizes")
    length = channels // max(numbers, default=1)
    if numbers and length % GROUP_MULTIPLE:
        raise ValueError(f"groups of {length} channels: must be a multiple of {GROUP_MULTIPLE}")
    if length * 255 * form.largest >= 2**31:
        raise ValueError(f"{length} channels in a range: int32 does not hold a sum of so many products of codes")


def _power_of_two(number: int, least: int, most: int) -> int:
    """The power of two that holds `number`, between two others."""
    return min(max(1 << (number - 1).bit_length(), least), most)


@torch.library.custom_op("duquant::triton_quantize_rows", mutates_args=())
def _quantize_rows(
    x: Tensor,
    rotations: Tensor,
    permutations: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    low_ratio: Tensor,
    high_ratio: Tensor,
    bits: int,
    symmetric: bool,
    group_size: int | None,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scales, zeros, sums = results = _empty_rows(x, IntegerFormat(bits), group_size, packed)
    if not len(x):
        return results
    y, channels = x.contiguous(), x.shape[1]
    length = group_size or channels
    vectors, number = x.numel() // length, 8 // bits if packed else 1
    block = _power_of_two(length, 16, 64 if interpreted() else 4096)
    block_v = _power_of_two(4096 // block, 1, 32)
    with _on(x.device):
        for index, rotation in enumerate(rotations):
            permutation = permutations[index - 1].contiguous() if index else None
            y = _rotated(y, rotation.contiguous(), permutation, None if index else scale, index + 1 < len(rotations))
        quantize[(triton.cdiv(vectors, block_v),)](
            y, None if len(rotations) else scale, shift, low_ratio, high_ratio, codes, scales, zeros, sums,
            vectors, channels, length, *SCALE_LIMITS, *ZERO_LIMITS,
            BITS=bits, SYMMETRIC=symmetric, SCALED=scale is not None and not len(rotations),
            SHIFTED=shift is not None, PER_BYTE=number, ROUNDING=ROUNDING, BLOCK_V=block_v, BLOCK_C=block,
            num_warps=_power_of_two(block * block_v // 512, 1, 8), **AS_WRITTEN,
        )  # fmt: skip
    return results


@_quantize_rows.register_fake
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


def _rotated(x: Tensor, rotation: Tensor, permutation: Tensor | None, scale: Tensor | None, gathered: bool) -> Tensor:
    """One rotation of all blocks of `x` [T, C], permuted before: float32 [T, C], laid out [C, T] if `gathered` next."""
    rows, channels = x.shape
    size = len(rotation)
    y = torch.empty((channels, rows) if gathered else (rows, channels), dtype=torch.float32, device=x.device)
    y = y.T if gathered else y
    block_n = _power_of_two(size, 16, 128)

    def grid(meta: dict) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_T"]), channels // size * triton.cdiv(size, block_n)

    rotate[grid](
        x, y, rotation, permutation, scale, rows, channels, _rows_key(rows), *x.stride(), *y.stride(),
        B=size, GATHER=permutation is not None, SCALED=scale is not None, PRECISION=_precision(x.device),
        BLOCK_N=block_n, BLOCK_K=_power_of_two(size, 16, 32),
    )  # fmt: skip
    return y


def _precision(device: torch.device) -> str:
    """How tensor cores multiply float32: each factor as a sum of TF32 numbers, about as exact as float32."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def _rows_key(rows: int) -> int:
    """Numbers of rows that share a configuration: prompts have all lengths, and each would be measured."""
    return _power_of_two(rows, 1, 8192)


def _on(device: torch.device) -> AbstractContextManager:
    """Inside the block Triton launches on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@torch.library.custom_op("duquant::triton_linear", mutates_args=())
def _linear(
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
    (rows, channels), outputs = codes.shape, len(values)
    y = codes.new_empty((rows, outputs), dtype=dtype)
    if not y.numel():
        return y
    numbers = _ranges(scale), _ranges(weight_scale)
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
    with _on(codes.device):
        if rows <= FEW_ROWS and max(numbers) == 1:
            _launch_few(tensors, rows, outputs, channels, options)
        else:
            _launch(tensors, rows, outputs, channels, numbers, options)
    return y


@_linear.register_fake
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
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = processors * PROGRAMS_PER_PROCESSOR // triton.cdiv(outputs, block_o)
    return 1 << max(0, min(wanted, most).bit_length() - 1)
