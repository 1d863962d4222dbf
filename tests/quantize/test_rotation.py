"""Rotation matrices: the base rotation and the random factor."""

import math

import pytest
import torch
from torch import Tensor

from quantize.rotation import base_rotation, exchange_index, random_orthogonal, step_rotation
from quantize.rotation_settings import RotationOrder

DENSE_SIZES = [*range(2, 34), 48, 63, 64, 65, 80, 96, 127, 128, 129, 130]


def orthogonality_error(matrix: Tensor) -> float:
    matrix = matrix.double()
    return (matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)).abs().max().item()


def literal_base_rotation(size: int) -> Tensor:
    """R̃ = E · G(n−1)…G(1) · E, as METHOD §3 writes it, from dense matrices."""
    exchange = torch.eye(size, dtype=torch.float64)
    exchange[[0, size - 1]] = exchange[[size - 1, 0]]
    product = torch.eye(size, dtype=torch.float64)
    for i in range(1, size):
        givens = torch.eye(size, dtype=torch.float64)
        cos, sin = 1 / math.sqrt(i + 1), math.sqrt(i) / math.sqrt(i + 1)
        givens[i - 1, i - 1] = givens[i, i] = cos
        givens[i - 1, i], givens[i, i - 1] = -sin, sin
        product = givens @ product
    return exchange @ product @ exchange


@pytest.mark.parametrize("size", DENSE_SIZES)
def test_base_rotation_is_the_product_of_givens_rotations(size):
    torch.testing.assert_close(
        base_rotation(size, torch.float64), literal_base_rotation(size), atol=1e-14 * size, rtol=0
    )


@pytest.mark.parametrize("size", [*range(2, 131), 896])
def test_base_rotation_is_orthogonal_and_its_first_row_is_constant(size):
    exact = base_rotation(size, torch.float64)
    assert exact.shape == (size, size)
    assert orthogonality_error(exact) < 1e-13
    torch.testing.assert_close(exact[0], torch.full((size,), size**-0.5, dtype=torch.float64), atol=1e-15, rtol=0)
    assert torch.equal(base_rotation(size), exact.float())


def test_base_rotation_of_one_channel_is_one_and_of_none_is_refused():
    assert base_rotation(1).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="at least one channel"):
        base_rotation(0)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 63])
def test_random_orthogonal_leaves_channel_zero_alone(size):
    q = random_orthogonal(size, torch.Generator().manual_seed(1))
    assert (q.dtype, q.shape) == (torch.float64, (size, size))
    assert q[0].tolist() == q[:, 0].tolist() == [1.0] + [0.0] * (size - 1)
    assert orthogonality_error(q) < 1e-13


def test_random_orthogonal_is_a_function_of_the_generator_alone():
    first = random_orthogonal(8, torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    assert torch.equal(first, random_orthogonal(8, torch.Generator().manual_seed(3)))
    assert not torch.allclose(first, random_orthogonal(8, torch.Generator().manual_seed(4)), atol=1e-2)


def test_random_orthogonal_has_no_preferred_sign():
    generator = torch.Generator().manual_seed(0)
    diagonals = torch.stack([random_orthogonal(4, generator).diagonal()[1:] for _ in range(400)])
    # Haar: every diagonal entry has mean 0 and variance 1/3; without fixing the signs of R, QR gives a biased one
    assert diagonals.mean(dim=0).abs().max() < 5 * (1 / 3 / 400) ** 0.5


def test_step_rotation_multiplies_in_the_order_its_name_says():
    q = random_orthogonal(12, torch.Generator().manual_seed(5))
    base = literal_base_rotation(12)
    right, left = step_rotation(q, RotationOrder.RQ), step_rotation(q, RotationOrder.QR)
    torch.testing.assert_close(right, base @ q, atol=1e-14, rtol=0)
    torch.testing.assert_close(left, q @ base, atol=1e-14, rtol=0)


def test_only_qr_keeps_the_constant_first_row():
    q = random_orthogonal(12, torch.Generator().manual_seed(5))
    constant = torch.full((12,), 12**-0.5, dtype=torch.float64)
    torch.testing.assert_close(step_rotation(q, RotationOrder.QR)[0], constant, atol=1e-14, rtol=0)
    assert (step_rotation(q, RotationOrder.RQ)[0] - constant).abs().max() > 0.1


@pytest.mark.parametrize("other", [0, 2, 4])
def test_exchange_index_swaps_zero_and_the_other(other):
    expected = list(range(5))
    expected[0], expected[other] = other, 0
    assert exchange_index(5, other).tolist() == expected
