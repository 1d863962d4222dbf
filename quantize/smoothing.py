"""Smoothing: per-channel scales, and where their inverse goes. Exact: (x Λ⁻¹)(Λ Wᵀ) = x Wᵀ."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PEAK_FLOOR = 1e-5
SCALE_FLOOR = 1e-2


def smoothing_scale(activation_peak: Tensor, weight_peak: Tensor, alpha: float) -> Tensor:
    """Λ = max|X|^α / max|W|^(1−α) per channel: [C], [C] → [C], float32. Source: SmoothQuant, eq. 4."""
    activation_peak = activation_peak.float().clamp(min=PEAK_FLOOR)
    weight_peak = weight_peak.float().clamp(min=PEAK_FLOOR)
    return (activation_peak.pow(alpha) / weight_peak.pow(1 - alpha)).clamp(min=SCALE_FLOOR)


def column_peak(weights: Sequence[Tensor]) -> Tensor:
    """Largest magnitude per input channel over weights [O_i, C]: [C]."""
    return torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)


def absorb_inverse_(absorber: nn.Module, scale: Tensor) -> Tensor:
    """Divide the output channels of `absorber`, in place, by `scale` [C]; return the scale that was really divided out.

    A linear gives its rows and bias, a norm its weight and bias. A norm's weight is kept in the model's own dtype, so
    the quotient is rounded; returning weight/quotient instead of `scale` keeps the identity exact in half precision.
    Channels whose quotient would underflow to 0 are left alone (scale 1).
    """
    if isinstance(absorber, nn.Linear):
        absorber.weight.data = absorber.weight / scale.to(absorber.weight)[:, None]
        if absorber.bias is not None:
            absorber.bias.data = absorber.bias / scale.to(absorber.bias)
        return scale
    weight = absorber.weight.to(torch.promote_types(absorber.weight.dtype, torch.float32))
    quotient = (weight / scale.to(weight)).to(absorber.weight.dtype)
    kept = (quotient != 0) & quotient.isfinite()
    scale = torch.where(kept, weight / quotient.to(weight), 1.0)
    absorber.weight.data = torch.where(kept, quotient, absorber.weight)
    if getattr(absorber, "bias", None) is not None:
        absorber.bias.data = (absorber.bias / scale).to(absorber.bias.dtype)
    return scale


def scale_columns_(linears: Sequence[nn.Linear], scale: Tensor) -> None:
    """Multiply the input channels of every linear by `scale` [C], in place."""
    for linear in linears:
        linear.weight.data = linear.weight * scale.to(linear.weight)
