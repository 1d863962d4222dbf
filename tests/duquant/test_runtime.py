"""How linears compute: with decoded weights or with integers, made of the codes at every call or kept."""

import copy

import pytest
import torch
from torch import Tensor, nn

from duquant.formats import IntegerFormat
from duquant.linear import GroupInput, QuantLinear, expanded
from duquant.ops.cpu import ByteKernel
from duquant.quantizer import Quantizer
from duquant.runtime import set_runtime_
from duquant.transform import DualTransform

needs_bytes = pytest.mark.skipif(not ByteKernel.available(), reason="this CPU does not multiply bytes (VNNI)")
FORM = IntegerFormat(4)
WAYS = [("reference", "per_call"), ("reference", "once"), ("integer", "per_call"), ("integer", "once")]


def pair(outputs: int = 24, channels: int = 32, group_size: int | None = None) -> nn.ModuleList:
    """Two linears that read the same input."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    transform = DualTransform(torch.stack((rotation, rotation)), torch.randperm(channels, generator=generator)[None])
    group = GroupInput(transform, Quantizer(FORM, group_size=group_size), readers=2, shift=torch.full((channels,), 0.1))
    weights = torch.randn(2, outputs, channels, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    return nn.ModuleList(QuantLinear(Quantizer(FORM).encode(each), FORM, bias, group) for each in weights)


def outputs(linears: nn.ModuleList, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([linear(x) for linear in linears])


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("runtime", "expand"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_way_gives_the_same_but_for_the_rounding_of_floats(runtime, expand, dtype):
    linears, x = pair(), X.to(dtype)
    expected = outputs(linears, x.float())
    set_runtime_(linears, runtime, expand)
    found = outputs(linears, x)
    assert found.dtype is dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * 8)
    torch.testing.assert_close(outputs(linears, x), found, rtol=0, atol=0)  # a second call


@needs_bytes
def test_integers_are_what_is_multiplied(monkeypatch):
    calls, linears = [], pair()
    original = ByteKernel.linear
    monkeypatch.setattr(ByteKernel, "linear", lambda *args: calls.append(1) or original(*args))
    outputs(linears, X)
    assert not calls
    set_runtime_(linears, "integer")
    outputs(linears, X)
    assert len(calls) == 2


@needs_bytes
def test_linears_that_read_the_same_input_round_it_once(monkeypatch):
    calls, linears = [], pair()
    original = ByteKernel.encode
    monkeypatch.setattr(ByteKernel, "encode", lambda *args: calls.append(1) or original(*args))
    set_runtime_(linears, "integer")
    outputs(linears, X)
    assert len(calls) == 1
    outputs(linears, X + 1)
    assert len(calls) == 2


@pytest.mark.parametrize(("runtime", "expand"), WAYS)
def test_compiled_linears_compute_the_same(runtime, expand):
    linears = pair()
    set_runtime_(linears, runtime, expand)
    expected = outputs(linears, X)
    with torch.no_grad():
        found = torch.compile(linears[0], backend="aot_eager")(X)
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("runtime", ["reference", "integer"])
def test_groups_of_channels_are_decoded(runtime):
    linears = pair(group_size=16)
    expected = outputs(linears, X)
    set_runtime_(linears, runtime)
    torch.testing.assert_close(outputs(linears, X), expected, rtol=0, atol=0)


def test_gradients_pass_through_decoded_weights():
    linears, x = pair(), X.clone().requires_grad_()
    set_runtime_(linears, "integer")
    linears[0](x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_no_rows_give_no_rows():
    linears = pair()
    set_runtime_(linears, "integer")
    assert outputs(linears, X[:0]).shape == (2, 0, 5, 24)


@needs_bytes
def test_codes_are_let_go_where_they_can_be_told_from_what_is_kept_and_come_back():
    linears = pair()
    before = {name: tensor.clone() for name, tensor in linears.state_dict().items()}
    set_runtime_(linears, "integer", "once")
    outputs(linears, X)
    assert all(linear.codes is None for linear in linears)
    after = linears.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("runtime", "expand"), WAYS)
def test_what_is_kept_is_counted(runtime, expand):
    linears = pair()
    set_runtime_(linears, runtime, expand)
    outputs(linears, X)
    kept = [linear.kept_bytes for linear in linears]
    if runtime == "reference" or not ByteKernel.available():
        assert kept == [24 * 32 * 4 * (expand == "once")] * 2
    else:  # a byte for a code where that is kept, and three numbers for an output
        assert kept == [24 * 32 * (expand == "once") + 3 * 24 * 4] * 2


@needs_bytes
@pytest.mark.parametrize("expand", ["per_call", "once"])
def test_a_scale_that_is_written_over_is_noticed(expand):
    linears = pair()
    set_runtime_(linears, "integer", expand)
    before = outputs(linears, X)
    for linear in linears:
        linear.scale.mul_(2)
    after = outputs(linears, X)
    set_runtime_(linears, "reference")
    torch.testing.assert_close(after, outputs(linears, X), rtol=1e-5, atol=1e-4)
    assert (after - before).abs().max() > 1


@needs_bytes
@pytest.mark.parametrize(
    "change",
    [
        lambda linears: linears.to(torch.float64).to(torch.float32),
        copy.deepcopy,
        lambda linears: linears.load_state_dict(pair().state_dict()) and linears,
        lambda linears: set_runtime_(linears, "reference") or linears,
    ],
    ids=["moved", "copied", "loaded", "another runtime"],
)
def test_what_is_kept_does_not_outlive_a_change(change):
    linears = pair()
    expected = outputs(linears, X)
    set_runtime_(linears, "integer", "once")
    outputs(linears, X)
    torch.testing.assert_close(outputs(change(linears), X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("runtime", "expand"), WAYS)
def test_a_block_of_expanded_leaves_all_as_it_was(runtime, expand):
    linears = pair()
    set_runtime_(linears, runtime, expand)
    expected = outputs(linears, X)
    for integers in (None, True, False):
        with expanded(linears, integers):
            assert all(linear.keeps for linear in linears)
            torch.testing.assert_close(outputs(linears, X), expected, rtol=1e-5, atol=1e-5)
        assert all((linear.integers, linear.keeps) == (runtime == "integer", expand == "once") for linear in linears)
    torch.testing.assert_close(outputs(linears, X), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("how", "named"), [(("fast", "once"), "runtime 'fast'"), (("integer", "twice"), "expand 'twice'")]
)
def test_other_words_are_refused(how, named):
    with pytest.raises(ValueError, match=named):
        set_runtime_(pair(), *how)
