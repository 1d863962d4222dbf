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


class E2M1:
    """Floats of 4 bits, a sign, two of exponent and one of mantissa: ±{0, ½, 1, 1½, 2, 3, 4, 6}. Source: OCP MX 1.0."""

    largest = 6.0
    exponent = 2  # of the largest
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    @staticmethod
    def nearest(x: Tensor) -> Tensor:
        """The nearest of these numbers, ties to an even mantissa; the largest beyond it. Straight-through."""
        x = x.clamp(-E2M1.largest, E2M1.largest)
        size = x.detach().abs()
        step = 0.5 + 0.5 * (size >= 2) + (size >= 4).to(x.dtype)
        return straight_through_round(x / step) * step

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
