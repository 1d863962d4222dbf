"""What the kernel of GPTQ is held to: a block of columns as torch rounds it on a CPU; see `triton_cases.py`."""

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, random

from duquant.formats import Format, IntegerFormat, MxFp4, Parameters
from quantize import gptq_kernel
from quantize.gptq import gptq_codes, inverse_factor, round_columns

FORMS = [IntegerFormat(4), IntegerFormat(3, symmetric=True), IntegerFormat(2, symmetric=True, full_range=True)]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)


def hessian(channels: int) -> Tensor:
    x = random(8 * channels, channels // 2, seed=3) @ random(channels // 2, channels, seed=4)
    x = (x + random(8 * channels, channels, seed=5)).double()
    return x.T @ x / len(x)


def ranges(vectors: Tensor, form: Format) -> Parameters:
    return form.parameters(*torch.aminmax(vectors, dim=-1, keepdim=True))


def there(parameters: Parameters) -> Parameters:
    return Parameters(*(each.to(DEVICE) for each in parameters))


def assert_alike(ours: Tensor, theirs: Tensor) -> None:
    """All rows but one in thirty: behind a weight on a tie a row is another."""
    alike = torch.isclose(ours.cpu(), theirs, rtol=0, atol=2**-16).all(dim=1)
    assert alike.sum() >= len(alike) - len(alike) // 30


@every_form
@pytest.mark.parametrize("own", [False, True], ids=["a range for each row", "a range for each weight"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (37, 40), (37, 3)])
def test_a_block_is_rounded_as_torch_rounds_it(rows, columns, own, form):
    weight, upper = random(rows, columns), inverse_factor(hessian(72), 0.01, "").float()[8:, 8:][:columns, :columns]
    parameters = Parameters(*(each.expand_as(weight) for each in ranges(weight, form)))
    if own:
        factors = 1 + random(rows, columns, seed=1).abs()
        parameters = Parameters(parameters.scale * factors, parameters.zero.contiguous())
    padded = {"weight": torch.zeros(rows, 100, device=DEVICE), "upper": torch.zeros(columns, 100, device=DEVICE)}
    given = {name: whole[:, 7 : 7 + columns] for name, whole in padded.items()}
    given["weight"].copy_(weight)
    given["upper"].copy_(upper)
    placed = there(parameters if own else Parameters(*(each[:, :1] for each in parameters)))
    placed = [each.expand_as(weight) for each in placed]
    found = gptq_kernel.round_columns(given["weight"], *placed, given["upper"], form)
    assert torch.equal(given["weight"].cpu(), weight)  # what it was given is as it was
    for ours, theirs in zip(found, round_columns(weight, *parameters, upper, form), strict=True):
        assert_alike(ours, theirs)


@every_form
@pytest.mark.parametrize("group_size", [None, 16])
def test_a_whole_weight_has_the_codes_that_torch_finds(form, group_size, monkeypatch):
    weight, moment = random(40, 80), hessian(80)
    vectors = weight if group_size is None else weight.unflatten(1, (-1, group_size))
    parameters = ranges(vectors, form)
    expected = gptq_codes(weight, moment, parameters, form, 0.01, "").values
    calls = []
    monkeypatch.setattr(gptq_kernel, "serves", lambda weight, form: calls.append(weight.shape) or True)
    found = gptq_codes(weight.to(DEVICE), moment.to(DEVICE), there(parameters), form, 0.01, "").values
    assert calls == [(40, 64), (40, 16)]
    assert_alike(found.flatten(1).float(), expected.flatten(1).float())


@every_form
def test_a_block_passes_the_trial_that_admits_it(form, monkeypatch):
    assert gptq_kernel.trial(DEVICE, form)
    exact = gptq_kernel.round_columns
    monkeypatch.setattr(gptq_kernel, "round_columns", lambda *given: exact(*given[:3], given[3].T, given[4]))
    assert not gptq_kernel.trial(DEVICE, form)


def test_what_it_does_not_serve_is_left_to_torch():
    weight = torch.ones(4, 32)
    assert not gptq_kernel.serves(weight, IntegerFormat(4))  # where there is no GPU nothing is launched on one
    assert not gptq_kernel.serves(weight.to(DEVICE).double(), IntegerFormat(4))
    assert not gptq_kernel.serves(weight.to(DEVICE), MxFp4())
