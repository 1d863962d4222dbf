"""Hadamard matrices, for q and k and as a transform that needs no search."""

import torch
from torch import Tensor


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
