"""The linear that holds codes, and the input that the linears of a group share."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duquant.formats import Codes, IntegerFormat
from duquant.linear import GroupInput, QuantLinear, expanded
from duquant.packing import packed_width, unpack
from duquant.quantizer import Quantizer
from duquant.transform import DualTransform

INPUTS, OUTPUTS, BLOCK = 24, 10, 8
FORMAT = IntegerFormat(4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_transform(scale: Tensor | None = None) -> DualTransform:
    rotations = torch.linalg.qr(random(2, BLOCK, BLOCK, seed=3)).Q
    return DualTransform(rotations, torch.randperm(INPUTS, generator=torch.Generator().manual_seed(4))[None], scale)


class Counting(nn.Module):
    """A quantizer that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls, self.inner = 0, Quantizer(FORMAT)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def make_group(readers: int = 3) -> GroupInput:
    return GroupInput(make_transform(), Counting(), readers)


def expected_input(x: Tensor) -> Tensor:
    return Quantizer(FORMAT)(make_transform()(x)).to(x.dtype)


def codes_of(weight: Tensor, group_size: int | None = None, form: IntegerFormat = FORMAT) -> Codes:
    return Quantizer(form, group_size=group_size).encode(weight)


def make_linear(
    group: GroupInput | None = None, bias: bool = True, group_size: int | None = None, seed: int = 1
) -> QuantLinear:
    codes = codes_of(random(OUTPUTS, INPUTS, seed=seed), group_size)
    return QuantLinear(codes, FORMAT, random(OUTPUTS, seed=2) if bias else None, group or make_group(1))


@pytest.mark.parametrize("bits", [2, 4, 8, 9, 15])
@pytest.mark.parametrize("group_size", [None, 8])
def test_only_integers_are_held_of_a_quantized_weight(bits, group_size):
    weight, form = random(OUTPUTS, INPUTS), IntegerFormat(bits)
    linear = QuantLinear(codes_of(weight, group_size, form), form, None, make_group(1))
    linear(random(3, INPUTS))
    large = [tensor for tensor in tensors_of(linear) if tensor.numel() > weight.numel() // 5]
    assert [(tensor.dtype, tensor.numel()) for tensor in large] == [(form.dtype, OUTPUTS * packed_width(INPUTS, form))]
    assert torch.equal(linear.weight, Quantizer(form, group_size=group_size)(weight))


def tensors_of(linear: QuantLinear) -> list[Tensor]:
    """Every tensor that the linear itself holds, registered or not."""
    held = (*vars(linear).values(), *linear._buffers.values(), *linear._parameters.values())
    return [each for each in held if isinstance(each, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_the_output_is_the_product_with_the_decoded_weight(bias, group_size, dtype):
    linear, x = make_linear(bias=bias, group_size=group_size), random(2, 5, INPUTS).to(dtype)
    weight = FORMAT.decode(unpack(linear.packed_codes, FORMAT)).view(OUTPUTS, INPUTS).to(dtype)
    found = linear(x)
    assert found.dtype == dtype
    assert torch.equal(found, F.linear(expected_input(x), weight, linear.bias.to(dtype) if bias else None))
    assert ("bias" in linear.state_dict()) == bias


def test_inside_expanded_a_weight_is_decoded_once_and_forgotten_behind_it(monkeypatch):
    linear, calls = make_linear(), []
    decode = IntegerFormat.decode
    monkeypatch.setattr(IntegerFormat, "decode", lambda form, codes: calls.append(1) or decode(form, codes))
    x = random(3, INPUTS)
    expected = linear(x)
    linear(x)
    assert len(calls) == 2, "outside, each call decodes"
    with expanded(nn.ModuleList([linear])):
        results = [linear(x) for _ in range(3)]
        assert len(calls) == 3
        kept = weakref.ref(linear.decoded(torch.float32))
    assert all(torch.equal(result, expected) for result in results)
    gc.collect()
    assert kept() is None
    linear(x)
    assert len(calls) == 4


def test_inside_expanded_another_dtype_is_decoded_anew():
    linear, x = make_linear(), random(3, INPUTS)
    expected = linear(x.half()), linear(x.double())
    with expanded(linear):
        found = [linear(x.half()), linear(x.double()), linear(x.half()), linear(x.double())]
    for half, double in (found[:2], found[2:]):
        assert torch.equal(half, expected[0])
        assert torch.equal(double, expected[1])


def test_a_block_that_fails_leaves_no_decoded_weight():
    linear = make_linear()
    with pytest.raises(RuntimeError), expanded(linear):
        linear(random(3, INPUTS + 1))
    first, second = linear.decoded(torch.float32), linear.decoded(torch.float32)
    assert first is not second


def test_a_weight_that_is_not_quantized_is_held_as_it_is():
    weight, x = random(OUTPUTS, INPUTS), random(3, INPUTS)
    linear = QuantLinear(weight, FORMAT, None, make_group(1))
    assert linear.packed_codes is None
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear(x), F.linear(expected_input(x), weight))
    assert "codes" not in linear.state_dict()


def test_linears_of_a_group_share_one_transform():
    group = make_group()
    linears = nn.ModuleList(make_linear(group) for _ in range(3))
    pointers = {name: value.data_ptr() for name, value in linears.state_dict().items() if "rotations" in name}
    assert len(pointers) == 3
    assert len(set(pointers.values())) == 1


@torch.no_grad()
def test_an_input_is_computed_once_for_all_of_its_readers():
    group, x = make_group(), random(2, 5, INPUTS)
    linears = [make_linear(group, seed=seed) for seed in range(3)]
    outputs = [linear(x) for linear in linears]
    assert group.quantizer.calls == 1
    for linear, output in zip(linears, outputs, strict=True):
        assert torch.equal(output, F.linear(expected_input(x), linear.weight, linear.bias))
    for linear in linears:
        linear(x)
    assert group.quantizer.calls == 2, "a second pass is computed again"


@pytest.mark.parametrize(("of", "calls"), [("input", 2), ("quantizer", 2), ("nothing", 1)])
def test_readers_that_record_gradients_compute_their_own(of, calls):
    group, x = make_group(), random(5, INPUTS)
    x.requires_grad_(of == "input")
    if of == "quantizer":
        group.quantizer.scale = nn.Parameter(torch.ones(1))
    assert torch.equal(group(x), group(x))
    assert group.quantizer.calls == calls


def test_one_reader_is_never_given_what_another_was_given():
    group, x = make_group(readers=1), random(5, INPUTS)
    first, second = group(x), group(x)
    assert group.quantizer.calls == 2
    assert first is not second


def test_another_tensor_is_never_given_an_old_result():
    group, x = make_group(), random(5, INPUTS)
    group(x)
    for other in (x.clone(), x + 1, x[:2]):  # equal or not: another tensor
        calls = group.quantizer.calls
        assert torch.equal(group(other), expected_input(other))
        assert group.quantizer.calls == calls + 1


def test_a_tensor_at_the_address_of_one_that_is_gone_is_not_taken_for_it():
    group = make_group()
    for seed in range(20):
        x = random(5, INPUTS, seed=seed)
        assert torch.equal(group(x), expected_input(x))
        del x  # the next one is often given its memory, and sometimes its id


def test_a_tensor_that_was_changed_in_place_is_computed_anew():
    group, x = make_group(), random(5, INPUTS)
    before = group(x)
    x[2] *= 3
    assert torch.equal(group(x), expected_input(x))
    assert not torch.equal(group(x), before)


@torch.no_grad()
def test_an_input_that_only_some_read_does_not_stay_for_the_next():
    group, first, second = make_group(), random(5, INPUTS), random(5, INPUTS, seed=1)
    group(first)
    group(first)
    for _ in range(3):
        assert torch.equal(group(second), expected_input(second))
    assert group.quantizer.calls == 2
    assert torch.equal(group(first), expected_input(first))
    assert group.quantizer.calls == 3


def test_with_and_without_gradients_are_not_mixed():
    group, x = make_group(), random(5, INPUTS).requires_grad_()
    with torch.no_grad():
        assert not group(x).requires_grad
    result = group(x)
    assert result.requires_grad
    with torch.no_grad():
        assert not group(x).requires_grad
    result.sum().backward()
    assert x.grad.abs().sum() > 0


def test_one_backward_pass_through_all_readers_adds_up_their_gradients():
    group, x = make_group(), random(5, INPUTS).requires_grad_()
    linears = [make_linear(group, seed=seed) for seed in range(3)]
    sum(linear(x).sum() for linear in linears).backward()
    together, x.grad = x.grad.clone(), None
    for linear in linears:
        linear.group = make_group(readers=1)
        linear(x).sum().backward()
    torch.testing.assert_close(together, x.grad)


def test_inference_mode_gives_the_same_as_often_though_it_counts_no_versions():
    group, x = make_group(), random(5, INPUTS)
    expected = expected_input(x)
    with torch.inference_mode():
        own = x.clone()
        for _ in range(group.readers):
            assert torch.equal(group(own), expected)
        assert group.quantizer.calls == 1
        group(own)
        own *= 2
        assert torch.equal(group(own), expected_input(own))


def test_nothing_is_held_behind_the_last_reader():
    group, x = make_group(readers=2), random(5, INPUTS)
    result = group(x)
    held = weakref.ref(result)
    group(x)
    del result
    gc.collect()
    assert held() is None
    seen = weakref.ref(x)
    del x
    gc.collect()
    assert seen() is None


def test_the_input_itself_is_not_kept_alive():
    group, x = make_group(), random(5, INPUTS)
    group(x)
    seen = weakref.ref(x)
    del x
    gc.collect()
    assert seen() is None


def test_inputs_are_left_as_they_are():
    x = random(5, INPUTS)
    before = x.clone()
    make_linear()(x)
    assert torch.equal(x, before)
