"""Fake quantization as one step of the graph: fewer passes over memory, forward and back, than its parts would take."""

import torch
from torch import Tensor

from duquant.formats import Format, IntegerFormat


class _FakeQuantize(torch.autograd.Function):
    """x̂ = (clamp(round(x/s) + z, 0, n) − z)·s with s and z of the range [low, high] of every vector.

    Straight-through: dx̂/dx is 1 inside the range and 0 outside; outside, x̂ is an end, and follows it. Inside, x̂ moves
    with s by round(x/s) − x/s, and s = (high − low)/n. Source: LSQ, for both ends of a range.
    """

    @staticmethod
    def forward(ctx, x: Tensor, low: Tensor, high: Tensor, form: IntegerFormat) -> Tensor:
        scale, zero = form.parameters(low, high)
        quotient = x / scale
        codes = quotient.round().add_(zero)
        below, above = codes < 0, codes > form.largest
        rounded = codes.clamp_(0, form.largest).sub_(zero)
        ctx.save_for_backward(rounded - quotient, below, above)
        ctx.form = form
        ctx.ends = (low.abs() >= high.abs()) if form.symmetric else None
        return rounded.mul_(scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        moved, below, above = ctx.saved_tensors
        outside = below | above
        inside = gradient.masked_fill(outside, 0)
        by_scale = (inside * moved).sum(dim=-1, keepdim=True)
        by_low = torch.where(below, gradient, 0).sum(dim=-1, keepdim=True)
        by_high = torch.where(above, gradient, 0).sum(dim=-1, keepdim=True)
        if ctx.form.symmetric:  # both ends are ± the larger of the two
            half = ctx.form.largest / 2 if ctx.form.full_range else ctx.form.middle
            larger = by_scale / half + by_high - by_low
            return inside, torch.where(ctx.ends, -larger, 0), torch.where(ctx.ends, 0, larger), None
        return inside, by_low - by_scale / ctx.form.largest, by_high + by_scale / ctx.form.largest, None


def fake_quantize(x: Tensor, low_ratio: Tensor, high_ratio: Tensor, form: Format) -> Tensor:
    """Fake quantization of every vector of `x` [..., C], float32, in its range times the ratios, differentiable in all.

    `low_ratio`, `high_ratio` broadcast against [..., 1]. The range moves with x too.
    """
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    if not isinstance(form, IntegerFormat):
        return form.fake(x, form.parameters(low_ratio * low, high_ratio * high))
    return _FakeQuantize.apply(x, low_ratio * low, high_ratio * high, form)
