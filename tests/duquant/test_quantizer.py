"""Quantizers: one range per vector or group, of the tensor at hand, in whatever dtype."""

import pytest
import torch
from torch import Tensor, nn

from duquant.formats import IntegerFormat
from duquant.quantizer import NoClip, Quantizer, RatioClip, fixed_clip, make_quantizer
from duquant.scheme import TensorScheme

LOW, HIGH = torch.tensor([[-2.0], [0.5], [0.0]]), torch.tensor([[1.0], [3.0], [0.0]])


def activation(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def four_bits(**settings) -> Quantizer:
    return Quantizer(IntegerFormat(4), **settings)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24), (2, 3, 5, 8)])
def test_every_vector_along_the_last_axis_has_its_own_range(shape):
    x, quantizer = activation(*shape), four_bits()
    expected = torch.stack([quantizer(vector) for vector in x.reshape(-1, shape[-1])]).view(shape)
    assert torch.equal(quantizer(x), expected)


def test_a_token_does_not_depend_on_other_tokens():
    x, quantizer = activation(2, 6, 16), four_bits()
    changed = x.clone()
    changed[1, 3] *= 1000
    same = torch.ones(2, 6, dtype=torch.bool)
    same[1, 3] = False
    assert torch.equal(quantizer(changed)[same], quantizer(x)[same])
    assert not torch.equal(quantizer(changed)[1, 3], quantizer(x)[1, 3])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [1, 4, 12, 24])
def test_groups_are_quantized_like_tensors_of_their_own(group_size, symmetric):
    weight, number_format = activation(7, 24), IntegerFormat(3, symmetric)
    found = Quantizer(number_format, group_size=group_size)(weight)
    chunks = [Quantizer(number_format)(chunk) for chunk in weight.split(group_size, dim=-1)]
    assert torch.equal(found, torch.cat(chunks, dim=-1))


@pytest.mark.parametrize("group_size", [None, 4])
def test_fake_quantization_is_dequantized_codes(group_size):
    x, quantizer = activation(3, 8), four_bits(group_size=group_size)
    codes = quantizer.encode(x)
    assert codes.values.shape == ((3, 8) if group_size is None else (3, 2, 4))
    assert codes.scale.shape == codes.zero.shape == (*codes.values.shape[:-1], 1)
    assert torch.equal(quantizer(x), quantizer.format.decode(codes).view(3, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_shape_are_kept(dtype):
    x = activation(2, 3, 8).to(dtype)
    found = four_bits()(x)
    assert (found.dtype, found.shape) == (dtype, x.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantized_in_float32_and_rounded_once(dtype):
    x = (40 * activation(16, 64)).to(dtype)
    assert torch.equal(four_bits()(x), four_bits()(x.float()).to(dtype))


def test_float16_ranges_wider_than_float16_do_not_overflow():
    x = torch.tensor([[-60000.0, 0.0, 60000.0]], dtype=torch.float16)
    torch.testing.assert_close(four_bits()(x), x, atol=4000.0, rtol=0)


def test_float64_keeps_its_precision():
    x = activation(4, 16).double()
    codes = four_bits().encode(x)
    low, high = x.aminmax(dim=-1, keepdim=True)
    torch.testing.assert_close(codes.scale, (high - low) / 15, atol=0, rtol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [None, 4])
def test_the_input_is_never_modified(dtype, group_size):
    x = activation(5, 8).to(dtype)
    before = x.clone()
    four_bits(clip=RatioClip(0.5), group_size=group_size)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(1, 2),
        lambda x: x[..., 4:12],
        lambda x: x[..., ::2],
        lambda x: x[:1].expand(3, -1, -1),
    ],
    ids=["swapped", "transposed", "slice", "stride", "expanded"],
)
def test_views_are_quantized_like_their_copies(view, group_size):
    x = view(activation(16, 16, 16))
    quantizer = four_bits(group_size=group_size)
    assert torch.equal(quantizer(x), quantizer(x.contiguous()))


def test_clipping_narrows_the_range_before_the_scale():
    x = activation(6, 32)
    clipped, plain = four_bits(clip=RatioClip(0.5)).encode(x), four_bits().encode(x)
    torch.testing.assert_close(clipped.scale, plain.scale / 2, atol=0, rtol=1e-6)
    assert four_bits(clip=RatioClip(0.5))(x).abs().max() < 0.6 * x.abs().max()


@pytest.mark.parametrize("bits", [2, 4, 8, 15])
def test_fewer_than_sixteen_bits_make_a_quantizer(bits):
    clip = NoClip()
    made = make_quantizer(TensorScheme(bits=bits, symmetric=True, group_size=8), clip)
    assert made.format == IntegerFormat(bits, symmetric=True)
    assert made.clip is clip
    assert made.group_size == 8


def test_sixteen_bits_leave_a_tensor_untouched():
    made, x = make_quantizer(TensorScheme(bits=16, group_size=4), RatioClip(0.5)), activation(3, 8).half()
    assert isinstance(made, nn.Identity)
    assert made(x) is x


def test_no_clip_changes_nothing():
    low, high = NoClip()(LOW, HIGH)
    assert torch.equal(low, LOW)
    assert torch.equal(high, HIGH)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_a_ratio_multiplies_both_ends(ratio):
    low, high = RatioClip(ratio)(LOW, HIGH)
    assert torch.equal(low, ratio * LOW)
    assert torch.equal(high, ratio * HIGH)


def test_a_missing_ratio_means_no_clipping():
    assert isinstance(fixed_clip(None), NoClip)
    assert fixed_clip(0.9).ratio == 0.9
