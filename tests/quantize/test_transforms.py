"""The dual transformation: exact, invertible, and it lowers the probe's peak."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from duquant.hadamard import hadamard
from duquant.transform import DualTransform, rotate_blocks
from quantize.permutation import zigzag_permutation
from quantize.rotation_settings import RotationOrder, RotationSettings, SearchRule, Transform
from quantize.transforms import (
    TRANSFORMS,
    channel_peak,
    measure_stage,
    no_transform,
    search_dual_transform,
)

CHANNELS, BLOCK = 48, 12
TIMES = (0, 1, 2)


def outlier_probe(seed: int = 0) -> Tensor:
    """[2, 20, CHANNELS] with two channels of normal outliers and one massive entry."""
    x = torch.randn(2, 20, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[..., 5] *= 30
    x[..., 6] *= 20
    x[0, 3, 30] = 500
    return x


def online_scale(dtype: torch.dtype = torch.float32) -> Tensor:
    """What smoothing would divide the probe by."""
    return channel_peak(outlier_probe()).sqrt().to(dtype)


def search(times: int = 1, x: Tensor | None = None, **settings):
    config = RotationSettings(block_size=BLOCK, steps=40, permutation_times=times, **settings)
    x = outlier_probe() if x is None else x
    return search_dual_transform(x, BLOCK, config, torch.Generator().manual_seed(7))


def searched_transform(times: int, scale: Tensor | None = None, **settings) -> DualTransform:
    found = search(times, **settings)
    return DualTransform(found.rotations, found.permutations, scale)


def double_transform(times: int, scale: Tensor | None = None) -> DualTransform:
    """Random rotations that are orthogonal to float64's precision."""
    generator = torch.Generator().manual_seed(times)
    random = torch.randn(times + 1, BLOCK, BLOCK, dtype=torch.float64, generator=generator)
    permutations = [torch.randperm(CHANNELS, generator=generator) for _ in range(times)]
    stacked = torch.stack(permutations) if permutations else torch.empty(0, CHANNELS, dtype=torch.int64)
    return DualTransform(torch.linalg.qr(random).Q, stacked, scale)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def linear_output_error(transform: DualTransform, dtype: torch.dtype) -> float:
    x = outlier_probe(1).to(dtype)
    weight = torch.randn(16, CHANNELS, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return relative_error(F.linear(transform(x), transform.transform_weight(weight)), F.linear(x, weight))


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("order", RotationOrder)
@pytest.mark.parametrize("rule", SearchRule)
@pytest.mark.parametrize("times", TIMES)
def test_searched_transform_preserves_linear_outputs(times, rule, order, online):
    scale = online_scale() if online else None
    transform = searched_transform(times, scale, rule=rule, order=order)
    assert linear_output_error(transform, torch.float32) < 1e-5
    assert linear_output_error(transform, torch.float64) < 3e-7  # what rounding R̂ to float32 leaves


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("times", TIMES)
def test_transform_is_exact_to_the_precision_of_its_rotations(times, online):
    scale = online_scale(torch.float64) if online else None
    assert linear_output_error(double_transform(times, scale), torch.float64) < 1e-14


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("times", TIMES)
def test_inverse_undoes_forward(times, online):
    scale = online_scale(torch.float64) if online else None
    x = outlier_probe().double()
    exact = double_transform(times, scale)
    torch.testing.assert_close(exact.inverse(exact(x)), x, atol=1e-12, rtol=0)
    torch.testing.assert_close(exact(exact.inverse(x)), x, atol=1e-12, rtol=0)
    found = searched_transform(times, scale)
    torch.testing.assert_close(found.inverse(found(x)), x, atol=1e-6 * x.abs().max().item(), rtol=0)


@pytest.mark.parametrize("times", TIMES)
def test_dense_is_orthogonal_and_does_what_forward_does(times):
    transform, x = searched_transform(times), outlier_probe()
    dense = transform.dense().double()
    torch.testing.assert_close(dense @ dense.T, torch.eye(CHANNELS, dtype=torch.float64), atol=1e-6, rtol=0)
    assert relative_error(transform(x).double(), x.double() @ dense) < 1e-6


@pytest.mark.parametrize("times", TIMES)
def test_dense_is_the_product_of_the_parts_in_order(times):
    transform = searched_transform(times)
    expected = torch.eye(CHANNELS, dtype=torch.float64)
    for index, rotation in enumerate(transform.rotations.double()):
        expected = expected @ torch.block_diag(*[rotation] * (CHANNELS // BLOCK))
        if index < times:
            expected = expected @ torch.eye(CHANNELS, dtype=torch.float64)[:, transform.permutations[index]]
    torch.testing.assert_close(transform.dense().double(), expected, atol=1e-6, rtol=0)


def test_every_block_is_rotated_alike():
    rotation = double_transform(0).rotations[0]
    x = outlier_probe().double()
    expected = torch.cat([block @ rotation for block in x.split(BLOCK, dim=-1)], dim=-1)
    torch.testing.assert_close(rotate_blocks(x, rotation), expected, atol=1e-10, rtol=0)


def test_an_online_scale_divides_activations_and_multiplies_weights():
    scale = torch.logspace(-1, 1, CHANNELS, dtype=torch.float64)
    plain, scaled = double_transform(1), double_transform(1, scale)
    x = outlier_probe().double()
    torch.testing.assert_close(scaled(x), plain(x / scale), atol=1e-12, rtol=0)
    torch.testing.assert_close(scaled.transform_weight(x[0]), plain(x[0] * scale), atol=1e-10, rtol=0)
    torch.testing.assert_close(scaled.dense(), plain.dense(), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_is_done(dtype):
    transform = searched_transform(1, torch.logspace(-1, 1, CHANNELS))
    x = outlier_probe().to(dtype)
    for method in (transform.forward, transform.inverse, transform.transform_weight):
        assert torch.equal(method(x), method(x.float()))
        assert method(x).dtype == torch.float32


def test_transforms_leave_their_inputs_alone():
    transform = searched_transform(1, torch.logspace(-1, 1, CHANNELS))
    identity = DualTransform(torch.empty(0, 1, 1), torch.empty(0, CHANNELS, dtype=torch.int64))
    x = outlier_probe()
    before = x.clone()
    for module in (transform, identity):
        module(x)
        module.inverse(x)
        module.transform_weight(x[0])
    search(2, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(CHANNELS,), (3, CHANNELS), (2, 3, CHANNELS)])
def test_any_number_of_leading_axes_will_do(shape):
    transform = double_transform(2)
    x = torch.randn(shape, dtype=torch.float64)
    expected = x @ transform.dense().double()
    torch.testing.assert_close(transform(x), expected, atol=1e-6, rtol=0)


def test_views_are_transformed_like_their_copies():
    transform = double_transform(1)
    x = torch.randn(2, CHANNELS, 5, dtype=torch.float64).transpose(1, 2)
    assert torch.equal(transform(x), transform(x.contiguous()))


def test_no_transform_is_the_identity():
    x = outlier_probe()
    found = no_transform(x, 1, RotationSettings(), torch.Generator())
    transform = DualTransform(found.rotations, found.permutations)
    assert torch.equal(transform(x), x)
    assert torch.equal(transform.inverse(x), x)
    assert torch.equal(transform.transform_weight(x[0]), x[0])
    assert torch.equal(transform.dense(), torch.eye(CHANNELS))
    assert (found.stages, found.steps) == ((), ())


def test_every_transform_on_the_command_line_has_a_builder():
    assert set(TRANSFORMS) == set(Transform)


def found_by(transform: Transform, x: Tensor | None = None, times: int = 1, seed: int = 7):
    config = RotationSettings(block_size=BLOCK, steps=40, permutation_times=times)
    x = outlier_probe() if x is None else x
    return TRANSFORMS[transform](x, BLOCK, config, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("transform", Transform)
@pytest.mark.parametrize("times", TIMES)
def test_every_transform_preserves_linear_outputs_and_can_be_undone(transform, times):
    found = found_by(transform, times=times)
    assert len(found.rotations) == (0 if transform is Transform.NONE else len(found.permutations) + 1)
    assert len(found.permutations) == transform.permutations(times)
    made, x = DualTransform(found.rotations, found.permutations, online_scale()), outlier_probe().double()
    assert linear_output_error(made, torch.float64) < 3e-7
    torch.testing.assert_close(made.inverse(made(x)), x, atol=1e-6 * x.abs().max().item(), rtol=0)


def test_parts_of_the_dual_transformation_are_its_first_ones():
    dual, pair, rotation = map(found_by, (Transform.DUAL, Transform.ROTATION_PERMUTATION, Transform.ROTATION))
    identity = torch.eye(BLOCK)
    assert torch.equal(pair.rotations, torch.stack([dual.rotations[0], identity]))
    assert torch.equal(pair.permutations, dual.permutations)
    assert torch.equal(rotation.rotations, dual.rotations[:1])
    assert (pair.stages, rotation.stages) == (dual.stages[:2], dual.stages[:1])
    assert (pair.steps, rotation.steps) == (dual.steps[:1], dual.steps[:1])


def test_the_permutation_alone_moves_channels_and_nothing_else():
    found, x = found_by(Transform.PERMUTATION), outlier_probe()
    assert torch.equal(found.rotations, torch.eye(BLOCK).expand(2, BLOCK, BLOCK))
    assert torch.equal(found.permutations[0], zigzag_permutation(channel_peak(x), BLOCK))
    assert torch.equal(DualTransform(found.rotations, found.permutations)(x), x[..., found.permutations[0]])
    assert found.stages[0].peak == x.abs().max()


def test_the_hadamard_transform_has_entries_of_one_magnitude_and_signs_of_the_generator():
    found = found_by(Transform.HADAMARD)
    assert found.rotations.shape == (1, BLOCK, BLOCK)
    torch.testing.assert_close(found.rotations.abs(), torch.full((1, BLOCK, BLOCK), BLOCK**-0.5))
    assert torch.equal(found.rotations, found_by(Transform.HADAMARD, x=torch.randn(3, CHANNELS)).rotations)
    assert not torch.equal(found.rotations, found_by(Transform.HADAMARD, seed=8).rotations)
    assert found.stages[0].peak < measure_stage("input", outlier_probe(), BLOCK).peak


def test_random_signs_keep_a_row_of_the_hadamard_matrix_from_becoming_one_entry():
    row = hadamard(BLOCK)[3].repeat(CHANNELS // BLOCK)[None]
    assert rotate_blocks(row, hadamard(BLOCK).T).max() == pytest.approx(1)
    assert found_by(Transform.HADAMARD, row).stages[0].peak < 0.9


@pytest.mark.parametrize("times", TIMES)
def test_search_reports_every_stage_and_the_steps_of_every_rotation(times):
    found = search(times)
    names = [name for index in range(1, times + 1) for name in (f"rotation {index}", f"permutation {index}")]
    assert [stage.name for stage in found.stages] == [*names, f"rotation {times + 1}"]
    assert found.rotations.shape == (times + 1, BLOCK, BLOCK)
    assert found.permutations.shape == (times, CHANNELS)
    assert len(found.steps) == times + 1
    assert all(0 <= steps <= 40 for steps in found.steps)
    assert found.steps[0] > 0


@pytest.mark.parametrize("times", TIMES)
def test_reported_stages_are_those_of_the_transformed_probe(times):
    found, x = search(times), outlier_probe()
    last = measure_stage("last", DualTransform(found.rotations, found.permutations)(x), BLOCK)
    assert found.stages[-1].peak == pytest.approx(last.peak, rel=1e-5)
    assert found.stages[-1].spread == pytest.approx(last.spread, rel=1e-5)


@pytest.mark.parametrize("order", RotationOrder)
@pytest.mark.parametrize("rule", SearchRule)
def test_search_lowers_the_peak_of_an_activation_with_outliers(rule, order):
    found = search(1, rule=rule, order=order)
    peak = outlier_probe().abs().max().item()
    rotated, permuted, last = (stage.peak for stage in found.stages)
    assert rotated < 0.5 * peak  # an entry v spreads to v/√12 = 0.29 v at best
    assert permuted == rotated
    assert last <= permuted


def test_permutation_evens_out_what_the_blocks_hold():
    rotated, permuted, _ = search(1).stages
    assert rotated.spread > 1.5
    assert permuted.spread < 1.2


def test_search_is_a_function_of_the_probe_and_the_generator():
    first = search(1)
    torch.manual_seed(123)
    again = search(1)
    assert torch.equal(first.rotations, again.rotations)
    assert torch.equal(first.permutations, again.permutations)
    config = RotationSettings(block_size=BLOCK, steps=40)
    other = search_dual_transform(outlier_probe(), BLOCK, config, torch.Generator().manual_seed(8))
    assert not torch.equal(first.rotations, other.rotations)


def test_the_search_of_a_half_precision_probe_runs_in_float32():
    x = outlier_probe().half()
    assert torch.equal(search(1, x).rotations, search(1, x.float()).rotations)
    assert search(1, x).rotations.dtype == torch.float32


def test_blocks_of_one_channel_are_possible():
    """A prime width under `--block_size auto`."""
    x = torch.randn(6, 7)
    found = search_dual_transform(x, 1, RotationSettings(steps=3), torch.Generator().manual_seed(0))
    transform = DualTransform(found.rotations, found.permutations)
    torch.testing.assert_close(transform.inverse(transform(x)), x)


def test_stage_figures_on_a_worked_example():
    x = torch.tensor([[1.0, -6.0, 0.0, 2.0], [-3.0, 1.0, 1.0, -1.0]])  # channel peaks 3, 6, 1, 2
    assert channel_peak(x).tolist() == [3.0, 6.0, 1.0, 2.0]
    stage = measure_stage("x", x, 2)
    assert (stage.name, stage.peak) == ("x", 6.0)
    assert stage.spread == pytest.approx(4.5 / 3.0)


def test_stage_figures_of_zeros_are_finite():
    stage = measure_stage("zeros", torch.zeros(2, 4), 2)
    assert (stage.peak, stage.spread) == (0.0, 0.0)
