"""What the kernel of the greedy search is held to: the steps that torch takes; see `triton_cases.py`."""

import pytest
import torch
from triton_cases import DEVICE, random

from quantize import greedy, greedy_kernel
from quantize.rotation import random_orthogonal, step_rotation
from quantize.rotation_settings import RotationOrder, SearchRule


@pytest.mark.parametrize("rows", [1, 16, 77])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_the_kernel_takes_the_steps_that_torch_takes(size, rows):
    x = random(rows, size)
    x[:, 3] *= 30
    x[rows // 2, 7] = -900
    step = step_rotation(random_orthogonal(size, torch.Generator().manual_seed(size)), RotationOrder.RQ).float()
    first, count = torch.tensor([7]), 20
    numbers = torch.arange(rows) % size
    expected = greedy.take_steps(x.T.double(), first, numbers, step.double(), rule=SearchRule.CHANNEL, count=count)
    columns = x.to(DEVICE).T
    found = greedy_kernel.take_steps(columns, first.to(DEVICE), step.to(DEVICE), count)
    assert torch.equal(columns.cpu(), x.T)  # what it was given is as it was
    assert found[1].tolist() == expected[1].tolist()
    for ours, theirs in zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=0, atol=count * 2**-22 * x.abs().max().item())


def test_rows_of_zeros_have_no_outlier_and_stay():
    step = step_rotation(random_orthogonal(16, torch.Generator().manual_seed(0)), RotationOrder.RQ).float().to(DEVICE)
    columns, exchanges, low, high = greedy_kernel.take_steps(
        torch.zeros(16, 5, device=DEVICE), torch.tensor([2], device=DEVICE), step, 3
    )
    assert not columns.any()
    assert not low.any()
    assert not high.any()
    assert exchanges[0] == 2
    assert exchanges.max() < 16


@pytest.mark.parametrize("size", [16, 128])
def test_steps_pass_the_trial_that_admits_them(size, monkeypatch):
    assert greedy_kernel.trial(DEVICE, size)
    exact = greedy_kernel.take_steps
    monkeypatch.setattr(greedy_kernel, "take_steps", lambda columns, *given: exact(columns * (1 + 2**-12), *given))
    assert not greedy_kernel.trial(DEVICE, size)
