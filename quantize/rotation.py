"""Rotation matrices: the base rotation and the random orthogonal factor."""

import torch
from torch import Tensor

from quantize.rotation_settings import RotationOrder
from utils.device import cpu_threads

SMALL = 256  # channels, up to which waking threads costs more than it gives


def base_rotation(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The base rotation R̃ [size, size]: orthogonal, first row constant 1/√size, so it spreads channel 0 evenly.

    R̃ = E · G(n−1)…G(1) · E, with G(i) the Givens rotation of the plane (i−1, i) that has cos = 1/√(i+1) and E the
    exchange of 0 and n−1. Multiplied out, row i−1 of the product (i = 1…n−1) is 1/√(i(i+1)) left of column i,
    −√(i/(i+1)) at it and 0 beyond, and its last row is constant; that is built here directly. Source: DuQuant, sec.
    3.2.
    """
    if size < 1:
        raise ValueError(f"a rotation needs at least one channel, not {size}")
    i = torch.arange(1, size, dtype=torch.float64)
    rotation = torch.full((size, size), size**-0.5, dtype=torch.float64)
    rotation[:-1] = torch.ones(size - 1, size, dtype=torch.float64).tril() * (i * (i + 1)).rsqrt()[:, None]
    rotation[torch.arange(size - 1), torch.arange(1, size)] = -(i / (i + 1)).sqrt()
    exchange = exchange_index(size, size - 1)
    return rotation[exchange][:, exchange].to(dtype)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Q = diag(1, q) [size, size], float64, with q drawn uniformly (Haar) from the orthogonal matrices."""
    gaussian = torch.randn(size - 1, size - 1, dtype=torch.float64, generator=generator)
    with cpu_threads(1 if size <= SMALL else None):
        q, r = torch.linalg.qr(gaussian)
    return torch.block_diag(torch.ones(1, 1, dtype=torch.float64), q * r.diagonal().sign())


def step_rotation(random: Tensor, order: RotationOrder) -> Tensor:
    """The matrix that every greedy step applies, R̃ Q or Q R̃, from Q [B, B]: [B, B], float64."""
    base = base_rotation(len(random), torch.float64)
    return base @ random if order is RotationOrder.RQ else random @ base


def exchange_index(size: int, other: int) -> Tensor:
    """Indices 0…size−1 with 0 and `other` exchanged."""
    return exchange_indices(size, torch.device("cpu"))[other]


def exchange_indices(size: int, device: torch.device) -> Tensor:
    """Row d holds the indices 0…size−1 with 0 and d exchanged: [size, size], int64."""
    index = torch.arange(size, device=device)
    others = index[:, None]
    return torch.where(index == others, 0, torch.where(index == 0, others, index))
