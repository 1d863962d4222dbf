"""The product of codes in exact arithmetic: what every kernel is held against.

With x̂ = (a − z_x)·s_x and ŵ = (b − z_w)·s_w, for a row of x and a row of W with one range each,

    x̂ ŵᵀ = s_x s_w (a bᵀ − z_x Σb − z_w Σa + C z_x z_w),

so one product of integers and the sums of their rows are all that is needed. Where groups of channels have ranges of
their own, it is the sum of this over them.
"""

import math

from torch import Tensor

from duquant.formats import Codes, IntegerFormat
from duquant.packing import PackedCodes, unpack


def linear(x: Codes, weight: PackedCodes, form: IntegerFormat, bias: Tensor | None = None) -> Tensor:
    """x̂ ŵᵀ + b [T, O] in float64, from the integers: exact but for the last product with the scales.

    `x`: codes [T, C], or [T, C/g, g] with a range for every group; `form`: that of the weight [O, C].
    """
    unpacked = unpack(weight, form)
    width = math.gcd(*(each.values.shape[-1] for each in (x, unpacked)))  # channels that have one range in both
    a, s_x, z_x = _in_groups(x, width)
    b, s_w, z_w = _in_groups(unpacked, width)
    # groups first: [G, T, width] times [G, width, O]; whole numbers below 2^53 are exact in float64
    products = a @ b.mT
    sums = z_x * b.sum(dim=2)[:, None] + a.sum(dim=2, keepdim=True) * z_w.mT - width * z_x * z_w.mT
    total = (s_x * s_w.mT * (products - sums)).sum(dim=0)
    return total if bias is None else total + bias


def _in_groups(codes: Codes, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values [C/width, n, width], scale and zero [C/width, n, 1], in float64."""
    values = codes.values.flatten(1).unflatten(1, (-1, width))
    groups = values.shape[1]
    ranges = [each.view(len(values), -1, 1) for each in (codes.scale, codes.zero)]
    ranges = [each.repeat_interleave(groups // each.shape[1], dim=1) for each in ranges]
    return tuple(each.double().transpose(0, 1) for each in (values, *ranges))
