"""LayerState: flat, compact, and back again without losing a bit."""

import pytest
import torch
from conftest import tiny_config

from models import decoder_spec
from quantize.spec import DecoderSpec
from quantize.state import GroupState, LayerState


@pytest.fixture
def spec() -> DecoderSpec:
    return decoder_spec(tiny_config())


def make_state(spec: DecoderSpec, smooth=True, learned=True, pairs=2, dtype=torch.float32) -> LayerState:
    """A state with random content: `pairs` permutations of 48 channels in blocks of 16."""
    generator = torch.Generator().manual_seed(3)
    state = LayerState()
    for group in spec.groups:
        permutations = [torch.randperm(48, generator=generator) for _ in range(pairs)]
        state.groups[group.name] = GroupState(
            torch.rand(48, generator=generator).to(dtype) if smooth else None,
            torch.randn(pairs + 1, 16, 16, generator=generator).to(dtype),
            torch.stack(permutations) if pairs else torch.empty(0, 48, dtype=torch.int64),
        )
        for path in group.linears if learned else ():
            state.clips[path] = tuple(torch.randn(2, 10, 1, generator=generator))
    return state


def assert_same(one: LayerState, other: LayerState) -> None:
    assert list(one.groups) == list(other.groups)
    for name, group in one.groups.items():
        found = other.groups[name]
        assert (group.scale is None) == (found.scale is None)
        for a, b in ((group.rotations, found.rotations), (group.permutations, found.permutations)):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        if group.scale is not None:
            assert group.scale.dtype == found.scale.dtype
            assert torch.equal(group.scale, found.scale)
    assert one.clips.keys() == other.clips.keys()
    for path, pair in one.clips.items():
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(pair, other.clips[path], strict=True))


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("pairs", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_tensors_give_the_same_state_back_bit_for_bit(spec, smooth, learned, pairs, dtype):
    state = make_state(spec, smooth, learned, pairs, dtype)
    assert_same(LayerState.from_tensors(state.tensors(), spec), state)


def test_flat_tensors_are_compact_and_named_by_group_and_linear(spec):
    tensors = make_state(spec).tensors()
    assert tensors["groups.o.permutations"].dtype == torch.int32
    assert tensors["groups.o.rotations"].dtype == torch.float32
    assert {name.rsplit(".", 1)[0] for name in tensors if name.startswith("groups.")} == {
        f"groups.{group.name}" for group in spec.groups
    }
    paths = [path for group in spec.groups for path in group.linears]
    assert {name for name in tensors if name.startswith("clips.")} == {
        f"clips.{path}.{end}" for path in paths for end in ("low", "high")
    }


def test_a_missing_tensor_is_named(spec):
    tensors = make_state(spec).tensors()
    del tensors["groups.down.rotations"]
    with pytest.raises(KeyError, match=r"groups\.down\.rotations"):
        LayerState.from_tensors(tensors, spec)


def test_scales_are_those_of_smoothed_groups(spec):
    assert list(make_state(spec).scales) == ["qkv", "o", "gate_up", "down"]
    assert make_state(spec, smooth=False).scales == {}


def test_moving_to_a_device_keeps_the_content_and_moves_every_tensor(spec):
    state = make_state(spec)
    assert_same(state.to(torch.device("cpu")), state)
    moved = state.to(torch.device("meta"))
    tensors = [tensor for group in moved.groups.values() for tensor in (group.scale, group.rotations)]
    tensors += [group.permutations for group in moved.groups.values()]
    tensors += [tensor for pair in moved.clips.values() for tensor in pair]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert make_state(spec, smooth=False).to(torch.device("meta")).groups["o"].scale is None
