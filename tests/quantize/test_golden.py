"""Parity with the original method's arithmetic. The same properties are held without the files by the other tests."""

import pytest
import torch
from safetensors.torch import load_file

from duquant.formats import IntegerFormat
from duquant.quantizer import NoClip, Quantizer, RatioClip
from duquant.transform import DualTransform, rotate_blocks
from quantize.greedy import greedy_rotation
from quantize.permutation import zigzag_permutation
from quantize.rotation import base_rotation, step_rotation
from quantize.rotation_settings import RotationOrder, SearchRule
from quantize.training import LearnedClip
from quantize.transforms import channel_peak

# settings of the vectors in fake_quant.safetensors, by name: bits, symmetric, clip (by number of rows), group size
FAKE_QUANT = {
    "a4": (4, False, lambda rows: NoClip(), None),
    "a4_lac09": (4, False, lambda rows: RatioClip(0.9), None),
    "w4_swc08": (4, False, lambda rows: RatioClip(0.8), None),
    "w4_sym": (4, True, lambda rows: NoClip(), None),
    "w4_g32": (4, False, lambda rows: NoClip(), 32),
    "w2": (2, False, lambda rows: NoClip(), None),
    "w3": (3, False, lambda rows: NoClip(), None),
    "w6": (6, False, lambda rows: NoClip(), None),
    "w8": (8, False, lambda rows: NoClip(), None),
    "w4_lwc": (4, False, lambda rows: LearnedClip((rows, 1)), None),
}
STEPS = {"dual_transform_0": 64, "dual_transform_1": 128, "dual_transform_2": 32}
DEFAULT_STEPS = 256  # of files of the same form that do not say


def test_base_rotations_match(golden_dir):
    vectors = load_file(golden_dir / "base_rotation.safetensors")
    assert vectors
    for name, expected in vectors.items():
        torch.testing.assert_close(base_rotation(int(name.removeprefix("base_"))), expected, atol=1e-6, rtol=0)


def test_fake_quantization_matches(golden_dir):
    vectors = load_file(golden_dir / "fake_quant.safetensors")
    x = vectors.pop("x")
    assert set(vectors) <= set(FAKE_QUANT), "vectors of settings this test does not know"
    for name, expected in vectors.items():
        bits, symmetric, clip, group_size = FAKE_QUANT[name]
        quantizer = Quantizer(IntegerFormat(bits, symmetric), clip(len(x)), group_size)
        torch.testing.assert_close(
            quantizer(x).detach(), expected, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_dual_transforms_match(golden_dir):
    paths = sorted(golden_dir.glob("dual_transform_*.safetensors"))
    assert paths
    for path in paths:
        check_dual_transform(load_file(path), STEPS.get(path.stem, DEFAULT_STEPS))


def check_dual_transform(vectors: dict[str, torch.Tensor], steps: int) -> None:
    x = vectors["x"]
    first, first_rotation = replay(x, vectors["q1"], steps)
    assert first.exchanges.tolist() == (vectors["exchange_1"] % len(first_rotation)).tolist()
    torch.testing.assert_close(first.rotation, vectors["rotation_1"], atol=1e-4, rtol=0)
    rotated = rotate_blocks(x, first.rotation)
    torch.testing.assert_close(rotated, vectors["after_rotation_1"], **relative_to_peak(vectors["after_rotation_1"]))

    permutation = zigzag_permutation(channel_peak(rotated), len(first_rotation))
    assert permutation.tolist() == vectors["permutation"].tolist()

    second, _ = replay(rotated[..., permutation], vectors["q2"], steps)
    assert second.exchanges.tolist() == (vectors["exchange_2"] % len(first_rotation)).tolist()
    torch.testing.assert_close(second.rotation, vectors["rotation_2"], atol=1e-4, rtol=0)
    transform = DualTransform(torch.stack([first.rotation, second.rotation]), permutation[None])
    torch.testing.assert_close(transform(x), vectors["y"], **relative_to_peak(vectors["y"]))
    expected = vectors["w_transformed"]
    torch.testing.assert_close(transform.transform_weight(vectors["w"]), expected, **relative_to_peak(expected))


def replay(x: torch.Tensor, q: torch.Tensor, steps: int):
    """The search of the vectors: row rule, order R̃Q, with their random orthogonal matrix."""
    random = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), q.double())
    step = step_rotation(random, RotationOrder.RQ)
    return greedy_rotation(x, step, steps, SearchRule.ROW), step


def relative_to_peak(expected: torch.Tensor) -> dict[str, float]:
    """Tolerance of 1e-3 of the largest value."""
    return {"atol": 1e-3 * expected.abs().max().item(), "rtol": 0}


@pytest.mark.parametrize("name", ["rotation_1", "rotation_2"])
def test_golden_rotations_are_orthogonal(golden_dir, name):
    for path in golden_dir.glob("dual_transform_*.safetensors"):
        rotation = load_file(path)[name]
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(rotation)), atol=1e-4, rtol=0)
