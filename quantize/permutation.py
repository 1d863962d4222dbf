"""The zigzag permutation: deal channels to blocks so that every block gets its share of the large ones."""

import torch
from torch import Tensor


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
