"""Number formats: from real numbers to codes and back. An integer format now; others plug in beside it."""

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_LIMITS = (1e-5, 1e4)
ZERO_LIMITS = (-1e4, 1e4)


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


@dataclass(frozen=True)
class Codes:
    """A quantized tensor: integers held as floats, with the scale and zero point that decode them (broadcastable)."""

    values: Tensor
    scale: Tensor
    zero: Tensor

    def dequantize(self) -> Tensor:
        """x̂ = (q − zero) · scale."""
        return (self.values - self.zero) * self.scale


@dataclass(frozen=True)
class IntegerFormat:
    """Uniform integers q in [0, 2^bits − 1].

    Asymmetric: scale = (hi − lo)/(2^bits − 1), zero = round(−lo/scale).
    Symmetric: scale = max(|lo|, |hi|)/(2^(bits−1) − 1), zero = 2^(bits−1) − 1.
    """

    bits: int
    symmetric: bool = False

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for values between `low` and `high` (same shapes out as in)."""
        if self.symmetric:
            half = 2 ** (self.bits - 1) - 1
            scale = (torch.maximum(low.abs(), high.abs()) / half).clamp(*SCALE_LIMITS)
            return scale, torch.full_like(scale, half)
        scale = ((high - low) / self.largest).clamp(*SCALE_LIMITS)
        return scale, (-low / scale).clamp(*ZERO_LIMITS).round()

    def quantize(self, x: Tensor, low: Tensor, high: Tensor) -> Codes:
        """Codes of `x` for the range [low, high], which broadcasts against `x`. Differentiable (straight-through)."""
        scale, zero = self.parameters(low, high)
        values = straight_through_round(x / scale) + zero
        return Codes(values.clamp(0, self.largest), scale, zero)
