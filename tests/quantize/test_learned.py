"""The learned dual transformation: exact while it is trained, read out as plain tensors, and better than its start."""

import copy

import pytest
import torch
from best_settings import EXTRAS, best
from conftest import random_tokens
from families import logits, make_model, quantize, relative_error
from torch import nn

from duquant.formats import IntegerFormat
from duquant.quantizer import Quantizer, RatioClip
from duquant.scheme import TensorScheme
from quantize.bits import ClipSettings
from quantize.fake import _FakeQuantize, fake_quantize
from quantize.learned import LearnedGroup, LearnedLinear, rotation_of
from quantize.learning import token_distance
from quantize.refinements import Trained
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import GqaSmooth, TrainingSettings
from quantize.state import GroupState

TOKENS = random_tokens(6, 24).clamp(min=1)  # token 0 is padding, whose embedding is zeros
FAMILIES = ["llama", "qwen2", "phi3", "phi3, no GQA", "gemma2", "olmo2", "qwen3", "mixtral"]


def trained(epochs: int = 2, number: int = 4, **changes):
    return best(number, **{"training": TrainingSettings(Trained.TRANSFORM, epochs=epochs), **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_half_precision_is_learned_with_linears_that_wait_in_float32(dtype):
    _, layers = quantize(make_model("llama").to(dtype), trained(epochs=4, extras=EXTRAS["all"]), tokens=TOKENS)
    figures = [layer.figures["training"] for layer in layers.values()]
    before, after = (sum(each[f"loss_{when}"] for each in figures) for when in ("before", "after"))
    assert after < 0.95 * before


@pytest.mark.parametrize("how", [(False,), (True,), (True, True)], ids=["asymmetric", "symmetric", "all codes"])
def test_fake_quantization_is_that_of_the_quantizer(how):
    x, form = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)), IntegerFormat(4, *how)
    ratio = torch.tensor([0.8])
    assert torch.equal(fake_quantize(x, ratio, ratio, form), Quantizer(form, RatioClip(0.8))(x))


@pytest.mark.parametrize("how", [(False,), (True,), (True, True)], ids=["asymmetric", "symmetric", "all codes"])
def test_gradients_lead_to_the_ratios_that_a_search_finds(how):
    x, form = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)), IntegerFormat(4, *how)

    def loss(ratio: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(x, ratio, ratio, form) - x).square().mean()

    ratio = torch.tensor([0.99], requires_grad=True)
    optimizer = torch.optim.Adam([ratio], lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss(ratio).backward()
        optimizer.step()
    grid = torch.linspace(0.5, 1, 51)[:, None]
    searched = grid[torch.stack([loss(each) for each in grid]).argmin()]
    assert searched < 0.95
    assert abs(ratio.item() - searched.item()) < 0.04


def test_a_value_inside_its_range_passes_its_gradient_and_one_outside_does_not():
    x = torch.tensor([[-2.0, -0.3, 0.1, 0.7, 3.0]], requires_grad=True)
    _FakeQuantize.apply(x, torch.tensor([[-1.0]]), torch.tensor([[1.0]]), IntegerFormat(4)).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 1, 0]]


def test_what_is_learned_of_a_rotation_is_orthogonal():
    skew = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = rotation_of(skew)
    torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(8, dtype=torch.float64).expand(3, 8, 8))
    assert torch.equal(rotation_of(torch.zeros(4, 4)), torch.eye(4))


def test_a_group_computes_what_its_plain_tensors_do():
    """(x − m)Λ⁻¹ behind T, and W Λ behind T: their product is (x − m) Wᵀ whatever was learned."""
    generator = torch.Generator().manual_seed(3)
    rotations = torch.linalg.qr(torch.randn(2, 8, 8, generator=generator))[0]
    state = GroupState(torch.ones(24), rotations, torch.randperm(24, generator=generator)[None], torch.randn(24))
    group = LearnedGroup(state, torch.rand(24, generator=generator) + 0.5, TensorScheme(bits=16), None)
    with torch.no_grad():
        group.skews.normal_(generator=generator).mul_(0.3)
        group.log_scale.normal_(generator=generator).mul_(0.3)
        x, weight = torch.randn(5, 24, generator=generator), torch.randn(7, 24, generator=generator)
        product = group(x) @ group.orthogonal(weight * group.scale()).T
        torch.testing.assert_close(product, (x - group.mean) @ weight.T, rtol=1e-4, atol=1e-4)


def test_a_linear_is_learned_for_the_share_of_its_error_that_rounding_will_leave():
    state = GroupState(None, torch.eye(8)[None], torch.empty(0, 24, dtype=torch.int64))
    group, linear = LearnedGroup(state, None, TensorScheme(bits=16), None), nn.Linear(24, 7, bias=False)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact, half, whole = (
            LearnedLinear(linear, group, TensorScheme(bits=4), None, share)(x) for share in (0, 0.5, 1)
        )
        assert torch.allclose(exact, linear(x), atol=1e-6)
        assert (whole - exact).norm() / exact.norm() > 0.03
        torch.testing.assert_close(half - exact, 0.5 * (whole - exact), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_changes_nothing_but_the_rounding(name):
    """At 12 bits, with rates that turn everything far, every family computes what it did, but for what is clipped."""
    model = make_model(name)
    fast = TrainingSettings(Trained.TRANSFORM, epochs=2, rotation_rate=0.1, scale_rate=0.1)
    config = trained(number=12, training=fast)
    done, states = quantize(copy.deepcopy(model), config, tokens=TOKENS)
    assert relative_error(logits(done, TOKENS), logits(model, TOKENS)) < 0.04
    assert all(layer.figures["training"]["losses"] for layer in states.values())


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize("transform", [Transform.DUAL, Transform.PERMUTE_ROTATE])
def test_neither_does_it_where_heads_share_scales_and_channels_are_in_another_order(name, transform):
    model = make_model(name)
    fast = TrainingSettings(Trained.TRANSFORM, epochs=2, rotation_rate=0.1, scale_rate=0.1, fixed_input_clips=True)
    how = {"rotation": RotationSettings(block_size=4, steps=4), "extras": EXTRAS["all"], "transform": transform}
    config = trained(number=12, gqa=GqaSmooth.FOLD, training=fast, clip=ClipSettings(None, "search"), **how)
    done, layers = quantize(copy.deepcopy(model), config, tokens=TOKENS)
    assert relative_error(logits(done, TOKENS), logits(model, TOKENS)) < 0.04
    assert all(len(each.state.orders) == 2 * transform.orders_channels for each in layers.values())
    assert all(group.ratios is None for each in layers.values() for group in each.state.groups.values())
    again, _ = quantize(model, config, layers, tokens=TOKENS)
    assert torch.equal(logits(again, TOKENS), logits(done, TOKENS))


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_the_loss_falls_and_the_state_builds_the_same_bits(name):
    model = make_model(name)
    done, states = quantize(model, trained(epochs=6), tokens=TOKENS)
    for layer in states.values():
        report = layer.figures["training"]
        assert report["loss_after"] < report["loss_before"]
    again, decided = quantize(model, trained(epochs=6), states, tokens=TOKENS)
    assert not decided
    assert torch.equal(logits(again, TOKENS), logits(done, TOKENS))


def test_without_searched_ranges_weights_are_rounded_under_the_clips_that_were_trained():
    model, config = make_model("llama"), trained(clip=ClipSettings("search"))
    done, states = quantize(model, config, tokens=TOKENS)
    assert all(layer.state.clips for layer in states.values())
    again, _ = quantize(model, config, states, tokens=TOKENS)
    assert torch.equal(logits(again, TOKENS), logits(done, TOKENS))


def test_every_token_counts_by_its_own_length():
    target = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4))
    target[0, 0] *= 1000
    assert token_distance(1.1 * target, [target]).item() == pytest.approx(0.01, rel=1e-4)


def test_a_layer_is_left_without_parameters_that_learn():
    done, _ = quantize(make_model("llama"), trained(), tokens=TOKENS)
    assert not any(parameter.requires_grad for parameter in done.parameters())
    assert not any(isinstance(module, nn.Module) and "Learned" in type(module).__name__ for module in done.modules())
