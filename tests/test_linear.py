"""The linear that takes nn.Linear's place."""

import pytest
import torch
from torch import Tensor, nn

from duquant.formats import IntegerFormat
from duquant.linear import QuantLinear
from duquant.quantizer import Quantizer
from duquant.transform import DualTransform, search_dual_transform
from quantize.clipping import LearnedClip
from quantize.settings import RotationSettings
from quantize.smoothing import column_peak
from utils.batching import row_parts

INPUTS, OUTPUTS, BLOCK = 24, 10, 8
UNTOUCHED = nn.Identity()


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


def four_bits() -> Quantizer:
    return Quantizer(IntegerFormat(4))


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_sixteen_bits_compute_what_the_linear_does(bias, online):
    linear = make_linear(bias)
    transform = make_transform(torch.logspace(-1, 1, INPUTS) if online else None)
    found = QuantLinear(linear, transform, UNTOUCHED, UNTOUCHED)(activation())
    expected = linear(activation())
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_output_is_the_product_of_the_two_quantized_sides():
    linear, transform, x = make_linear(), make_transform(), activation()
    found = QuantLinear(linear, transform, four_bits(), four_bits())(x)
    expected = four_bits()(transform(x)) @ four_bits()(transform.transform_weight(linear.weight)).T + linear.bias
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - linear(x)).abs().max() > 1e-2, "four bits left no trace"


def test_bias_is_kept_and_never_created():
    linear = make_linear(True)
    assert torch.equal(QuantLinear(linear, make_transform(), four_bits(), UNTOUCHED).bias, linear.bias)
    without = QuantLinear(make_linear(False), make_transform(), four_bits(), UNTOUCHED)
    without.bake_(torch.float32)
    assert without.bias is None
    assert "bias" not in without.state_dict()


@pytest.mark.parametrize("weight_quantizer", [UNTOUCHED, four_bits()], ids=["16 bits", "4 bits"])
def test_baking_keeps_the_output(weight_quantizer):
    quantized = QuantLinear(make_linear(), make_transform(), weight_quantizer, four_bits())
    before = quantized(activation())
    quantized.bake_(torch.float32)
    assert torch.equal(quantized(activation()), before)
    assert quantized.weight_quantizer is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_baking_narrows_weight_and_bias(dtype):
    quantized = QuantLinear(make_linear(), make_transform(), four_bits(), four_bits())
    assert quantized.weight.dtype == quantized.bias.dtype == torch.float32
    before = quantized(activation(dtype))
    quantized.bake_(dtype)
    assert quantized.weight.dtype == quantized.bias.dtype == dtype
    assert torch.equal(quantized(activation(dtype)), before)


def test_a_baked_weight_takes_no_more_values_than_its_bits_allow():
    quantized = QuantLinear(make_linear(), make_transform(), Quantizer(IntegerFormat(2)), UNTOUCHED)
    quantized.bake_(torch.float32)
    assert max(len(row.unique()) for row in quantized.weight) <= 4


def test_baking_twice_changes_nothing():
    quantized = QuantLinear(make_linear(), make_transform(), four_bits(), four_bits())
    quantized.bake_(torch.float32)
    weight = quantized.weight.clone()
    quantized.bake_(torch.float32)
    assert torch.equal(quantized.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_a_half_precision_linear_are_kept_in_float32_until_baking(dtype):
    linear = make_linear(dtype=dtype)
    quantized = QuantLinear(linear, make_transform(), four_bits(), four_bits())
    assert quantized.weight.dtype == torch.float32
    torch.testing.assert_close(quantized.weight, make_transform()(linear.weight.float()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_gives_half_precision_output(dtype):
    linear = make_linear(dtype=dtype)
    quantized = QuantLinear(linear, make_transform(), UNTOUCHED, UNTOUCHED)
    quantized.bake_(dtype)
    found = quantized(activation(dtype))
    assert found.dtype == dtype
    expected = linear.float()(activation(dtype).float())
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_linears_of_a_group_share_one_transform():
    transform = make_transform()
    group = nn.ModuleList(QuantLinear(make_linear(), transform, four_bits(), four_bits()) for _ in range(3))
    assert all(linear.transform is transform for linear in group)
    pointers = {name: value.data_ptr() for name, value in group.state_dict().items() if "rotations" in name}
    assert len(pointers) == 3
    assert len(set(pointers.values())) == 1


def test_input_and_the_linear_it_was_made_of_are_left_alone():
    linear, x = make_linear(), activation()
    weight, bias, before = linear.weight.clone(), linear.bias.clone(), x.clone()
    quantized = QuantLinear(linear, make_transform(torch.logspace(-1, 1, INPUTS)), four_bits(), four_bits())
    quantized(x)
    quantized.bake_(torch.float16)
    assert torch.equal(x, before)
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.bias, bias)


def test_an_identity_transform_does_not_tie_the_weight_to_the_linear_it_was_made_of():
    linear = make_linear()
    before = linear.weight.clone()
    identity = DualTransform(torch.empty(0, 1, 1), torch.empty(0, INPUTS, dtype=torch.int64))
    quantized = QuantLinear(linear, identity, four_bits(), four_bits())
    quantized.bake_(torch.float32)
    assert torch.equal(linear.weight, before)
    assert not torch.equal(quantized.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group_size", [None, 8])
def test_a_weight_worked_on_in_parts_has_the_same_bits(dtype, group_size, monkeypatch):
    linear, scale = make_linear(dtype=dtype), torch.rand(INPUTS, generator=generator(3)) + 0.5

    def baked(clip: bool) -> tuple[Tensor, ...]:
        ranges = LearnedClip((OUTPUTS, 1) if group_size is None else (OUTPUTS, INPUTS // group_size, 1))
        ranges.high_logit.data.uniform_(0, 4, generator=generator(4))
        quantizer = Quantizer(IntegerFormat(4), ranges if clip else None, group_size)
        quantized = QuantLinear(linear, make_transform(scale), quantizer, UNTOUCHED)
        transformed = quantized.weight.clone()
        quantized.bake_(dtype)
        assert torch.equal(quantized.weight, quantizer(transformed).to(dtype))
        return transformed, quantized.weight, column_peak([linear.weight, transformed.to(dtype)])

    whole = baked(False) + baked(True)
    monkeypatch.setattr("utils.batching.PART_ELEMENTS", 3 * INPUTS + 5)
    parts = baked(False) + baked(True)
    assert len(row_parts(linear.weight)) == 4
    assert all(torch.equal(first, second) for first, second in zip(whole, parts, strict=True))


def test_learned_clipping_trains_through_the_linear():
    clip = LearnedClip((OUTPUTS, 1))
    quantized = QuantLinear(make_linear(), make_transform(), Quantizer(IntegerFormat(3), clip), four_bits())
    (quantized(activation()) - make_linear()(activation())).square().mean().backward()
    assert clip.high_logit.grad.abs().min() > 0
    assert clip.low_logit.grad.abs().min() > 0
    assert quantized.weight.grad is None
