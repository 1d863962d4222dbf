"""Number formats: a range gives parameters, parameters give codes, codes give numbers back.

    parameters = form.parameters(low, high)   # once per range
    codes = form.encode(x, parameters)        # whole tensors, or column by column with fixed parameters
    x_hat = form.decode(codes)

An integer format now; others plug in beside it with the same four functions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from duquant.scheme import TensorScheme
from duquant.tensors import row_parts

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


class Parameters(NamedTuple):
    """What decodes a range: scale and zero point, of one shape that broadcasts against what is encoded."""

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Codes:
    """A quantized tensor: integers, and the scale and zero point (floats that broadcast) that decode them.

    `values` [..., C], or [..., C/g, g] where every group of g channels has a range of its own.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes as they are held now."""
        return self.values.nbytes + self.scale.nbytes + self.zero.nbytes

    def to(self, device: torch.device) -> "Codes":
        """The same on `device`."""
        return Codes(*(getattr(self, name).to(device) for name in ("values", "scale", "zero")))


@dataclass(frozen=True)
class IntegerFormat:
    """Uniform integers q in [0, 2^bits − 1] that stand for x̂ = (q − zero) · scale.

    Asymmetric: scale = (hi − lo)/(2^bits − 1), zero = round(−lo/scale).
    Symmetric: scale = max(|lo|, |hi|)/(2^(bits−1) − 1), zero = 2^(bits−1) − 1.
    """

    bits: int
    symmetric: bool = False

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        """The smallest integers of torch that hold every code."""
        return torch.uint8 if self.bits <= 8 else torch.int16

    def parameters(self, low: Tensor, high: Tensor) -> Parameters:
        """Scale and zero point for values between `low` and `high` (same shapes out as in)."""
        if self.symmetric:
            half = 2 ** (self.bits - 1) - 1
            scale = (torch.maximum(low.abs(), high.abs()) / half).clamp(*SCALE_LIMITS)
            return Parameters(scale, torch.full_like(scale, half))
        scale = ((high - low) / self.largest).clamp(*SCALE_LIMITS)
        return Parameters(scale, (-low / scale).clamp(*ZERO_LIMITS).round())

    def rounded(self, x: Tensor, parameters: Parameters) -> Tensor:
        """The codes of `x` as floats. Differentiable in `x` and in the parameters (straight-through)."""
        return (straight_through_round(x / parameters.scale) + parameters.zero).clamp(0, self.largest)

    def encode(self, x: Tensor, parameters: Parameters) -> Codes:
        """The codes of `x` under parameters that broadcast against it."""
        return Codes(self.rounded(x, parameters).to(self.dtype), *parameters)

    def decode(self, codes: Codes) -> Tensor:
        """x̂ in the dtype of the scale, shaped as the codes."""
        return (codes.values.to(codes.scale.dtype) - codes.zero) * codes.scale

    def fake(self, x: Tensor, parameters: Parameters) -> Tensor:
        """decode(encode(x)) without integers between them: the same numbers, and differentiable."""
        return (self.rounded(x, parameters) - parameters.zero) * parameters.scale


def number_format(scheme: TensorScheme) -> IntegerFormat:
    """The format of a tensor's codes."""
    return IntegerFormat(scheme.bits, scheme.symmetric)


def decode_weight(codes: Codes, form: IntegerFormat, dtype: torch.dtype) -> Tensor:
    """The weight [O, C] in `dtype`, decoded in float32 or more some rows at a time: no other large tensors."""
    rows = len(codes.values)
    weight = torch.empty(codes.values.shape, dtype=dtype, device=codes.values.device)
    for part in row_parts(codes.values):
        weight[part] = form.decode(Codes(codes.values[part], codes.scale[part], codes.zero[part]))
    return weight.view(rows, -1)
