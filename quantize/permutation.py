"""The zigzag permutation: deal channels to blocks so that every block gets its share of the large ones."""

import torch
from torch import Tensor, nn


def zigzag_permutation(peak: Tensor, block_size: int) -> Tensor:
    """Permutation P [C] (int64) that spreads the channels of large `peak` [C] evenly: use it as `x[..., P]`.

    Channels are sorted by falling peak and dealt to the K = C / block_size blocks boustrophedon: 1st to block 0, …,
    K-th to block K−1, the next to block K−1 again and back down. Inside a block the order is descending. Raises
    ValueError if `block_size` does not divide C. Source: DuQuant, sec. 3.2.
    """
    channels = peak.numel()
    if channels % block_size:
        raise ValueError(f"{channels} channels do not divide by block size {block_size}")
    order = torch.argsort(peak, descending=True, stable=True)
    dealt = order.view(block_size, channels // block_size).clone()  # [round, block]
    dealt[1::2] = dealt[1::2].flip(-1)
    return dealt.T.reshape(-1)


def permute_rows_(linear: nn.Module, permutation: Tensor, start: int = 0) -> None:
    """Put output rows `start`, `start` + 1, … of `linear` (and of its bias) into the order `permutation` [C]."""
    rows = slice(start, start + len(permutation))
    for parameter in (linear.weight, linear.bias):
        if parameter is not None:
            moved = parameter.detach().clone()
            moved[rows] = parameter[rows][permutation]
            parameter.data = moved


def permute_columns_(linear: nn.Module, permutation: Tensor) -> None:
    """Put the input channels of `linear` into the order `permutation` [C]."""
    linear.weight.data = linear.weight.detach()[:, permutation]
