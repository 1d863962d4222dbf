"""Smoothing: per-channel scales, and where their inverse goes. Exact: (x Λ⁻¹)(Λ Wᵀ) = x Wᵀ."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from duquant.tensors import row_parts, widen

PEAK_FLOOR = 1e-5
SCALE_FLOOR = 1e-2


def smoothing_scale(activation_peak: Tensor, weight_peak: Tensor, alpha: float) -> Tensor:
    """Λ = max|X|^α / max|W|^(1−α) per channel: [C], [C] → [C], float32. Source: SmoothQuant, eq. 4."""
    activation_peak = activation_peak.float().clamp(min=PEAK_FLOOR)
    weight_peak = weight_peak.float().clamp(min=PEAK_FLOOR)
    return (activation_peak.pow(alpha) / weight_peak.pow(1 - alpha)).clamp(min=SCALE_FLOOR)


def column_peak(weights: Sequence[Tensor]) -> Tensor:
    """Largest magnitude per input channel over weights [O_i, C]: [C]."""
    peaks = [weight[part].abs().amax(dim=0) for weight in weights for part in row_parts(weight)]
    return torch.stack(peaks).amax(dim=0)


def column_energy(weights: Sequence[Tensor]) -> Tensor:
    """Root of the mean square per input channel over weights [O_i, C] taken together: [C], float32."""
    squares = [widen(weight[part]).square().sum(dim=0) for weight in weights for part in row_parts(weight)]
    return (torch.stack(squares).sum(dim=0) / sum(map(len, weights))).sqrt().float()


def divide_norm_(norm: nn.Module, scale: Tensor, offset: float = 0.0) -> Tensor:
    """Divide the gain `offset` + weight of a norm, in place, by `scale` [C]; return the scale really divided out.

    The weight keeps the model's own dtype, so the quotient is rounded; returning gain/quotient instead of `scale` keeps
    the identity exact in half precision. Channels whose quotient would underflow to 0 are left alone (scale 1). A bias
    is divided too.
    """
    gain = offset + widen(norm.weight)
    weight = (gain / scale.to(gain) - offset).to(norm.weight.dtype)
    if offset:
        weight = _beside_offset(weight, gain, offset)
    quotient = offset + weight.to(gain)
    kept = (quotient != 0) & quotient.isfinite()
    scale = torch.where(kept, gain / quotient, 1.0)
    norm.weight.data = torch.where(kept, weight, norm.weight)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data = (norm.bias / scale).to(norm.bias.dtype)
    return scale


def _beside_offset(weight: Tensor, gain: Tensor, offset: float) -> Tensor:
    """`weight` [C] of a norm with an offset, as exact as the norm will read it, and not −`offset` where gain is not 0.

    Such norms read their weight in float32, even in a float64 model. Small gains need weights near −1, where half
    precision is coarse (2⁻⁸ in bfloat16): what would round to a gain of 0 becomes the smallest gain there is, or the
    channels that need the largest scales would get none.
    """
    weight = weight.to(torch.float32).to(weight.dtype)
    held = torch.float32 if weight.dtype is torch.float64 else weight.dtype
    step = torch.finfo(held).eps / 2  # between neighbours just below 1
    return torch.where((weight == -offset) & (gain > 0), weight + step, weight)


def divide_rows_(linear: nn.Linear, scale: Tensor, start: int = 0) -> Tensor:
    """Divide output rows `start`, `start` + 1, … of `linear` (and of its bias), in place, by `scale` [C]; return it."""
    rows = slice(start, start + len(scale))
    for parameter in (linear.weight, linear.bias):
        if parameter is not None:
            divided = parameter.detach().clone()
            divided[rows].div_(scale.to(divided).view(-1, *[1] * (divided.dim() - 1)))
            parameter.data = divided
    return scale


def scale_columns_(modules: Sequence[nn.Module], scale: Tensor) -> None:
    """Multiply the input channels of every weight [O, C] by `scale` [C], in place and in at least float32."""
    for module in modules:
        wide = widen(module.weight)
        module.weight.data = (wide * scale.to(wide)).to(module.weight.dtype)
