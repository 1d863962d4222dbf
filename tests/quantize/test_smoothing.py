"""Smoothing: the scale's formula, and folding it without changing what the layer computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.smoothing import column_peak, divide_norm_, divide_rows_, scale_columns_, smoothing_scale
from quantize.spec import SharedRows

HALVES = (torch.float16, torch.bfloat16)


class Norm(nn.Module):
    """An RMSNorm, with a bias if asked for."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x * x.square().mean(dim=-1, keepdim=True).rsqrt() * self.weight
        return y + self.bias if hasattr(self, "bias") else y


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(inputs: int, outputs: int, bias: bool, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def some_scale(channels: int) -> Tensor:
    return torch.logspace(-1.9, 2.5, channels)


def test_scale_is_activation_peak_over_weight_peak_with_the_exponents():
    x_peak, w_peak = torch.tensor([16.0, 100.0]), torch.tensor([0.25, 0.01])
    torch.testing.assert_close(smoothing_scale(x_peak, w_peak, 0.5), torch.tensor([8.0, 100.0]))
    torch.testing.assert_close(smoothing_scale(x_peak, w_peak, 0.75), torch.tensor([8 * 2**0.5, 100.0]))


def test_alpha_zero_looks_at_weights_only_and_alpha_one_at_activations_only():
    x_peak, w_peak = torch.tensor([16.0, 100.0]), torch.tensor([0.25, 0.01])
    torch.testing.assert_close(smoothing_scale(x_peak, w_peak, 0.0), 1 / w_peak)
    torch.testing.assert_close(smoothing_scale(x_peak, w_peak, 1.0), x_peak)


def test_dead_channels_count_as_peaks_of_1e_5():
    zero, one = torch.zeros(1), torch.ones(1)
    assert smoothing_scale(zero, torch.tensor([1e-5]), 0.5).item() == pytest.approx(1.0)
    assert smoothing_scale(one, zero, 0.5).item() == pytest.approx(1e5**0.5)
    assert smoothing_scale(zero, zero, 0.5).item() == pytest.approx(1.0)
    assert smoothing_scale(one, zero, 0.0).item() == pytest.approx(1e5)


def test_no_scale_is_below_one_hundredth():
    assert smoothing_scale(torch.tensor([1e-5]), torch.ones(1), 1.0).item() == pytest.approx(1e-2)
    assert smoothing_scale(torch.tensor([0.02]), torch.ones(1), 1.0).item() == pytest.approx(2e-2)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_scale_is_computed_in_float32(dtype):
    peaks = torch.tensor([3.0, 0.5], dtype=dtype)
    assert smoothing_scale(peaks, peaks, 0.3).dtype == torch.float32
    torch.testing.assert_close(smoothing_scale(peaks, peaks, 0.3), smoothing_scale(peaks.float(), peaks.float(), 0.3))


def test_column_peak_is_over_all_rows_of_all_weights():
    first, second = torch.tensor([[1.0, -5.0], [2.0, 0.0]]), torch.tensor([[-3.0, 4.0]])
    assert column_peak([first]).tolist() == [2.0, 5.0]
    assert column_peak([first, second]).tolist() == [3.0, 5.0]


@pytest.mark.parametrize("norm_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_into_a_norm_keeps_the_outputs(bias, norm_bias):
    x = torch.randn(5, 12, dtype=torch.float64, generator=generator())
    weight = torch.rand(12, dtype=torch.float64, generator=generator(1)) + 0.5
    norm = Norm(weight, weight - 1 if norm_bias else None)
    linears = [linear(12, 7, bias, seed) for seed in (1, 2)]
    before, scale = [layer(norm(x)) for layer in linears], some_scale(12)
    scale_columns_(linears, divide_norm_(norm, scale))
    for layer, expected in zip(linears, before, strict=True):
        torch.testing.assert_close(layer(norm(x)), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(norm.weight, weight / scale.double(), atol=0, rtol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_folding_into_a_gated_linear_keeps_the_outputs(bias):
    x = torch.randn(5, 6, dtype=torch.float64, generator=generator())
    up, gate, down = linear(6, 12, bias, 1), linear(6, 12, bias, 2), linear(12, 6, bias, 3)
    before = down(F.silu(gate(x)) * up(x))
    rows, scale = up.weight.clone(), some_scale(12)
    scale_columns_([down], divide_rows_(up, scale))
    torch.testing.assert_close(down(F.silu(gate(x)) * up(x)), before, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(up.weight, rows / scale.double()[:, None], atol=0, rtol=1e-12)


def test_no_bias_is_created():
    norm, up, down = Norm(torch.ones(4)), linear(4, 4, False), linear(4, 4, False)
    scale_columns_([down], divide_norm_(norm, torch.full((4,), 2.0)))
    divide_rows_(up, torch.full((4,), 2.0))
    assert up.bias is None
    assert down.bias is None
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_rounded_norm_weight_is_made_up_for_by_the_returned_scale(dtype):
    weight = torch.rand(64, generator=generator()).add(0.1).to(dtype)
    norm, asked = Norm(weight.clone()), some_scale(64)
    scale = divide_norm_(norm, asked)
    assert norm.weight.dtype == dtype
    assert scale.dtype == torch.float32
    torch.testing.assert_close(norm.weight.float() * scale, weight.float(), atol=0, rtol=2e-7)
    torch.testing.assert_close(scale, asked, atol=0, rtol=2 * torch.finfo(dtype).eps)
    assert not torch.equal(scale, asked), "nothing was rounded, so nothing was shown"


@pytest.mark.parametrize(
    ("weight", "scale"),
    [(1e-4, 1e5), (60000.0, 1e-2), (0.0, 3.0)],
    ids=["underflow", "overflow", "zero weight"],
)
def test_channels_that_the_norm_s_dtype_cannot_hold_are_left_alone(weight, scale):
    weights = torch.tensor([weight, 0.75], dtype=torch.float16)
    norm = Norm(weights.clone())
    found = divide_norm_(norm, torch.tensor([scale, 4.0]))
    assert found.tolist() == [1.0, 4.0]
    assert norm.weight.tolist() == [weights[0].item(), 0.75 / 4]


def test_subnormal_quotients_keep_the_product_exact():
    weight = torch.tensor([3e-3], dtype=torch.float16)
    norm = Norm(weight.clone())
    scale = divide_norm_(norm, torch.tensor([2e4]))  # 1.5e-7 is 2.5 steps of float16's subnormals
    assert norm.weight.item() != 0
    torch.testing.assert_close(norm.weight.float() * scale, weight.float(), atol=0, rtol=2e-7)


def test_the_caller_s_tensors_are_left_alone():
    """Folding changes modules, never a tensor that somebody else may hold: the scale, or the old weight."""
    norm, up, down = Norm(torch.ones(3)), linear(3, 3, True), linear(3, 3, True)
    scale = torch.tensor([2.0, 4.0, 8.0])
    held = [scale, norm.weight.data, up.weight.data, up.bias.data, down.weight.data, down.bias.data]
    before = [tensor.clone() for tensor in held]
    divide_norm_(norm, scale)
    divide_rows_(up, scale)
    scale_columns_([down], scale)
    assert all(torch.equal(tensor, old) for tensor, old in zip(held, before, strict=True))
    assert torch.equal(down.bias, before[-1])


class OffsetNorm(Norm):
    """Gemma's: the gain is 1 + weight, and computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * x.float().square().mean(dim=-1, keepdim=True).rsqrt()
        return (y * (1.0 + self.weight.float())).type_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_into_a_norm_with_an_offset_keeps_the_outputs(dtype):
    x = torch.randn(5, 12, dtype=dtype, generator=generator())
    weight = torch.rand(12, dtype=dtype, generator=generator(1)) - 0.5
    norm, reader, scale = OffsetNorm(weight.clone()), linear(12, 7, False, dtype=dtype), some_scale(12)
    before = reader(norm(x))
    scale_columns_([reader], divide_norm_(norm, scale, offset=1.0))
    torch.testing.assert_close(reader(norm(x)), before, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(1 + norm.weight.float(), ((1 + weight) / scale).float(), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_gain_beside_an_offset_never_vanishes_in_half_precision(dtype):
    """A scale of 100000 asks for a weight that rounds to −1, a gain of 0: the smallest gain there is has to do."""
    norm = OffsetNorm(torch.tensor([0.25, 0.25, -1.0, 3.0], dtype=dtype))
    scale = divide_norm_(norm, torch.tensor([1e5, 2.0, 1e5, 4.0]), offset=1.0)
    step = torch.finfo(dtype).eps / 2
    assert (1 + norm.weight.float()).tolist() == [step, 0.625, 0.0, 1.0]
    assert scale.tolist() == [1.25 / step, 2.0, 1.0, 4.0]


@pytest.mark.parametrize("bias", [False, True])
def test_folding_into_some_rows_leaves_the_others_alone(bias):
    fused, scale = linear(6, 12, bias), some_scale(4)
    weight, before = fused.weight.clone(), fused.bias.clone() if bias else None
    divide_rows_(fused, scale, start=5)
    expected = torch.ones(12, dtype=torch.float64)
    expected[5:9] = 1 / scale.double()
    torch.testing.assert_close(fused.weight, weight * expected[:, None], atol=0, rtol=1e-12)
    if bias:
        torch.testing.assert_close(fused.bias, before * expected, atol=0, rtol=1e-12)


def test_query_heads_of_one_kv_head_share_the_largest_peaks_and_fold_into_its_rows():
    """Three query heads read each of two kv heads of four channels."""
    rows = SharedRows("", heads=3, head_dim=4)
    peak = torch.rand(24, generator=generator())
    shared = rows.share(peak).view(2, 3, 4)
    for kv_head in range(2):
        for head in range(3):
            assert torch.equal(shared[kv_head, head], peak.view(2, 3, 4)[kv_head].amax(dim=0))
    value, scale = linear(5, 8, True), shared.reshape(-1)
    x = torch.randn(7, 5, dtype=torch.float64, generator=generator(2))
    repeated = value(x).view(7, 2, 1, 4).expand(7, 2, 3, 4).reshape(7, 24)
    assert rows.absorb_(value, scale) is scale
    divided = value(x).view(7, 2, 1, 4).expand(7, 2, 3, 4).reshape(7, 24)
    torch.testing.assert_close(divided * scale, repeated, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", HALVES)
def test_columns_of_a_half_precision_reader_are_multiplied_in_float32(dtype):
    router = Norm(torch.rand(3, 8, generator=generator()).to(dtype))
    weight, scale = router.weight.clone(), some_scale(8)
    scale_columns_([router], scale)
    assert torch.equal(router.weight, (weight.float() * scale).to(dtype))
