"""Clip ratios that are searched on calibration data: of weights, one pair per range, and of activations."""

from collections.abc import Iterable

import torch
from torch import Tensor

from duquant.formats import Format, IntegerFormat, Parameters
from duquant.quantizer import FoundClip, Quantizer, ends
from duquant.tensors import row_parts

RATIOS = tuple(1 - 0.03 * step for step in range(18))  # 1 … 0.49 of the range, for both ends together
ENDS = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)  # then of that ratio, for each end by itself
ACTIVATION_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
# of formats of blocks. Where scales are powers of two there are few: that of the range, half and twice it, which clips
# of 1, ½ and 2 give; for an activation the clip says from where on the next one is taken, and 4/3 cuts off nothing.
# Above 1 the largest magnitude becomes one of the smaller elements, where they lie closer: 3/2 makes it 4 instead of 6.
BLOCK_RATIOS = (1.0, 2.0, 0.5, *(1 - 0.04 * step for step in range(1, 11)), *(1 + 0.1 * step for step in range(1, 7)))
BLOCK_ACTIVATION_RATIOS = (1.0, 4 / 3, 1.25, 1.17, 1.08, 0.94, 0.88, 0.82)


def search_parameters(
    weight: Tensor, form: Format, importance: Tensor, group_size: int | None, base: Tensor | None = None
) -> Parameters:
    """Scale and zero, [O, 1] or [O, C/g, 1], of the ranges of `weight` [O, C] that lose least.

    The loss of a range is Σ_c h_c (w_c − ŵ_c)² with the `importance` h [C], the mean square of every input channel.
    First both ends are shortened alike, then the lower and the upper end by themselves. `base`: of a format that has
    one.
    """
    size = group_size or weight.shape[1]
    vectors, importance = weight.unflatten(1, (-1, size)), importance.view(-1, size)
    parts = [_search(vectors[part], form, importance, base) for part in row_parts(vectors)]
    found = Parameters(*(torch.cat(each) for each in zip(*parts, strict=True)))
    return found if group_size not in (None, weight.shape[1]) else Parameters(*(each[:, 0] for each in found))


def _search(vectors: Tensor, form: Format, importance: Tensor, base: Tensor | None) -> Parameters:
    """Of vectors [rows, groups, g]: scale and zero [rows, groups, 1]."""
    low, high = ends(vectors)
    ratios = RATIOS if isinstance(form, IntegerFormat) else BLOCK_RATIOS

    def loss(low_ratio: Tensor | float, high_ratio: Tensor | float) -> Tensor:
        error = form.fake(vectors, form.parameters(low_ratio * low, high_ratio * high, base)).sub_(vectors).square_()
        return error.mul_(importance).sum(dim=-1, keepdim=True)

    def best(losses: Iterable[Tensor], ratios: list[Tensor]) -> Tensor:
        choice = torch.stack(list(losses)).argmin(dim=0)
        return torch.stack(ratios).gather(0, choice[None])[0]

    both = best((loss(each, each) for each in ratios), [torch.full_like(low, each) for each in ratios])
    if form.symmetric:
        return form.parameters(both * low, both * high, base)
    shares = [(both * each).clamp(max=1) for each in ENDS]
    lower = best((loss(each, both) for each in shares), shares)
    upper = best((loss(lower, each) for each in shares), shares)
    return form.parameters(lower * low, upper * high)


def search_activation_ratio(vectors: Tensor, quantizer: Quantizer, metric: Tensor | None = None) -> float:
    """The ratio for both ends of every vector [n, C] that loses least, of those that suit the format.

    The loss is Σ e G eᵀ over the errors e of all vectors, with the `metric` G [C, C] (None: the identity): with
    G = ŴᵀŴ it is the error of the output.
    """
    ratios = ACTIVATION_RATIOS if isinstance(quantizer.format, IntegerFormat) else BLOCK_ACTIVATION_RATIOS
    losses = []
    for ratio in ratios:
        clip = FoundClip(torch.tensor([ratio, ratio], device=vectors.device))
        error = Quantizer(quantizer.format, clip, quantizer.group_size)(vectors) - vectors
        losses.append((error * (error if metric is None else error @ metric)).sum())
    return ratios[int(torch.stack(losses).argmin())]
