"""Numbers of 4 bits that a scale multiplies, and rounding that gradients pass."""

import torch
from torch import Tensor


class _StraightThroughRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def straight_through_round(x: Tensor) -> Tensor:
    """Round to nearest (ties to even); the gradient passes as if rounding were the identity."""
    return _StraightThroughRound.apply(x) if torch.is_grad_enabled() and x.requires_grad else x.round()


def power_below(x: Tensor) -> Tensor:
    """The largest power of two that is not above |x|, and 0 for 0: the bits of the exponent of float32 or float64."""
    integers, exponent = {4: (torch.int32, 0x7F800000), 8: (torch.int64, 0x7FF0000000000000)}[x.dtype.itemsize]
    return (x.view(integers) & exponent).view(x.dtype)


class E2M1:
    """Floats of 4 bits, a sign, two of exponent and one of mantissa: ±{0, ½, 1, 1½, 2, 3, 4, 6}. Source: OCP MX 1.0."""

    largest = 6.0
    exponent = 2  # of the largest
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    @staticmethod
    def nearest(x: Tensor) -> Tensor:
        """The nearest of these numbers, ties to an even mantissa; the largest beyond it. Straight-through."""
        x = x.clamp(-E2M1.largest, E2M1.largest)
        step = power_below(x.detach()).mul_(0.5).clamp_(min=0.5)
        if torch.is_grad_enabled() and x.requires_grad:
            return straight_through_round(x / step) * step
        return x.div_(step).round_().mul_(step)

    @staticmethod
    def pattern(x: Tensor) -> Tensor:
        """The bits of such numbers: uint8, the sign in bit 3."""
        size = x.abs()
        index = torch.where(size <= 2, 2 * size, (size + 2).clamp(max=7))
        return (index + 8 * x.signbit()).to(torch.uint8)

    @staticmethod
    def number(pattern: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `pattern`."""
        both = torch.tensor([*E2M1.values, *(-each for each in E2M1.values)], dtype=dtype, device=pattern.device)
        return both[pattern.int()]


class Int4:
    """Two's complement of 4 bits: −8 … 7."""

    largest = 7.0
    exponent = 2

    @staticmethod
    def nearest(x: Tensor) -> Tensor:
        """The nearest of these numbers, ties to even. Straight-through."""
        return straight_through_round(x).clamp(-8, 7)

    @staticmethod
    def pattern(x: Tensor) -> Tensor:
        """The bits of such numbers: uint8."""
        return x.to(torch.int8).view(torch.uint8) & 15

    @staticmethod
    def number(pattern: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `pattern`."""
        return ((pattern ^ 8).to(torch.int8) - 8).to(dtype)
