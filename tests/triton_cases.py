"""What the Triton kernels are held to, on a GPU or under Triton's interpreter; run by `test_ops_triton.py`.

A code is right if it is a nearest one to the float64 value: the transform's float32 sums differ in their last bits from
one order to another, so where that value lies on a tie (to within TIE of a step) either neighbour is taken. What has no
transform has no such excuse, and is compared to the bit.
"""

import os
import zlib

import pytest
import torch
from torch import Tensor, nn

from duquant.formats import Codes, IntegerFormat
from duquant.linear import GroupInput, QuantLinear
from duquant.ops import reference
from duquant.ops import triton as ops
from duquant.ops import triton_launch as launch
from duquant.ops.triton_product import product, product_few
from duquant.ops.triton_quantize import rotate
from duquant.packing import PackedCodes, code_sums, decode_weight, pack
from duquant.quantizer import FoundClip, NoClip, Quantizer, RatioClip
from duquant.transform import DualTransform

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
TIE = 5e-3
HALF = 2.0**-24  # of a float32's last bit, relative


# each case has one of a kernel's tile sizes, all cases have all of them: to measure them all in each takes minutes
TILES = {kernel: kernel.configs for kernel in (product, product_few, rotate)}


@pytest.fixture(autouse=True)
def one_tile(request, monkeypatch):
    for kernel, configs in TILES.items():
        chosen = zlib.crc32(request.node.name.encode()) % len(configs)
        monkeypatch.setattr(kernel, "configs", [configs[chosen]])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def integers(largest: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(largest + 1, shape, generator=generator(seed), dtype=torch.uint8)


def make_transform(channels: int, block: int, rotations: int = 2, scaled: bool = True) -> DualTransform:
    matrices = torch.linalg.qr(random(rotations, block, block, seed=1)).Q
    permutations = [torch.randperm(channels, generator=generator(index)) for index in range(rotations - 1)]
    stacked = torch.stack(permutations) if permutations else torch.empty(0, channels, dtype=torch.int64)
    scale = torch.rand(channels, generator=generator(3)) + 0.5 if scaled else None
    return DualTransform(matrices, stacked, scale).to(DEVICE)


def identity(channels: int) -> DualTransform:
    return DualTransform(torch.empty(0, 1, 1), torch.empty(0, channels, dtype=torch.int64)).to(DEVICE)


def quantized(x: Tensor, transform: DualTransform, form: IntegerFormat, shift: Tensor | None = None, **options):
    parts = (transform.rotations, transform.permutations, transform.scale)
    return ops.quantize_rows(x, *parts, shift, form=form, **options)


def assert_nearest(found: Tensor, exact: Tensor) -> None:
    assert (found.double() - exact).abs().max() <= 0.5 + TIE


@pytest.mark.parametrize(
    ("rows", "channels", "block", "bits", "changes"),
    [
        (5, 24, 8, 4, {}),
        (1, 96, 32, 4, {"scaled": False}),
        (19, 130, 65, 8, {"shifted": False}),
        (18, 144, 48, 3, {"symmetric": True}),
        (3, 320, 160, 4, {"dtype": torch.bfloat16}),  # a block of more than one tile of columns
        (7, 64, 16, 4, {"dtype": torch.float16, "rotations": 3}),
        (2, 64, 32, 2, {"rotations": 1}),
        (17, 128, 32, 4, {"group_size": 32}),
        (4, 96, 32, 8, {"group_size": 48, "symmetric": True}),
        (5, 64, 32, 4, {"symmetric": True, "full_range": True}),
        (3, 90, 30, 5, {"scaled": False, "shifted": False}),
    ],
)
def test_codes_are_nearest_to_the_transformed_values(rows, channels, block, bits, changes):
    options = {"symmetric": False, "scaled": True, "shifted": True, "rotations": 2, "group_size": None}
    options |= {"dtype": torch.float32, **changes}
    form = IntegerFormat(bits, options["symmetric"], options.get("full_range", False))
    group_size = options["group_size"]
    transform = make_transform(channels, block, options["rotations"], options["scaled"])
    x = (random(rows, channels, seed=5) * 10).to(options["dtype"]).to(DEVICE)
    shift = random(channels, seed=6).to(DEVICE) if options["shifted"] else None
    ratios, kept = torch.tensor([0.9, 0.8], device=DEVICE), x.clone()
    codes, scale, zero, sums = quantized(
        x, transform, form, shift, low_ratio=ratios[0], high_ratio=0.8, group_size=group_size
    )
    assert torch.equal(x, kept)
    assert codes.dtype is torch.uint8
    y = transform(x.double()) - (0 if shift is None else shift.double())
    vectors = y.view(rows, -1, group_size) if group_size else y
    low, high = (ratio * end for ratio, end in zip((0.9, 0.8), vectors.aminmax(dim=-1, keepdim=True), strict=True))
    expected = form.parameters(low, high)
    torch.testing.assert_close(scale.double(), expected.scale, rtol=1e-5, atol=0)
    assert_nearest(zero, expected.zero if form.symmetric else -low / expected.scale)
    assert torch.equal(zero, zero.round())
    values = codes.view(vectors.shape)
    assert_nearest(values, (vectors / scale.double() + zero).clamp(0, form.largest))
    assert torch.equal(sums, values.sum(-1, keepdim=True, dtype=torch.int32))
    in_float32 = transform(x) if shift is None else transform(x) - shift
    oracle = Quantizer(form, FoundClip(ratios), group_size).encode(in_float32).values
    assert (oracle.int() - values.int()).abs().max() <= 1
    assert (oracle != values).sum() <= max(1, 1e-3 * values.numel())


@pytest.mark.parametrize("how", [(False,), (True,), (True, True)], ids=["asymmetric", "symmetric", "all codes"])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_rows_without_a_transform_have_the_formats_codes_to_the_bit(bits, how):
    # ties; zeros only; one value; ranges on one side of zero, near it and far away; ends that are zero; huge, tiny
    ties = torch.arange(70) % (2 * 2**bits - 1) / 2
    rows = [ties, -ties, torch.zeros(70), torch.full((70,), 3.0), torch.full((70,), -1e6), random(70).abs() + 5]
    rows += [random(70) + 1e5, random(70).abs(), -random(70).abs(), random(70) * 1e8, random(70) * 1e-9, random(70)]
    x, form = torch.stack(rows).to(DEVICE), IntegerFormat(bits, *how)
    expected = Quantizer(form).encode(x)
    codes, scale, zero, _ = quantized(x, identity(70), form)
    assert torch.equal(scale, expected.scale)
    assert torch.equal(zero, expected.zero)
    assert torch.equal(codes, expected.values)


def test_scale_and_shift_are_applied_where_there_are_no_rotations():
    x, scale, shift = random(4, 40), random(40, seed=1).abs() + 0.1, random(40, seed=2)
    x, scale, shift = (each.to(DEVICE) for each in (x, scale, shift))
    transform, form = identity(40), IntegerFormat(4)
    transform.scale = scale
    expected = Quantizer(form, group_size=8).encode(x / scale - shift)
    codes, found_scale, _, _ = quantized(x, transform, form, shift, group_size=8)
    assert torch.equal(found_scale, expected.scale)
    assert torch.equal(codes, expected.values.flatten(1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_rows_are_laid_out_as_packed_weights(bits):
    x, form = random(5, 131).to(DEVICE), IntegerFormat(bits)
    expected = pack(Quantizer(form).encode(x), form)
    codes, _, _, sums = quantized(x, identity(131), form, packed=True)
    assert torch.equal(codes, expected.values)
    assert torch.equal(sums, quantized(x, identity(131), form)[3])


def test_rows_that_are_not_contiguous_have_the_codes_of_a_copy():
    x, transform = random(48, 9).T.to(DEVICE), make_transform(48, 16)
    found, expected = (quantized(each, transform, IntegerFormat(4))[0] for each in (x, x.contiguous()))
    assert torch.equal(found, expected)


class Product:
    """Codes of an input and of a weight, their product by the kernels, and in float64."""

    def __init__(self, rows: int, channels: int, outputs: int, bits: int, form: IntegerFormat, **groups: int | None):
        self.form, self.input_form = form, IntegerFormat(bits)
        input_group, weight_group = groups.get("input"), groups.get("weight")
        self.input = Quantizer(self.input_form, group_size=input_group).encode(random(rows, channels, seed=1))
        self.weight = Quantizer(form, group_size=weight_group).encode(random(outputs, channels, seed=2) * 0.1)
        self.bias: Tensor | None = random(outputs, seed=3)

    @property
    def packed(self) -> PackedCodes:
        return pack(self.weight, self.form).to(DEVICE)

    def found(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None), **options) -> Tensor:
        values, scale, zero = (each[rows].to(DEVICE) for each in self.input.tensors().values())
        sums = values.sum(-1, keepdim=True, dtype=torch.int32)
        bias = None if self.bias is None else self.bias.to(DEVICE)
        return ops.linear(values.flatten(1), scale, zero, sums, self.packed, self.form, bias, dtype, **options).cpu()

    def decoded(self) -> tuple[Tensor, Tensor]:
        sides = []
        for each, form in ((self.input, self.input_form), (self.weight, self.form)):
            wide = Codes(each.values, each.scale.double(), each.zero.double())
            sides.append(form.decode(wide).flatten(1))
        return sides[0], sides[1]

    def expected(self) -> Tensor:
        x, weight = self.decoded()
        return x @ weight.T + (0 if self.bias is None else self.bias.double())

    def assert_close(self, found: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """The sum of products is exact: left are the roundings of it, of three products or sums and of the dtype."""
        x, weight = self.decoded()
        terms = (x @ weight.T).abs() + (0 if self.bias is None else self.bias.double().abs())
        if self.input.scale.dim() == 3 or self.weight.scale.dim() == 3:  # groups, or zero points beyond the codes
            terms = x.abs() @ weight.abs().T + terms
        unit = torch.finfo(dtype).eps
        error = (found.double() - self.expected()).abs()
        assert (error <= 6 * HALF * terms + (0 if dtype is torch.float32 else unit * self.expected().abs())).all()


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(2, False), (3, True), (4, False), (4, True), (5, False), (6, True), (7, False), (8, False)]
)
@pytest.mark.parametrize("rows", [1, 3, 19])
def test_products_of_codes_of_all_widths_are_those_of_float64(rows, bits, symmetric):
    case = Product(rows, 131, 37, 4 if bits < 8 else 8, IntegerFormat(bits, symmetric))
    case.assert_close(case.found())


@pytest.mark.parametrize("rows", [5, 40])
def test_whichever_tile_is_measured_to_be_the_fastest_the_product_is_the_same(rows, monkeypatch):
    case = Product(rows, 192, 70, 4, IntegerFormat(4))
    expected = case.found()
    for kernel, configs in TILES.items():
        monkeypatch.setattr(kernel, "configs", configs)
    assert torch.equal(case.found(), expected)
    for kernel, configs in TILES.items():
        for config in configs:
            monkeypatch.setattr(kernel, "configs", [config])
            assert torch.equal(case.found(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_the_product_is_rounded_to_the_dtype_asked_for_once(rows, dtype):
    case = Product(rows, 128, 33, 4, IntegerFormat(4))
    found = case.found(dtype)
    assert found.dtype is dtype
    case.assert_close(found, dtype)
    if dtype is torch.float16 or DEVICE.type == "cuda":  # to bfloat16 the interpreter cuts digits off
        assert torch.equal(found, case.found().to(dtype))


@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize(("bits", "channels"), [(4, 640), (8, 640), (2, 515)])
def test_integers_are_exact_at_the_ends_of_every_range(bits, channels, rows):
    # codes at both ends with zero points at the ends: the largest sums there are, of which no unit may be lost
    case = Product(rows, channels, 24, 8, IntegerFormat(bits))
    case.bias = None
    ends = integers(1, rows, channels), integers(1, 24, channels, seed=1)
    ends[0][0], ends[1][:2] = 1, 1
    largest = case.form.largest
    zeros = [255.0 * integers(1, rows, 1, seed=2), largest * integers(1, 24, 1, seed=3).float()]
    case.input = Codes(ends[0] * 255, torch.ones(rows, 1), zeros[0])
    case.weight = Codes(ends[1] * largest, torch.ones(24, 1), zeros[1])
    exact = case.expected()
    assert exact.abs().max() > channels * 200 * largest
    assert torch.equal(case.found().double(), exact.float().double())


@pytest.mark.parametrize(("bits", "input_bits"), [(2, 4), (3, 8), (4, 4), (5, 4), (8, 8)])
def test_a_weight_that_is_unpacked_first_has_the_products_of_a_packed_one_to_the_bit(bits, input_bits, monkeypatch):
    case = Product(40, 256, 37, input_bits, IntegerFormat(bits))
    options = {"sums_of_weight": code_sums(case.packed, case.form), "input_bits": input_bits}
    expected = case.found(**options)
    monkeypatch.setattr(launch, "MANY_ROWS", 40)
    monkeypatch.setattr(launch, "_launch", None)
    assert torch.equal(case.found(**options), expected)


@pytest.mark.parametrize("channels", [8, 104, 1096 if DEVICE.type == "cpu" else 40968])
@pytest.mark.parametrize(("bits", "symmetric", "dtype"), [(4, False, torch.float32), (3, True, torch.float16)])
def test_one_row_of_four_bits_read_in_words_has_the_product_of_the_reference(
    channels, bits, symmetric, dtype, monkeypatch
):
    case = Product(2, channels, 21, bits, IntegerFormat(4, symmetric))
    monkeypatch.setattr(launch, "_launch_few", None)
    for rows in (slice(0, 1), slice(1, 2)):
        found = case.found(dtype, rows, sums_of_weight=code_sums(case.packed, case.form), input_bits=bits)
        row = Codes(*(each[rows] for each in case.input.tensors().values()))
        exact = reference.linear(row, pack(case.weight, case.form), case.form, case.bias)
        terms = (exact.abs() + case.bias.abs()).max()
        assert (found.double() - exact).abs().max() <= (1e-6 if dtype is torch.float32 else 1e-3) * terms


@pytest.mark.parametrize("channels", [1032, 4096] if DEVICE.type == "cpu" else [32776, 131072])
def test_one_row_read_in_words_is_exact_where_all_codes_are_the_largest(channels, monkeypatch):
    case = Product(1, channels, 9, 4, IntegerFormat(4))
    monkeypatch.setattr(launch, "_launch_few", None)
    case.bias = None
    case.input = Codes(torch.full((1, channels), 15, dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1))
    case.weight = Codes(torch.full((9, channels), 15, dtype=torch.uint8), torch.ones(9, 1), torch.zeros(9, 1))
    found = case.found(sums_of_weight=code_sums(case.packed, case.form), input_bits=4)
    assert torch.equal(found, torch.full((1, 9), 225.0 * channels).float())


@pytest.mark.parametrize("channels", [100, 66])  # rows that are no whole words
def test_one_row_of_four_bits_of_any_width_has_the_product_of_the_reference(channels):
    case = Product(1, channels, 21, 4, IntegerFormat(4))
    case.assert_close(case.found(sums_of_weight=code_sums(case.packed, case.form), input_bits=4))


def test_zero_points_beyond_the_codes_are_taken_off_too():
    case = Product(18, 100, 21, 4, IntegerFormat(4))
    case.input = Quantizer(IntegerFormat(4)).encode(random(18, 100).abs() + 40)
    case.weight = Quantizer(case.form).encode(random(21, 100, seed=1) + torch.linspace(-30, 30, 21)[:, None])
    assert case.input.zero.max() < 0
    assert case.weight.zero.min() < 0 < case.form.largest < case.weight.zero.max()
    x, weight = case.decoded()
    for rows in (slice(0, 1), slice(0, 5), slice(0, 18)):
        error = (case.found(rows=rows).double() - case.expected()[rows]).abs()
        assert (error <= 8 * HALF * (x.abs() @ weight.abs().T + case.bias.abs())[rows]).all()


@pytest.mark.parametrize(("bits", "channels"), [(4, 1030), (3, 515), (8, 512)])  # dealt to 4, 2 and 2 programs
def test_few_rows_have_the_products_of_many_to_the_bit_whatever_is_known_beforehand(bits, channels):
    case = Product(17, channels, 30, 4, IntegerFormat(bits))
    expected = case.found()
    sums = code_sums(case.packed, case.form)
    assert torch.equal(sums.cpu(), case.weight.values.sum(-1, dtype=torch.int32))
    for rows in (slice(0, 1), slice(1, 17)):
        for options in ({}, {"sums_of_weight": sums, "input_bits": 4}):
            assert torch.equal(case.found(rows=rows, **options), expected[rows])
    assert torch.equal(case.found(sums_of_weight=sums, input_bits=4), expected)


@pytest.mark.parametrize("rows", [1, 18])
@pytest.mark.parametrize(
    "groups", [{"input": 32}, {"weight": 64}, {"input": 96, "weight": 96}, {"input": 192, "weight": 192}], ids=str
)
def test_groups_of_channels_are_scaled_one_by_one(groups, rows):
    case = Product(rows, 192, 34, 4, IntegerFormat(4), **groups)
    found = case.found()
    case.assert_close(found)
    sums = code_sums(case.packed, case.form)
    torch.testing.assert_close(case.found(sums_of_weight=sums), found, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 20])
def test_a_linear_from_codes_is_that_of_decoded_weights(rows):
    x, form, transform = random(rows, 96).to(DEVICE), IntegerFormat(4), make_transform(96, 32)
    packed = pack(Quantizer(form).encode(transform.transform_weight(random(40, 96, seed=9).to(DEVICE))), form)
    found = ops.linear(*quantized(x, transform, form), packed, form, None, torch.float32, input_bits=4)
    expected = Quantizer(form)(transform(x)) @ decode_weight(packed, form, torch.float32).T
    # a code on a tie may be the other one: a step of the input times a weight
    torch.testing.assert_close(found, expected, atol=0.05 * expected.abs().max().item(), rtol=0)
    assert (found - expected).abs().median() < 1e-4 * expected.abs().max()


def test_no_rows_make_no_codes_and_no_products():
    form = IntegerFormat(4)
    codes, scale, zero, sums = quantized(torch.empty(0, 64, device=DEVICE), make_transform(64, 16), form)
    assert [each.shape for each in (codes, scale, zero, sums)] == [(0, 64), (0, 1), (0, 1), (0, 1)]
    packed = pack(Quantizer(form).encode(random(6, 64)), form).to(DEVICE)
    assert ops.linear(codes, scale, zero, sums, packed, form, None, torch.float16).shape == (0, 6)


def quantize_arguments(group_size: int | None, packed: bool) -> tuple:
    transform = make_transform(64, 16)
    x, ratio, shift = random(3, 64).to(DEVICE), torch.ones((), device=DEVICE), random(64, seed=1).to(DEVICE)
    parts = (transform.rotations, transform.permutations, transform.scale, shift)
    return (x, *parts, ratio, ratio, 4, False, group_size, packed)


def linear_arguments(dtype: torch.dtype) -> tuple:
    case = Product(3, 64, 6, 4, IntegerFormat(4))
    values, scale, zero = (each.to(DEVICE) for each in case.input.tensors().values())
    sums = values.sum(-1, keepdim=True, dtype=torch.int32)
    packed = case.packed
    return (
        values,
        scale,
        zero,
        sums,
        packed.values,
        packed.scale,
        packed.zero,
        None,
        case.bias.to(DEVICE),
        4,
        4,
        dtype,
    )


@pytest.mark.parametrize(("group_size", "packed"), [(None, False), (32, True)])
def test_the_operator_that_quantizes_is_one_that_can_be_compiled(group_size, packed):
    arguments = quantize_arguments(group_size, packed)
    torch.library.opcheck(torch.ops.duquant.triton_quantize_rows.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_that_multiplies_is_one_that_can_be_compiled(dtype):
    torch.library.opcheck(torch.ops.duquant.triton_linear.default, linear_arguments(dtype))


def test_a_compiled_function_traces_through_both_without_a_break():
    form, transform = IntegerFormat(4), make_transform(64, 16)
    packed = pack(Quantizer(form).encode(random(6, 64)), form).to(DEVICE)

    def layer(x: Tensor) -> Tensor:
        y = ops.linear(*quantized(x, transform, form, low_ratio=0.9), packed, form, None, x.dtype)
        return nn.functional.silu(y)

    x = random(5, 64).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("groups", "weight", "message"),
    [
        ({"input": 24}, IntegerFormat(4), "groups of 24 channels: must be a multiple of 32"),
        ({"input": 32, "weight": 64}, IntegerFormat(4), "groups of different sizes"),
        ({}, IntegerFormat(9), "9 bits"),
    ],
)
def test_what_the_product_does_not_take_is_named(groups, weight, message):
    with pytest.raises(ValueError, match=message):
        Product(3, 192, 8, 4, weight, **groups).found()


def test_more_channels_than_int32_adds_up_are_refused():
    case = Product(2, 33032, 2, 8, IntegerFormat(8))
    with pytest.raises(ValueError, match="int32"):
        case.found()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.empty(3, 64, dtype=torch.float64)}, "float64"),
        ({"x": torch.empty(3, 60)}, "60 channels"),
        ({"group_size": 48}, "groups of 48"),
        ({"form": IntegerFormat(9)}, "9 bits"),
        ({"form": IntegerFormat(2), "group_size": 2, "packed": True}, "bytes of 4 codes"),
    ],
)
def test_rows_that_cannot_be_quantized_are_named(changes, message):
    options = {"x": torch.empty(3, 64), "form": IntegerFormat(4), **changes}
    with pytest.raises(ValueError, match=message):
        quantized(options.pop("x").to(DEVICE), make_transform(64, 16), options.pop("form"), **options)


@pytest.mark.parametrize(
    "clip", [NoClip(), RatioClip(0.9), FoundClip(torch.tensor([0.8, 0.95]))], ids=lambda clip: type(clip).__name__
)
def test_linears_that_multiply_integers_compute_what_decoded_weights_do(clip, monkeypatch):
    form, x = IntegerFormat(4), random(3, 7, 64, seed=5).to(DEVICE)
    group = GroupInput(make_transform(64, 16), Quantizer(form, clip), 1, torch.full((64,), 0.1))
    linear = QuantLinear(Quantizer(form).encode(random(40, 64, seed=6)), form, random(40, seed=7), group).to(DEVICE)
    with torch.no_grad():
        expected = linear(x)
        monkeypatch.setattr("duquant.linear.kernel_for", lambda device: ops.TritonKernel())
        linear.compute_(integers=True, keep=False)
        found = linear(x)
    # a code on a tie may be a neighbour's: one in a thousand, each worth a step of one weight
    assert ((found - expected).abs() > 1e-4).float().mean() < 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1.0)
