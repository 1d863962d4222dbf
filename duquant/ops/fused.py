"""Fake quantization on a GPU in one pass: `Quantizer.forward` to the bit, without a dozen elementwise operations.

The kernel reads what is quantized once and writes it once. It is used where Triton is there and, tried once for each
format on a few vectors, it gives what torch's operations give; where gradients are needed, while something is traced
and for clips that do more than multiply the ends of a range, torch's operations are.

What is rotated before it is rounded (`rotated`) is taken some rows at a time: what lies between stays in the nearest
cache. Rotations are as exact as torch's products of float32, but not the same to the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duquant.formats import SCALE_LIMITS, ZERO_LIMITS, IntegerFormat
from duquant.ops.triton import available, clip_ratios
from duquant.ops.triton_launch import (
    AS_WRITTEN,
    HALVED_BLOCKS,
    inverted,
    on,
    power_of_two,
    row_parts,
    transformed,
)
from duquant.ops.triton_quantize import ROUNDING
from duquant.ops.triton_quantize import fake_quantize as kernel
from duquant.ops.triton_tools import interpreted, triton

if TYPE_CHECKING:
    from duquant.quantizer import Quantizer

logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONGEST = 16384  # channels that a program holds at once: 32 a thread
TILE = 4096  # numbers of several short vectors that a program takes
TURNED = 1e-5  # of a row's length, that a kernel's two rotations of it may be off; TF32 is a hundred times as far off


def fake_quantize(x: Tensor, quantizer: Quantizer, dtype: torch.dtype) -> Tensor | None:
    """`quantizer.computed(x, dtype)` from the kernel; None where that does not serve."""
    if x.device.type != "cuda" or not served(x, quantizer, dtype) or not works(x.device.type, quantizer.format):
        return None
    return launched(x, quantizer, dtype)


def served(x: Tensor, quantizer: Quantizer, dtype: torch.dtype) -> bool:
    """Whether the kernel computes this: plain tensors, nothing traced or differentiated, integers, a clip of ratios."""
    # a compiler fuses these operations by itself; a subclass of Tensor may be one without content
    if type(x) is not Tensor or torch.compiler.is_compiling() or not x.numel() or not {x.dtype, dtype} <= {*DTYPES}:
        return False
    if not isinstance(quantizer.format, IntegerFormat):
        return False
    ratios = clip_ratios(quantizer.clip)
    parts = (x, *(each for each in ratios or () if isinstance(each, Tensor)))
    return ratios is not None and not (torch.is_grad_enabled() and any(part.requires_grad for part in parts))


@cache
def works(device: str, form: IntegerFormat) -> bool:
    """Whether the kernel gives on a type of device what torch gives, for this format. Tried and announced once."""
    what = f"fake quantization to {form.bits} bits"
    return available(torch.device(device)) and tried(what, lambda: trial(torch.device(device), form))


@cache
def turns(device: str, size: int) -> bool:
    """Whether rotations of blocks of `size` give there what torch gives, but for the last bits. As `works`."""
    what = f"a rotation of blocks of {size}"
    return available(torch.device(device)) and tried(what, lambda: rotation_trial(torch.device(device), size))


def tried(what: str, trial: Callable[[], bool]) -> bool:
    """Whether a kernel's `trial` succeeds; that is announced, or why it does not."""
    try:
        same = trial()
    except Exception as problem:  # a compiler that is missing, or fails in a way of its own
        same, reason = False, (str(problem).splitlines() or [type(problem).__name__])[0]
    else:
        reason = "its numbers are not torch's"
    if not same:
        logger.warning("%s in one kernel does not work here: %s", what, reason)
        return False
    logger.info("%s is one kernel (Triton)", what)
    return True


def trial(device: torch.device, form: IntegerFormat) -> bool:
    """Whether some vectors, of all sizes and on either side of zero, are rounded to the bit as torch rounds them."""
    from duquant.quantizer import Quantizer, RatioClip  # which looks for this module

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator) * torch.logspace(-6, 6, 64)[:, None]
    x = (x + x.abs().amax(dim=1, keepdim=True) * torch.arange(-2, 2).repeat(16)[:, None] / 2).to(device)
    quantizer = Quantizer(form, RatioClip(0.9))
    pairs = [(each, dtype) for each in (x, x.half()) for dtype in (torch.float32, torch.float16)]
    with torch.no_grad():
        return all(
            torch.equal(launched(each, quantizer, dtype), quantizer.computed(each, dtype)) for each, dtype in pairs
        )


def rotation_trial(device: torch.device, size: int) -> bool:
    """Whether some rows of two blocks, a permutation between two rotations of each, are turned as torch turns them."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q.to(device)
    x = (torch.randn(64, 2 * size, generator=generator) * torch.logspace(-3, 3, 64)[:, None]).to(device)
    order = torch.randperm(2 * size, generator=generator).to(device)
    found = transformed(x, torch.stack([matrix, matrix]), order[None], None)
    once = (x.double().view(-1, size) @ matrix.double()).view(x.shape)[:, order]
    exact = (once.reshape(-1, size) @ matrix.double()).view(x.shape)
    return bool(((found - exact).norm(dim=1) < TURNED * exact.norm(dim=1)).all())


def rotate_and_round(x: Tensor, quantizer: Quantizer, rotations: Tensor, *others: Tensor | None) -> Tensor | None:
    """`rotated` of these arguments in the dtype of `x`; None where kernels do not serve."""
    if x.device.type != "cuda" or not len(rotations) or rotations.shape[-1] not in HALVED_BLOCKS:
        return None
    if (torch.is_grad_enabled() and rotations.requires_grad) or not served(x, quantizer, x.dtype):
        return None
    if not works("cuda", quantizer.format) or not turns("cuda", rotations.shape[-1]):
        return None
    return rotated(x, quantizer, rotations, *others)


def rotated(
    x: Tensor,
    quantizer: Quantizer,
    rotations: Tensor,
    permutations: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Q(T(x Λ⁻¹) − z) of vectors `x` [..., C] by the kernels, T being `DualTransform`'s, Λ `scale` and z `shift` [C].

    A single rotation needs no `permutations`. The result lies in memory as `x` does, if that has no gaps.
    """
    order = sorted(range(x.dim()), key=lambda dim: -x.stride(dim))
    ordered = x.permute(order)
    if order[-1] != x.dim() - 1 or not ordered.is_contiguous():
        order, ordered = list(range(x.dim())), x.contiguous()
    rows, y = ordered.view(-1, x.shape[-1]), torch.empty_like(ordered)
    to = y.view(rows.shape)
    with on(x.device):
        for part in row_parts(*rows.shape):
            turned = transformed(rows[part], rotations, permutations, scale)
            launch(turned if shift is None else turned.sub_(shift), to[part], quantizer)
    return y.permute([order.index(dim) for dim in range(x.dim())])


def launched(x: Tensor, quantizer: Quantizer, dtype: torch.dtype) -> Tensor:
    """`quantizer.computed(x, dtype)` from the kernel, laid out as `x` is where its last dimension is dense."""
    dense = x if x.stride(-1) == 1 else x.contiguous()
    shaped = dense if x.dim() <= 4 else dense.flatten(0, -4)
    return operator(shaped, *settings(quantizer), quantizer.group_size or x.shape[-1], dtype).view(x.shape)


def launch(x: Tensor, y: Tensor, quantizer: Quantizer) -> None:
    """Write `quantizer.computed(x, y.dtype)` to `y`, of up to four dimensions, the last of both of which is dense."""
    _launch(x, y, *settings(quantizer), quantizer.group_size or x.shape[-1])


def settings(quantizer: Quantizer) -> tuple[Tensor | None, float, float, int, int]:
    """Ratios as a tensor or as two numbers, bits and the kind of a quantizer."""
    low, high = clip_ratios(quantizer.clip)
    ratios = getattr(quantizer.clip, "ratios", None)
    if ratios is not None:
        low, high, ratios = 1.0, 1.0, ratios.contiguous()
    return ratios, low, high, quantizer.format.bits, quantizer.format.kind


@torch.library.custom_op("duquant::triton_fake_quantize", mutates_args=())
def operator(
    x: Tensor,
    ratios: Tensor | None,
    low_ratio: float,
    high_ratio: float,
    bits: int,
    symmetric: int,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    """Fake quantization of vectors of `length` along the last axis of `x`, of up to four dimensions, as `dtype`."""
    y = torch.empty_like(x, dtype=dtype)
    with on(x.device):
        _launch(x, y, ratios, low_ratio, high_ratio, bits, symmetric, length)
    return y


def _launch(
    x: Tensor, y: Tensor, ratios: Tensor | None, low: float, high: float, bits: int, symmetric: int, length: int
) -> None:
    """The kernel over all vectors of `x`, into `y`."""
    groups, (_, *sizes) = x.shape[-1] // length, (1,) * (4 - x.dim()) + tuple(x.shape[:-1])
    x_strides, y_strides = ((0,) * (4 - x.dim()) + each.stride()[:-1] for each in (x, y))
    block = power_of_two(length, 16, 64 if interpreted() else LONGEST)
    block_v = power_of_two(TILE // block, 1, 32)
    vectors = x.numel() // length
    kernel[(triton.cdiv(vectors, block_v),)](
        x, y, ratios, low, high, vectors, length, groups, *sizes, *x_strides, *y_strides,
        *SCALE_LIMITS, *ZERO_LIMITS, BITS=bits, SYMMETRIC=symmetric, RATIOS=ratios is not None,
        INVERTED=inverted(x.device), ROUNDING=ROUNDING, WHOLE=length <= block, BLOCK_V=block_v, BLOCK_C=block,
        num_warps=power_of_two(block * block_v // 512, 1, 16), **AS_WRITTEN,
    )  # fmt: skip


@operator.register_fake
def _(x, ratios, low_ratio, high_ratio, bits, symmetric, length, dtype):
    return torch.empty_like(x, dtype=dtype)
