"""Steps that leave out what is not finite, and keeping the best values at rest."""

import math

import pytest
import torch
from torch import Tensor, nn

from quantize.descent import Descent, copies, keep_best_

CPU = torch.device("cpu")


def descent_of(values: list[float], **how) -> Descent:
    parameter = nn.Parameter(torch.tensor(values))
    return Descent(torch.optim.SGD([parameter], lr=0.5), CPU, **{"scaled": False, **how})


def quadratic(descent: Descent, factor: float = 1.0):
    """What `step` is given for the loss Σ p²/2, whose gradient is p."""

    def backward(scale: Tensor) -> Tensor:
        loss = factor * descent.parameters[0].square().sum() / 2
        (loss * scale).backward()
        return loss.detach()

    return backward


def test_a_step_tells_the_loss_and_gradient_that_it_starts_from():
    descent = descent_of([3.0, -4.0])
    assert descent.step(quadratic(descent)) == (12.5, 5.0)
    assert descent.parameters[0].tolist() == [1.5, -2.0]
    assert descent.step(quadratic(descent)) == (3.125, 2.5)


def test_rates_fall_along_a_cosine_to_nothing():
    descent, moved = descent_of([1.0], steps=4), []
    for _ in range(5):
        before = descent.parameters[0].item()
        descent.step(quadratic(descent))
        moved.append((before - descent.parameters[0].item()) / before)
    expected = [0.5 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    assert moved == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_step_that_is_not_finite_is_not_made(factor):
    descent = descent_of([3.0, -4.0])
    found = descent.step(quadratic(descent, factor))
    assert not all(map(math.isfinite, found))
    assert descent.parameters[0].tolist() == [3.0, -4.0]
    assert descent.step(quadratic(descent)) == (12.5, 5.0)


def test_a_scaled_gradient_is_that_of_the_loss_and_the_scale_falls_where_it_overflows():
    descent = descent_of([3.0, -4.0], scaled=True)
    assert descent.step(quadratic(descent)) == (12.5, 5.0)
    scale = descent.scaler.get_scale()
    assert scale > 1
    descent.step(quadratic(descent, math.inf))
    assert descent.scaler.get_scale() < scale


@pytest.mark.parametrize(
    ("losses", "kept", "least"),
    [((2.0, 3.0), 0, 1.0), ((0.5, 0.7), 1, 0.5), ((1.0, 0.5), 2, 0.5), ((1.0, 1.0), 2, 1.0), ((math.nan, 2.0), 0, 1.0)],
)
def test_the_values_with_the_least_loss_are_kept(losses, kept, least):
    parameters, values = [nn.Parameter(torch.zeros(2))], [[torch.full((2,), float(index))] for index in range(3)]
    found = iter(losses)
    start = (values[0], 1.0)
    assert keep_best_(parameters, start, values[1:], lambda: next(found)) == least
    assert parameters[0].tolist() == [kept, kept]
    assert torch.equal(copies(parameters)[0], parameters[0])
