"""Quantized linears on a GPU through Triton: rows are transformed and rounded to codes, and codes are multiplied.

    codes, scale, zero, sums = quantize_rows(x, rotations, permutations, low_ratio=0.9, high_ratio=0.9, form=form)
    y = linear(codes, scale, zero, sums, packed, form, bias, x.dtype)

With x̂ = (a − z_x)·s_x and ŵ = (b − z_w)·s_w,

    y = x̂ ŵᵀ = s_x s_w (a·bᵀ − z_x Σb − z_w Σa + C z_x z_w),

one product of integers and the sums of rows. Products go through the int8 tensor cores and are summed in int32, which
is exact; weights stay packed in memory and are unpacked in registers.

Both are custom operators, so `torch.compile` traces through them. On a GPU the first call of a kernel compiles it,
which takes half a second to two, for every dtype, number of bits and what else is a constant of it; what was compiled
stays in Triton's cache on the disk. Products of 2 to 127 rows, or with groups, and rotations of other blocks than of
16 to 128 then measure up to three tile sizes for every shape, half a second more (so such a first call cannot be
captured in a CUDA graph); many rows, and one row of 4-bit codes, measure nothing. With `TRITON_INTERPRET=1` set before
Triton is imported everything runs on tensors of the CPU, slowly.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from duquant.formats import IntegerFormat
from duquant.ops import triton_launch as launch
from duquant.ops.base import RowCodes, encode
from duquant.ops.triton_launch import ranges
from duquant.ops.triton_tools import interpreted, triton
from duquant.packing import PackedCodes
from duquant.quantizer import FoundClip, NoClip, Quantizer, RatioClip
from duquant.transform import DualTransform

GROUP_MULTIPLE = 32  # the tensor cores' own step along the channels, for int8
CAPABILITY = (8, 0)  # what Triton supports of NVIDIA's


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
    neighbouring rows are neighbours. Rounding reads twice, the second time from the nearest cache. Rows are taken some
    at a time, so that these 16 bytes per element of the paper's transform stay within the L2 cache, and need no more
    memory than that; x and the codes are what goes through memory.

    Raises ValueError for more than 8 bits, float64, or sizes that do not fit.
    """
    _check_rows(x, rotations, permutations, form, group_size, packed)
    # filled on the device: a tensor made from a number would be copied there, and waited for
    ends = [
        each if isinstance(each, Tensor) else torch.full((), each, dtype=torch.float32, device=x.device)
        for each in (low_ratio, high_ratio)
    ]
    return launch.quantize_rows(
        x, rotations, permutations, scale, shift, *ends, form.bits, form.kind, group_size, packed
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
    `code_sums` returns, which saves adding the codes up again. `input_bits`: below 8 the codes of the input need not
    be moved into the range of int8, which saves an operation per code.

    Exact up to float32's rounding of the sum, of the three factors and of the bias. Raises ValueError for codes of more
    than 8 bits, sums that int32 does not hold, groups of different sizes or of no multiple of 32 channels.
    """
    _check_linear(codes, scale, packed, form)
    return launch.linear(
        codes, scale, zero, sums, packed.values, packed.scale, packed.zero, sums_of_weight, bias,
        form.bits, input_bits, dtype,
    )  # fmt: skip


class TritonKernel:
    """`Kernel` on a GPU: weights stay packed, whether they are kept or not."""

    name, recovers, traceable = "Triton, int8 tensor cores", False, True

    def serves(self, x: IntegerFormat, weight: IntegerFormat) -> bool:
        """Codes of up to 8 bits."""
        return x.bits <= 8 and weight.bits <= 8

    def encode(self, x: Tensor, transform: nn.Module, shift: Tensor | None, quantizer: Quantizer) -> RowCodes:
        """See `Kernel.encode`; float64, and transforms and clips that are not fused, go through torch."""
        ratios = clip_ratios(quantizer.clip)
        if x.dtype is torch.float64 or ratios is None or not isinstance(transform, DualTransform | nn.Identity):
            return encode(x, transform, shift, quantizer)
        rotations, permutations, scale = x.new_empty(0, 1, 1), x.new_empty(0, x.shape[1], dtype=torch.int64), None
        if isinstance(transform, DualTransform):
            rotations, permutations, scale = transform.rotations, transform.permutations, transform.scale
        low, high = ratios
        how = {"low_ratio": low, "high_ratio": high, "form": quantizer.format}
        codes = quantize_rows(x.contiguous(), rotations, permutations, scale, shift, **how)
        return RowCodes(*codes, quantizer.format)

    def prepare(self, packed: PackedCodes, sums: Tensor, form: IntegerFormat, keep: bool) -> "PackedWeight":
        """See `Kernel.prepare`."""
        return PackedWeight(packed, sums, form)

    def linear(self, x: RowCodes, weight: "PackedWeight", bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Kernel.linear`."""
        how = {"sums_of_weight": weight.sums, "input_bits": x.form.bits}
        inputs = (x.values, x.scale, x.zero, x.sums.to(torch.int32))
        return linear(*inputs, weight.packed, weight.form, bias, dtype, **how)


class PackedWeight(NamedTuple):
    """What the product reads: the packed codes, of `form`, and their sums [O], int32."""

    packed: PackedCodes
    sums: Tensor
    form: IntegerFormat


def clip_ratios(clip: nn.Module) -> tuple[Tensor | float, Tensor | float] | None:
    """What a clip multiplies the ends of a range by; None if that is not all it does."""
    if isinstance(clip, NoClip):
        return 1.0, 1.0
    if isinstance(clip, RatioClip):
        return clip.ratio, clip.ratio
    return (clip.ratios[0], clip.ratios[1]) if isinstance(clip, FoundClip) else None


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


def _check_linear(codes: Tensor, scale: Tensor, packed: PackedCodes, form: IntegerFormat) -> None:
    """Raise ValueError for what `linear` does not take."""
    channels, numbers = codes.shape[-1], {ranges(scale), ranges(packed.scale)} - {1}
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
