"""Rotation matrices: the base rotation, the random orthogonal factor, and the Hadamard matrix for q and k."""

import torch
from torch import Tensor

from quantize.config import RotationOrder


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
    q, r = torch.linalg.qr(gaussian)
    return torch.block_diag(torch.ones(1, 1, dtype=torch.float64), q * r.diagonal().sign())


def step_rotation(random: Tensor, order: RotationOrder) -> Tensor:
    """The matrix that every greedy step applies, R̃ Q or Q R̃, from Q [B, B]: [B, B], float64."""
    base = base_rotation(len(random), torch.float64)
    return base @ random if order is RotationOrder.RQ else random @ base


def exchange_index(size: int, other: Tensor | int) -> Tensor:
    """Indices 0…size−1 with 0 and `other` exchanged; `other` may be a 0-dim tensor on any device."""
    device = other.device if isinstance(other, Tensor) else None
    index = torch.arange(size, device=device)
    return torch.where(index == other, 0, torch.where(index == 0, other, index))


def hadamard(size: int) -> Tensor:
    """Orthonormal matrix [size, size], float32, with entries ±1/√size wherever such a matrix is easy to build.

    size = 2^k: Sylvester's construction. size = 2^k (p + 1) with a prime p ≡ 3 mod 4: its product with Paley's first
    construction (12, 20, 24, 96, …). Otherwise blocks of the largest power of two that divides `size`, which are still
    orthonormal and spread an outlier over their block.
    """
    power = size & -size
    odd = size // power
    core = torch.ones(1, 1, dtype=torch.float64)
    if odd > 1:
        orders = [odd * 2**k for k in range(2, power.bit_length()) if _is_prime(odd * 2**k - 1)]
        core = _paley(orders[0]) if orders else torch.eye(odd, dtype=torch.float64)
        power = size // len(core)
    matrix = core
    while power > 1:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
        power //= 2
    return (matrix / matrix[0].norm()).float()


def _paley(order: int) -> Tensor:
    """Hadamard matrix of `order` = p + 1 with a prime p ≡ 3 mod 4: I + S, S skew with the quadratic residues of p."""
    p = order - 1
    residue = -torch.ones(p, dtype=torch.float64)
    residue[torch.arange(1, p) ** 2 % p] = 1
    residue[0] = 0
    skew = torch.ones(order, order, dtype=torch.float64)
    skew[0, 0] = 0
    skew[1:, 0] = -1
    index = torch.arange(p)
    skew[1:, 1:] = residue[(index[None, :] - index[:, None]) % p]
    return torch.eye(order, dtype=torch.float64) + skew


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
