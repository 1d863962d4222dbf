"""The linear whose weight is rounded anew in every call, and what it becomes."""

import pytest
import torch
from torch import Tensor, nn

from duquant.formats import IntegerFormat
from duquant.linear import GroupInput, QuantLinear
from duquant.quantizer import Quantizer, make_quantizer
from duquant.scheme import TensorScheme
from duquant.tensors import row_parts
from duquant.transform import DualTransform
from quantize.rotation_settings import RotationSettings
from quantize.rounding import OpenLinear
from quantize.smoothing import column_peak
from quantize.transforms import search_dual_transform

INPUTS, OUTPUTS, BLOCK = 24, 10, 8
FOUR, UNTOUCHED = TensorScheme(bits=4), TensorScheme(bits=16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activation(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 7, INPUTS, generator=generator())
    x[..., 4] *= 20
    return x.to(dtype)


def make_linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(INPUTS, OUTPUTS, bias=bias).to(dtype).requires_grad_(False)


def make_transform(scale: Tensor | None = None) -> DualTransform:
    found = search_dual_transform(activation(), BLOCK, RotationSettings(block_size=BLOCK, steps=20), generator(2))
    return DualTransform(found.rotations, found.permutations, scale)


def opened(
    linear: nn.Linear,
    transform: DualTransform | None = None,
    weight: TensorScheme = FOUR,
    input: TensorScheme = FOUR,
    learned: bool = False,
) -> OpenLinear:
    """The linear as a layer has it while its weight is not rounded for good."""
    transform = transform or make_transform()
    group = GroupInput(transform, make_quantizer(input))
    return OpenLinear(transform.transform_weight(linear.weight), linear.bias, weight, group, learned)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_sixteen_bits_compute_what_the_linear_does(bias, online):
    linear = make_linear(bias)
    transform = make_transform(torch.logspace(-1, 1, INPUTS) if online else None)
    found = opened(linear, transform, UNTOUCHED, UNTOUCHED)(activation())
    expected = linear(activation())
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_output_is_the_product_of_the_two_quantized_sides():
    linear, transform, x, four_bits = make_linear(), make_transform(), activation(), Quantizer(IntegerFormat(4))
    found = opened(linear, transform)(x)
    expected = four_bits(transform(x)) @ four_bits(transform.transform_weight(linear.weight)).T + linear.bias
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - linear(x)).abs().max() > 1e-2, "four bits left no trace"


def test_bias_is_kept_and_never_created():
    linear = make_linear(True)
    assert torch.equal(opened(linear).bias, linear.bias)
    without = opened(make_linear(False)).rounded(torch.float32)
    assert without.bias is None
    assert "bias" not in without.state_dict()


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8, 12, 15, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_for_good_keeps_the_output_to_the_bit(dtype, bits, symmetric, group_size):
    scheme = TensorScheme("int", bits, symmetric, group_size, clip=0.9)
    linear = opened(make_linear(dtype=dtype), weight=scheme)
    before = linear(activation(dtype))
    found = linear.rounded(dtype)
    assert isinstance(found, QuantLinear)
    assert torch.equal(found(activation(dtype)), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_not_rounded_is_narrowed(dtype):
    four, sixteen = opened(make_linear()), opened(make_linear(), weight=UNTOUCHED)
    assert four.weight.dtype == four.bias.dtype == torch.float32
    assert four.rounded(dtype).bias.dtype == dtype
    assert four.rounded(dtype).scale.dtype == torch.float32, "scales keep their precision"
    assert sixteen.rounded(dtype).weight.dtype == sixteen.rounded(dtype).bias.dtype == dtype


@pytest.mark.parametrize("learned", [False, True])
def test_one_group_of_all_channels_is_what_no_groups_are(learned):
    schemes = (TensorScheme(group_size=INPUTS), TensorScheme())
    found, expected = (
        opened(make_linear(), weight=scheme, learned=learned).rounded(torch.float32) for scheme in schemes
    )
    assert torch.equal(found(activation()), expected(activation()))


def test_a_rounded_weight_takes_no_more_values_than_its_bits_allow():
    rounded = opened(make_linear(), weight=TensorScheme(bits=2)).rounded(torch.float32)
    assert max(len(row.unique()) for row in rounded.weight) <= 4


def test_rounding_twice_gives_the_same_codes():
    linear = opened(make_linear())
    first, second = linear.rounded(torch.float32), linear.rounded(torch.float32)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_a_half_precision_linear_are_kept_in_float32_until_they_are_rounded(dtype):
    linear = make_linear(dtype=dtype)
    found = opened(linear).weight
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, make_transform()(linear.weight.float()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_gives_half_precision_output(dtype):
    linear = make_linear(dtype=dtype)
    found = opened(linear, None, UNTOUCHED, UNTOUCHED).rounded(dtype)(activation(dtype))
    assert found.dtype == dtype
    expected = linear.float()(activation(dtype).float())
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_input_and_the_linear_it_was_made_of_are_left_alone():
    linear, x = make_linear(), activation()
    weight, bias, before = linear.weight.clone(), linear.bias.clone(), x.clone()
    quantized = opened(linear, make_transform(torch.logspace(-1, 1, INPUTS)))
    quantized(x)
    quantized.rounded(torch.float16)(x)
    assert torch.equal(x, before)
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.bias, bias)


def test_an_identity_transform_leaves_the_linear_it_was_made_of_alone():
    linear = make_linear()
    before = linear.weight.clone()
    identity = DualTransform(torch.empty(0, 1, 1), torch.empty(0, INPUTS, dtype=torch.int64))
    rounded = opened(linear, identity).rounded(torch.float32)
    assert torch.equal(linear.weight, before)
    assert not torch.equal(rounded.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group_size", [None, 8])
def test_a_weight_worked_on_in_parts_has_the_same_bits(dtype, group_size, monkeypatch):
    linear, scale = make_linear(dtype=dtype), torch.rand(INPUTS, generator=generator(3)) + 0.5

    def rounded(learned: bool) -> tuple[Tensor, ...]:
        quantized = opened(linear, make_transform(scale), TensorScheme(group_size=group_size), learned=learned)
        if learned:
            quantized.clip.high_logit.data.uniform_(0, 4, generator=generator(4))
        found = quantized.rounded(dtype).decoded(dtype)
        assert torch.equal(found, quantized.quantizer(quantized.weight).to(dtype))
        return quantized.weight, found, column_peak([linear.weight, quantized.weight.to(dtype)])

    whole = rounded(False) + rounded(True)
    monkeypatch.setattr("duquant.tensors.PART_ELEMENTS", 3 * INPUTS + 5)
    parts = rounded(False) + rounded(True)
    assert len(row_parts(linear.weight)) == 4
    assert all(torch.equal(first, second) for first, second in zip(whole, parts, strict=True))


def test_learned_clipping_trains_through_the_linear():
    quantized = opened(make_linear(), weight=TensorScheme(bits=3), learned=True)
    (quantized(activation()) - make_linear()(activation())).square().mean().backward()
    assert quantized.clip.high_logit.grad.abs().min() > 0
    assert quantized.clip.low_logit.grad.abs().min() > 0
    assert quantized.weight.grad is None


@pytest.mark.parametrize("learned", [False, True])
def test_what_is_rounded_for_good_has_nothing_left_to_train(learned):
    quantized = opened(make_linear(), learned=learned)
    assert (quantized.clip is not None) == learned
    assert not any(parameter.requires_grad for parameter in quantized.rounded(torch.float32).parameters())
