"""Hadamard matrices of every size that a head or a block can have."""

import pytest
import torch

from duquant.hadamard import hadamard


@pytest.mark.parametrize("size", range(1, 129))
def test_hadamard_is_orthonormal(size):
    matrix = hadamard(size)
    assert (matrix.dtype, matrix.shape) == (torch.float32, (size, size))
    assert (matrix.double() @ matrix.double().T - torch.eye(size)).abs().max() < 1e-6


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128, 256, 12, 20, 24, 48, 72, 80, 96])
def test_hadamard_spreads_every_channel_over_the_whole_head(size):
    torch.testing.assert_close(hadamard(size).abs(), torch.full((size, size), size**-0.5), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("size", "block"), [(6, 2), (28, 4), (56, 8), (7, 1)])
def test_hadamard_of_an_awkward_size_spreads_over_its_power_of_two(size, block):
    nonzero = hadamard(size) != 0
    assert (nonzero.sum(dim=0) == block).all()
    assert (nonzero.sum(dim=1) == block).all()
