"""Integer products: the reference against decoded floats, the CPU's kernel against the reference."""

import logging
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from duquant import ops
from duquant.formats import Codes, IntegerFormat
from duquant.ops import reference
from duquant.ops.base import RowCodes, encode
from duquant.ops.cpu import ByteKernel, high_bytes, in_parts, signed_bytes
from duquant.packing import PackedCodes, code_sums, decode_weight, pack, unpack
from duquant.quantizer import Quantizer, RatioClip
from duquant.transform import DualTransform

needs_bytes = pytest.mark.skipif(not ByteKernel.available(), reason="this CPU does not multiply bytes (VNNI)")
FORMS = [IntegerFormat(bits, symmetric) for bits, symmetric in product(range(2, 9), (False, True))]
SHAPES = [(7, 64, 48), (1, 96, 8), (19, 50, 33), (2, 1, 1)]  # rows, channels, outputs


def some_rows(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Rows of all kinds: ordinary, all zeros, of one sign (the zero point lies outside of the codes), one outlier."""
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))
    x[1::5] = 0
    x[2::5] = x[2::5].abs() + 1
    x[3::5] = -x[3::5].abs() - 1
    x[4::5, 0] = 100
    return x


def some_weight(outputs: int, channels: int, form: IntegerFormat) -> PackedCodes:
    """A weight like that."""
    return pack(Quantizer(form).encode(some_rows(outputs, channels, seed=1)), form)


def coded(x: Tensor, form: IntegerFormat) -> RowCodes:
    return encode(x, nn.Identity(), None, Quantizer(form))


def largest_term(x: RowCodes, weight: PackedCodes, form: IntegerFormat) -> Tensor:
    """For every output, the sum of the sizes of what is added and subtracted on the way to it, in float64."""
    half = 2 ** (form.bits - 1)
    a, b = x.values.double(), unpack(weight, form).values.double() - half
    z_x, z_w = x.zero.double().abs() + 128, (weight.zero.double() - half).abs()
    terms = a.abs() @ b.abs().T + z_x * b.sum(dim=1).abs() + (x.sums.double() - a.shape[1] * x.zero).abs() * z_w.T
    return x.scale * weight.scale.T * (terms + 1)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_product_of_what_codes_stand_for(form, shape):
    rows, channels, outputs = shape
    x, weight = coded(some_rows(rows, channels), form), some_weight(outputs, channels, form)
    doubled = PackedCodes(weight.values, weight.scale.double(), weight.zero.double(), channels)
    floats = form.decode(Codes(x.values, x.scale.double(), x.zero.double()))
    expected = floats @ decode_weight(doubled, form, torch.float64).T
    torch.testing.assert_close(reference.linear(x.codes, weight, form), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("of_inputs", "of_weights"), [(16, 16), (None, 16), (16, None), (32, 16), (8, 32)])
def test_the_reference_takes_groups_of_channels(of_inputs, of_weights):
    form, x = IntegerFormat(4), some_rows(9, 64)
    codes = Quantizer(form, group_size=of_inputs).encode(x)
    weight = pack(Quantizer(form, group_size=of_weights).encode(some_rows(11, 64, seed=1)), form)
    expected = form.decode(codes).flatten(1).double() @ decode_weight(weight, form, torch.float32).double().T
    torch.testing.assert_close(reference.linear(codes, weight, form), expected, rtol=1e-5, atol=1e-4)


@needs_bytes
@pytest.mark.parametrize("keep", [False, True], ids=["per call", "kept"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_the_reference_within_the_rounding_of_its_terms(form, shape, keep):
    rows, channels, outputs = shape
    x, weight = coded(some_rows(rows, channels), form), some_weight(outputs, channels, form)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(2))
    kernel = ByteKernel()
    prepared = kernel.prepare(weight, code_sums(weight, form), form, keep)
    off = (kernel.linear(x, prepared, bias, torch.float32) - reference.linear(x.codes, weight, form, bias)).abs()
    assert (off <= 6 * 2**-24 * (largest_term(x, weight, form) + bias.abs())).all()


@needs_bytes
@pytest.mark.parametrize("form", [IntegerFormat(8), IntegerFormat(4)], ids=str)
def test_inputs_and_weights_may_have_other_formats(form):
    x, other = coded(some_rows(9, 40), form), IntegerFormat(12 - form.bits)
    weight, kernel = some_weight(21, 40, other), ByteKernel()
    for keep in (False, True):
        y = kernel.linear(x, kernel.prepare(weight, code_sums(weight, other), other, keep), None, torch.float32)
        exact = reference.linear(x.codes, weight, other)
        assert ((y - exact).abs() <= 6 * 2**-24 * largest_term(x, weight, other)).all()


@needs_bytes
@pytest.mark.parametrize("keep", [False, True], ids=["per call", "kept"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_is_rounded_once_to_the_dtype_asked_for(dtype, keep):
    form, kernel = IntegerFormat(4), ByteKernel()
    x, weight = coded(some_rows(9, 40), form), some_weight(21, 40, form)
    prepared = kernel.prepare(weight, code_sums(weight, form), form, keep)
    assert torch.equal(
        kernel.linear(x, prepared, None, dtype), kernel.linear(x, prepared, None, torch.float32).to(dtype)
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("channels", [1, 7, 48])
def test_codes_in_the_high_bits_of_bytes_are_signed_and_in_the_order_of_the_input_s_parts(form, channels):
    weight, number = some_weight(11, channels, form), max(1, form.per_byte)
    found = high_bytes(weight.values, form)
    expected = in_parts(signed_bytes(weight, form), number).int() * 2 ** (8 - form.bits)
    there = in_parts(torch.ones(1, channels, dtype=torch.int8), number)[0].bool()  # the others meet zeros
    assert there.sum() == channels
    torch.testing.assert_close(found[:, there].int(), expected[:, there], rtol=0, atol=0)
    assert found.shape == (11, number * weight.values.shape[1])


@needs_bytes
def test_linears_that_read_the_same_rows_share_what_is_made_of_them():
    form, kernel = IntegerFormat(4), ByteKernel()
    x, weights = coded(some_rows(9, 40), form), [some_weight(outputs, 40, form) for outputs in (21, 5)]
    alone = [kernel.linear(coded(some_rows(9, 40), form), ready(each, form), None, torch.float32) for each in weights]
    assert x.made == {}
    first = kernel.linear(x, ready(weights[0], form), None, torch.float32)
    made = dict(x.made)
    second = kernel.linear(x, ready(weights[1], form), None, torch.float32)
    assert made
    assert all(x.made[key] is value for key, value in made.items())
    assert torch.equal(first, alone[0])
    assert torch.equal(second, alone[1])


def ready(weight: PackedCodes, form: IntegerFormat):
    return ByteKernel().prepare(weight, code_sums(weight, form), form, keep=False)


@needs_bytes
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_packed_codes_can_be_told_from_what_is_kept(form):
    weight, kernel = some_weight(33, 50, form), ByteKernel()
    kept = kernel.prepare(weight, code_sums(weight, form), form, keep=True)
    torch.testing.assert_close(kernel.packed(kept, form), weight.values, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_are_those_that_fake_quantization_rounds_to(form):
    x, quantizer = some_rows(40, 64), Quantizer(form, RatioClip(0.9))
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3))).Q
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))[None]
    transform, shift = DualTransform(torch.stack((rotation, rotation)), order), torch.full((64,), 0.25)
    codes = encode(x, transform, shift, quantizer)
    torch.testing.assert_close(form.decode(codes.codes), quantizer(transform(x) - shift), rtol=0, atol=0)
    torch.testing.assert_close(codes.sums, codes.values.sum(dim=1, keepdim=True).float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_in_parts_have_the_codes_and_dtypes_of_all_at_once(dtype, monkeypatch):
    x, quantizer = some_rows(19, 64).to(dtype), Quantizer(IntegerFormat(4))
    whole = encode(x, nn.Identity(), None, quantizer)
    monkeypatch.setattr("duquant.ops.base.PART_ELEMENTS", 3 * 64)
    parts = encode(x, nn.Identity(), None, quantizer)
    for name in ("values", "scale", "zero", "sums"):
        found, expected = getattr(parts, name), getattr(whole, name)
        assert found.dtype == (torch.uint8 if name == "values" else torch.float32)
        assert torch.equal(found, expected)


@needs_bytes
def test_more_than_8_bits_are_not_served():
    kernel = ByteKernel()
    assert kernel.serves(IntegerFormat(8), IntegerFormat(8))
    assert not kernel.serves(IntegerFormat(9), IntegerFormat(4))
    assert not kernel.serves(IntegerFormat(4), IntegerFormat(9))


@pytest.fixture
def tried_anew():
    ops.kernel_for.cache_clear()
    yield
    ops.kernel_for.cache_clear()


class Wrong(ByteKernel):
    """A kernel that gives something else."""

    def linear(self, x, weight, bias, dtype):
        return super().linear(x, weight, bias, dtype) + 1


class Broken(ByteKernel):
    """A kernel whose operator is not there."""

    def linear(self, x, weight, bias, dtype):
        raise NotImplementedError("no such operator")


@needs_bytes
@pytest.mark.parametrize(("kind", "reason"), [(Wrong, "its outputs are"), (Broken, "no such operator")])
def test_a_kernel_that_does_not_give_what_the_reference_gives_is_not_used(
    kind, reason, tried_anew, monkeypatch, caplog
):
    monkeypatch.setattr(ops, "ByteKernel", kind)
    with caplog.at_level(logging.INFO):
        assert ops.kernel_for("cpu") is None
        assert ops.kernel_for("cpu") is None
    assert [reason in each.message for each in caplog.records] == [True]  # said once


@needs_bytes
def test_the_kernel_is_announced_once(tried_anew, caplog):
    with caplog.at_level(logging.INFO):
        assert ops.kernel_for("cpu") is ops.kernel_for("cpu")
    assert [each.message for each in caplog.records] == ["linears multiply integers: oneDNN, bytes (VNNI)"]
