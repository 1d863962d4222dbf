"""Integer codes: METHOD §6, held against its own formula written in plain numbers, and the promises that follow."""

import pytest
import torch
from torch import Tensor

from duquant.formats import SCALE_LIMITS, ZERO_LIMITS, Codes, IntegerFormat, Parameters, straight_through_round
from duquant.packing import decode_weight, pack, packed_width, unpack
from duquant.quantizer import Quantizer

BITS = (2, 3, 4, 6, 8)


def spread(rows: int = 16, width: int = 24, seed: int = 0) -> Tensor:
    """Rows of very different magnitude and offset, each with zero inside its range; float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) + 0.3 * torch.randn(rows, 1, generator=generator)
    return x * torch.logspace(-2, 3, rows)[:, None]


def quantized(x: Tensor, bits: int, symmetric: bool = False) -> Codes:
    form = IntegerFormat(bits, symmetric)
    return form.encode(x, form.parameters(*torch.aminmax(x, dim=-1, keepdim=True)))


def decoded(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    return IntegerFormat(bits, symmetric).decode(quantized(x, bits, symmetric))


def by_hand(value: float, low: float, high: float, bits: int, symmetric: bool) -> float:
    """METHOD §6 in Python's own numbers."""
    if symmetric:
        half = 2 ** (bits - 1) - 1
        scale, zero = min(max(max(abs(low), abs(high)) / half, 1e-5), 1e4), half
    else:
        scale = min(max((high - low) / (2**bits - 1), 1e-5), 1e4)
        zero = round(min(max(-low / scale, -1e4), 1e4))
    code = min(max(round(value / scale) + zero, 0), 2**bits - 1)
    return (code - zero) * scale


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_values_are_those_of_the_formula(bits, symmetric):
    x = spread().double()
    found = decoded(x, bits, symmetric)
    for row, values in zip(x.tolist(), found.tolist(), strict=True):
        low, high = min(row), max(row)
        assert values == pytest.approx([by_hand(value, low, high, bits, symmetric) for value in row], rel=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_integers_from_zero_to_the_largest(bits, symmetric):
    values = quantized(spread(), bits, symmetric).values
    assert values.dtype == IntegerFormat(bits, symmetric).dtype == torch.uint8
    assert values.min() >= 0
    assert values.max() <= 2**bits - 1
    assert IntegerFormat(bits).largest == 2**bits - 1


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_codes_use_both_ends_of_their_range(bits):
    values = quantized(spread(), bits).values
    values = values.int()
    assert (values.amin(dim=1) <= 1).all()
    assert (values.amax(dim=1) >= 2**bits - 2).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_error_is_at_most_half_a_step_inside_the_range(bits, symmetric):
    x = spread()
    codes = quantized(x, bits, symmetric)
    error = (decoded(x, bits, symmetric) - x).abs()
    rounding = 4 * torch.finfo(x.dtype).eps * x.abs().amax(dim=1, keepdim=True)
    assert (error <= codes.scale / 2 + rounding).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_zero_is_represented_exactly(bits, symmetric):
    x = spread()
    x[:, 5] = 0
    assert not decoded(x, bits, symmetric)[:, 5].any()


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_quantization_commutes_with_the_sign(bits):
    x = spread()
    assert torch.equal(decoded(-x, bits, True), -decoded(x, bits, True))


@pytest.mark.parametrize("bits", BITS)
def test_the_symmetric_scale_comes_from_the_larger_end(bits):
    low, high = torch.tensor([[-3.0], [-1.0]]), torch.tensor([[1.0], [3.0]])
    scale, zero = IntegerFormat(bits, symmetric=True).parameters(low, high)
    half = 2 ** (bits - 1) - 1
    torch.testing.assert_close(scale, torch.full((2, 1), 3 / half))
    assert zero.tolist() == [[half], [half]]


@pytest.mark.parametrize("bits", BITS)
def test_the_full_range_uses_every_code_and_is_that_of_compressed_tensors(bits):
    x, form = spread(), IntegerFormat(bits, symmetric=True, full_range=True)
    codes = form.encode(x, form.parameters(*torch.aminmax(x, dim=-1, keepdim=True)))
    half = 2 ** (bits - 1)
    # its arithmetic: q = clamp(round(x / s), −2^(b−1), 2^(b−1) − 1) with s = max|x| / ((2^b − 1)/2), and x̂ = q s
    scale = x.abs().amax(dim=-1, keepdim=True) / ((2**bits - 1) / 2)
    expected = (x / scale).round().clamp(-half, half - 1)
    assert torch.equal(codes.values.float() - half, expected)
    assert torch.equal(form.decode(codes), expected * scale)
    assert codes.zero.unique().tolist() == [half]
    tiny = torch.tensor([[1e-12, -4e-12, 0.0]])
    assert (form.fake(tiny, form.parameters(*torch.aminmax(tiny, dim=-1, keepdim=True))) != 0).any()
    zeros = torch.zeros(3, 8)
    assert not form.fake(zeros, form.parameters(zeros[:, :1], zeros[:, :1])).any()


@pytest.mark.parametrize("bits", BITS)
def test_already_quantized_values_stay(bits):
    form, codes = IntegerFormat(bits, True), quantized(spread(), bits, True)
    again = form.encode(form.decode(codes), form.parameters(-codes.scale * codes.zero, codes.scale * codes.zero))
    torch.testing.assert_close(again.values, codes.values, atol=0, rtol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_zeros_stay_zero(symmetric):
    assert not decoded(torch.zeros(3, 8), 4, symmetric).any()
    assert (quantized(torch.zeros(3, 8), 4, symmetric).scale == SCALE_LIMITS[0]).all()


@pytest.mark.parametrize("value", [0.1, -0.1, 0.003, -2e-5])
def test_constant_rows_within_the_zero_point_s_limit_are_exact_to_half_a_step(value):
    # a row without spread has the smallest scale, and its zero point reaches ±1e4 steps: up to 0.1
    assert abs(value) <= SCALE_LIMITS[0] * ZERO_LIMITS[1]
    found = decoded(torch.full((1, 8), value), 4)
    torch.testing.assert_close(found, torch.full((1, 8), value), atol=0.51 * SCALE_LIMITS[0], rtol=0)


@pytest.mark.parametrize("value", [5.0, -5.0])
def test_constant_rows_beyond_the_zero_point_s_limit_follow_the_formula(value):
    found = decoded(torch.full((1, 8), value).double(), 4)
    assert found.tolist()[0] == pytest.approx([by_hand(value, value, value, 4, False)] * 8, rel=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("magnitude", "scale"), [(1e-9, 1e-5), (1e30, 1e4)])
def test_the_scale_of_extreme_values_is_clamped(symmetric, magnitude, scale):
    x = magnitude * torch.tensor([[-1.0, -0.5, 0.25, 1.0]], dtype=torch.float64)
    assert quantized(x, 4, symmetric).scale.item() == pytest.approx(scale)
    expected = [by_hand(value, -magnitude, magnitude, 4, symmetric) for value in x[0].tolist()]
    assert decoded(x, 4, symmetric)[0].tolist() == pytest.approx(expected, rel=1e-12)


every_width = pytest.mark.parametrize("bits", range(2, 16))
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])


@every_dtype
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@every_width
def test_decoded_codes_are_fake_quantization_to_the_bit(bits, symmetric, group_size, dtype):
    x = (spread() / 100).to(dtype)  # rows up to the largest that float16 holds
    quantizer = Quantizer(IntegerFormat(bits, symmetric), group_size=group_size)
    codes = quantizer.encode(x)
    assert codes.values.dtype == (torch.uint8 if bits <= 8 else torch.int16)
    assert codes.scale.dtype == codes.zero.dtype == torch.promote_types(dtype, torch.float32)
    assert 0 <= codes.values.min() <= codes.values.max() <= 2**bits - 1
    assert torch.equal(quantizer.format.decode(codes).view(x.shape).to(dtype), quantizer(x))
    assert torch.equal(decode_weight(pack(codes, quantizer.format), quantizer.format, dtype), quantizer(x))


@pytest.mark.parametrize("symmetric", [False, True])
@every_width
def test_columns_one_by_one_under_fixed_parameters_have_the_codes_of_the_whole(bits, symmetric):
    x, form = spread(), IntegerFormat(bits, symmetric)
    parameters = form.parameters(*torch.aminmax(x, dim=-1, keepdim=True))
    whole = form.encode(x, parameters)
    columns = [form.encode(x[:, [column]], parameters) for column in range(x.shape[1])]
    assert torch.equal(torch.cat([codes.values for codes in columns], dim=1), whole.values)
    assert torch.equal(torch.cat([form.decode(codes) for codes in columns], dim=1), form.decode(whole))


@every_width
def test_the_largest_code_of_every_width_fits_its_integers(bits):
    form = IntegerFormat(bits)
    one = Parameters(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    codes = form.encode(torch.tensor([-5.0, 0.0, form.largest, 2.0**20], dtype=torch.float64), one)
    assert codes.values.tolist() == [0, 0, form.largest, form.largest]


@pytest.mark.parametrize("group_size", [None, 8])
def test_codes_know_their_bytes_and_move_as_one(group_size):
    codes = Quantizer(IntegerFormat(4), group_size=group_size).encode(spread())
    assert codes.nbytes == 16 * 24 + 2 * 4 * 16 * (1 if group_size is None else 3)
    moved = codes.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.values, moved.scale, moved.zero)} == {"meta"}
    assert moved.values.shape == codes.values.shape


def test_straight_through_round_rounds_forward_and_passes_gradients():
    x = torch.tensor([-1.5, -0.4, 0.5, 1.5, 2.6], requires_grad=True)
    y = straight_through_round(x)
    assert y.tolist() == [-2.0, 0.0, 0.0, 2.0, 3.0]
    (y * torch.arange(5.0)).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_straight_through_round_without_gradients_is_plain_rounding():
    x = torch.tensor([0.5, 1.2])
    with torch.no_grad():
        assert straight_through_round(x.requires_grad_()).grad_fn is None
    assert straight_through_round(x.detach()).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_is_one_inside_the_range_and_zero_outside(symmetric):
    x = torch.tensor([[-9.0, -1.9, -0.3, 0.0, 0.7, 1.9, 9.0]], requires_grad=True)
    form = IntegerFormat(4, symmetric)
    form.fake(x, form.parameters(torch.tensor([[-2.0]]), torch.tensor([[2.0]]))).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 1, 1, 1, 1, 1, 0]]))


@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize("channels", [5, 20, 35])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 9])
def test_packed_codes_are_the_codes_again_in_as_few_bytes_as_fit_whole(bits, channels, group_size):
    form, generator = IntegerFormat(bits), torch.Generator().manual_seed(bits)
    values = torch.randint(0, form.largest + 1, (7, channels), generator=generator).to(form.dtype)
    values = values if group_size is None else values.unflatten(1, (-1, group_size))
    ones = torch.ones(7, 1) if group_size is None else torch.ones(7, channels // group_size, 1)
    packed = pack(Codes(values, ones, ones), form)
    assert packed.values.dtype == form.dtype
    assert packed.values.shape == (7, packed_width(channels, form))
    assert packed_width(channels, form) == -(-channels // {2: 4, 3: 2, 4: 2}.get(bits, 1))
    assert torch.equal(unpack(packed, form).values, values)


def test_the_first_code_is_in_the_lowest_bits():
    codes = Codes(torch.tensor([[1, 2, 15]], dtype=torch.uint8), torch.ones(1, 1), torch.ones(1, 1))
    assert pack(codes, IntegerFormat(4)).values.tolist() == [[1 + 2 * 16, 15]]
