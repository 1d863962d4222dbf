"""What fake quantization by kernels is held to: torch's operations, alone to the bit; see `triton_cases.py`."""

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, random

from duquant.formats import IntegerFormat
from duquant.ops import fused
from duquant.quantizer import FoundClip, Quantizer, RatioClip
from duquant.transform import DualTransform

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # by the interpreter, as meant


def unlike_rows(length: int, symmetric: bool = False) -> Tensor:
    """[13, length]: zeros, one value, ranges on one side of 0, ties of 4 bits, huge, tiny, infinite, no numbers."""
    ties = torch.arange(length) % (13 if symmetric else 31) / 2
    rows = [
        torch.zeros(length),
        torch.full((length,), 3.0),
        random(length).abs() + 5,
        -random(length).abs(),
        ties,
        -ties,
    ]
    rows += [random(length) * 1e8, random(length) * 1e-9, random(length), random(length) - 1e3]
    broken = random(3, length)
    broken[0, 1], broken[1, 0], broken[2] = float("inf"), float("nan"), float("-inf")
    return torch.stack([*rows, *broken])


def assert_fake(x: Tensor, quantizer: Quantizer, dtype: torch.dtype | None = None) -> None:
    """The kernel gives what torch gives, laid out likewise."""
    dtype = dtype or (x.dtype if DEVICE.type == "cuda" or x.dtype is not torch.bfloat16 else torch.float32)
    x, quantizer = x if x.device.type == DEVICE.type else x.to(DEVICE), quantizer.to(DEVICE)
    found, expected = fused.launched(x, quantizer, dtype), quantizer.computed(x, dtype)
    assert (found.dtype, found.shape, found.stride()) == (dtype, x.shape, expected.stride())
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        *((bits, torch.float16) for bits in (2, 3, 4, 8)),
        *((bits, torch.float32) for bits in (4, 6, 12)),
        (4, torch.bfloat16),
    ],
)
def test_fake_quantization_in_one_kernel_is_torch_s_to_the_bit(bits, symmetric, dtype):
    assert_fake(unlike_rows(50, symmetric).to(dtype), Quantizer(IntegerFormat(bits, symmetric), RatioClip(0.9)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("clip", "group_size"),
    [
        (None, None),
        (FoundClip(torch.tensor([0.9, 0.7])), None),
        (FoundClip(torch.tensor([0.5, 1.0]).half()), 24),
        (None, 8),
    ],
)
@pytest.mark.parametrize("length", [72, 96])  # one block of the interpreter, and two
def test_ratios_and_groups_are_those_of_the_quantizer(length, clip, group_size, dtype):
    x = random(2, 5, length) * torch.logspace(-3, 2, 5)[:, None]
    assert_fake(x.to(dtype), Quantizer(IntegerFormat(4), clip, group_size))
    assert_fake(x, Quantizer(IntegerFormat(4), clip, group_size), dtype)


@pytest.mark.parametrize("length", [1, 7, 65, 200] if DEVICE.type == "cpu" else [1, 7, 128, 11008, 28672])
@pytest.mark.parametrize("symmetric", [False, True])
def test_vectors_of_all_lengths_are_quantized(length, symmetric):
    assert_fake(unlike_rows(max(length, 2), symmetric)[:, :length], Quantizer(IntegerFormat(4, symmetric)))
    assert_fake(random(length), Quantizer(IntegerFormat(4, symmetric)))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2),  # q, k and v of heads
        lambda x: x.transpose(1, 2)[:, 1:3],
        lambda x: x[:, ::2],
        lambda x: x[..., 3:],
        lambda x: x[None],
    ],
)
def test_views_are_quantized_as_they_lie(view):
    x, quantizer = view(random(2, 5, 4, 24).to(DEVICE)), Quantizer(IntegerFormat(4))
    found = fused.launched(x, quantizer, torch.float16)
    assert torch.equal(found, quantizer.computed(x, torch.float16))


def test_transposed_vectors_are_quantized_in_a_copy():
    x, quantizer = random(24, 5).T.to(DEVICE), Quantizer(IntegerFormat(4))
    assert torch.equal(fused.launched(x, quantizer, x.dtype), quantizer.computed(x, x.dtype))


def test_the_kernel_passes_the_trial_that_admits_it():
    assert fused.trial(DEVICE, IntegerFormat(4))
    assert fused.trial(DEVICE, IntegerFormat(6, symmetric=True))
    assert fused.trial(DEVICE, IntegerFormat(4, symmetric=True, full_range=True))


@pytest.mark.parametrize("ratios", [None, [0.9, 0.8]])
def test_the_operator_of_fake_quantization_is_one_that_can_be_compiled(ratios):
    x, ratios = (
        random(2, 3, 4, 16).transpose(1, 2).to(DEVICE),
        None if ratios is None else torch.tensor(ratios).to(DEVICE),
    )
    arguments = (x, ratios, 0.9, 0.9, 4, False, 8, torch.float16)
    torch.library.opcheck(torch.ops.duquant.triton_fake_quantize.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("rotations", "block"), [(1, 32), (2, 16), (3, 32)])
def test_what_is_rotated_and_rounded_is_what_torch_makes_but_for_ties(rotations, block, scaled, dtype):
    channels = 3 * block
    matrices = torch.linalg.qr(random(rotations, block, block)).Q
    orders = torch.stack([torch.randperm(channels) for _ in range(rotations)])[1:]
    scale, shift = (random(channels).abs() + 0.5, random(channels) / 4) if scaled else (None, None)
    x = (random(2, 19, channels) * torch.logspace(-2, 2, 19)[:, None]).to(dtype)
    transform, quantizer = (
        DualTransform(matrices, orders, scale).to(DEVICE),
        Quantizer(IntegerFormat(4), RatioClip(0.9)),
    )
    x, shift = x.to(DEVICE), None if shift is None else shift.to(DEVICE)
    exact = transform(x) if shift is None else transform(x) - shift
    parts = transform.rotations, transform.permutations, transform.scale
    found = fused.rotated(x, quantizer, *parts, shift)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    step = quantizer.parameters(exact).scale
    off = (found.float() - quantizer.computed(exact, torch.float32)).abs() / step
    assert off.max() < 1.01
    assert (off > 0.05).float().mean() < 2e-3


@pytest.mark.parametrize("size", [16, 128])
def test_rotations_pass_the_trial_that_admits_them(size, monkeypatch):
    assert fused.rotation_trial(DEVICE, size)
    exact = fused.transformed
    monkeypatch.setattr(fused, "transformed", lambda *given: exact(*given) * (1 + 2**-12))
    assert not fused.rotation_trial(DEVICE, size)


def test_heads_are_rotated_as_they_lie():
    x, matrix = random(2, 5, 4, 32).transpose(1, 2).to(DEVICE), torch.linalg.qr(random(32, 32)).Q.to(DEVICE)
    quantizer = Quantizer(IntegerFormat(8))
    found = fused.rotated(x, quantizer, matrix[None])
    assert found.stride() == x.stride()
    torch.testing.assert_close(found, quantizer.computed(x @ matrix, x.dtype), rtol=0, atol=0.05)
