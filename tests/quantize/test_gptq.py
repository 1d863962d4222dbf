"""GPTQ: what it gains, what it equals, and Hessians that cannot be factorised."""

import logging

import pytest
import torch
from torch import Tensor

from duquant.formats import IntegerFormat, Parameters
from quantize.gptq import BLOCK, gptq, gptq_codes, inverse_factor

DAMPING, NAME = 0.01, "model.layers.3.qkv"
every_form = pytest.mark.parametrize("form", [IntegerFormat(4), IntegerFormat(3, symmetric=True)], ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_weight(rows: int = 12, channels: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, generator=generator(seed))


def correlated(channels: int = 24, rows: int = 400, rank: int = 6) -> Tensor:
    """Inputs that lie near a few directions: what GPTQ lives on."""
    mixing = torch.randn(rank, channels, generator=generator(1), dtype=torch.float64)
    x = torch.randn(rows, rank, generator=generator(2), dtype=torch.float64) @ mixing
    return x + 0.1 * torch.randn(rows, channels, generator=generator(3), dtype=torch.float64)


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def whole_ranges(weight: Tensor, form: IntegerFormat) -> Parameters:
    return form.parameters(*torch.aminmax(weight, dim=-1, keepdim=True))


def loss(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return ((rounded - weight).double() @ x.T).square().sum().item()


def decoded(codes, form: IntegerFormat) -> Tensor:
    return form.decode(codes).flatten(1)


@every_form
@pytest.mark.parametrize("group_size", [None, 8])
def test_inputs_that_are_not_correlated_leave_nearest_rounding(form, group_size):
    weight = make_weight()
    vectors = weight if group_size is None else weight.unflatten(1, (-1, group_size))
    parameters = whole_ranges(vectors, form)
    diagonal = torch.rand(24, generator=generator(5), dtype=torch.float64) + 0.5
    found = gptq_codes(weight, diagonal.diag(), parameters, form, DAMPING, NAME)
    expected = form.encode(vectors, parameters)
    assert torch.equal(found.values, expected.values)
    assert found.values.dtype == torch.uint8
    assert torch.equal(decoded(found, form), decoded(expected, form))


@every_form
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("channels", [24, BLOCK + 40])
def test_correlated_inputs_have_a_much_smaller_error_of_the_output(channels, group_size, form):
    weight, x = make_weight(channels=channels), correlated(channels)
    vectors = weight if group_size is None else weight.unflatten(1, (-1, group_size))
    parameters = whole_ranges(vectors, form)
    found = gptq_codes(weight, moment(x), parameters, form, DAMPING, NAME)
    nearest = form.encode(vectors, parameters)
    assert found.values.shape == vectors.shape
    assert found.values.max() <= form.largest
    assert loss(weight, decoded(found, form), x) < 0.3 * loss(weight, decoded(nearest, form), x)


def dense_reference(weight: Tensor, hessian: Tensor, parameters: Parameters, form: IntegerFormat) -> Tensor:
    """Optimal brain surgeon, a column at a time: the inverse of what is left is made anew behind every column."""
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    left, codes = weight.double().clone(), torch.empty(weight.shape, dtype=form.dtype)
    remaining = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    scale, zero = (each.double().expand_as(left) for each in parameters)
    while remaining:
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])
        column = remaining[0]
        own = Parameters(scale[:, column], zero[:, column])
        rounded = form.encode(left[:, column], own)
        codes[:, column] = rounded.values
        error = (left[:, column] - form.decode(rounded)) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0][None]
        remaining = remaining[1:]
    return codes


@every_form
@pytest.mark.parametrize("channels", [10, BLOCK + 9])
def test_codes_are_those_of_a_dense_reference(channels, form):
    weight, hessian = make_weight(6, channels).double(), moment(correlated(channels))
    parameters = whole_ranges(weight, form)
    found = gptq(weight, hessian, parameters, form, DAMPING, NAME)
    assert torch.equal(found, dense_reference(weight, hessian, parameters, form))
    assert not torch.equal(found, form.encode(weight, parameters).values)


def test_the_weight_and_the_hessian_are_left_alone():
    weight, hessian, form = make_weight(), moment(correlated()), IntegerFormat(4)
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, whole_ranges(weight, form), form, DAMPING, NAME)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_the_factor_inverts_the_damped_hessian(scale, caplog):
    hessian = scale * moment(correlated())
    upper, mean = inverse_factor(hessian, DAMPING, NAME), hessian.diagonal().mean()
    identity = torch.eye(len(hessian), dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper @ (hessian / mean + DAMPING * identity), identity, atol=1e-8, rtol=0)
    assert torch.equal(upper, upper.triu())
    assert caplog.messages == []


def indefinite() -> Tensor:
    hessian = torch.ones(24, 24, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 3.0
    return hessian


def dead() -> Tensor:
    hessian = moment(correlated())
    hessian[5], hessian[:, 5] = 0.0, 0.0
    return hessian


STRANGE = {
    "singular": (lambda: moment(correlated()[:3]), False),
    "dead channel": (dead, False),
    "zero": (lambda: torch.zeros(24, 24, dtype=torch.float64), False),
    "indefinite": (indefinite, True),
    "not a number": (lambda: torch.full((24, 24), torch.inf, dtype=torch.float64), True),
}


@pytest.mark.parametrize("name", STRANGE)
def test_any_hessian_gives_codes_in_range_and_a_warning_where_it_needs_more_damping(name, caplog):
    make, warns = STRANGE[name]
    weight, form = make_weight(), IntegerFormat(4)
    with caplog.at_level(logging.WARNING, logger="quantize.gptq"):
        upper = inverse_factor(make(), DAMPING, NAME)
        codes = gptq_codes(weight, make(), whole_ranges(weight, form), form, DAMPING, NAME)
    assert upper.isfinite().all()
    assert codes.values.max() <= 15
    assert len(codes.values.unique()) > 10
    assert all(message.startswith(f"{NAME}: its Hessian") for message in caplog.messages)
    assert bool(caplog.messages) == warns


def test_the_warning_tells_the_damping_that_was_needed(caplog):
    inverse_factor(indefinite(), DAMPING, NAME)
    assert caplog.messages == [f"{NAME}: its Hessian is not positive definite; damping 10 instead of 0.01"]


def test_more_damping_draws_the_codes_to_the_nearest():
    weight, hessian, form = make_weight(), moment(correlated()), IntegerFormat(4)
    parameters = whole_ranges(weight, form)
    nearest = form.encode(weight, parameters).values
    different = [
        (gptq(weight, hessian, parameters, form, damping, NAME) != nearest).sum() for damping in (0.001, 0.1, 1e5)
    ]
    assert different[0] > different[1] > different[2] == 0
