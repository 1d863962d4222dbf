"""What goes beyond the paper, on every family: exact before rounding, better behind it, and kept to the bit."""

from dataclasses import replace

import pytest
import torch
from best_settings import BALANCED, EXTRAS, GPTQ, best
from conftest import random_tokens
from families import CASES, CPU, TOKENS, logits, make_model, quantize, relative_error, reload, save, settings
from torch import nn

from models import decoder_spec
from quantize.bits import BitSettings, ClipSettings
from quantize.checkpoint import Checkpoint
from quantize.layer import GroupReport
from quantize.refinements import ExtraSettings, Rounding, RoundingSettings
from quantize.rotation_settings import Transform
from quantize.settings import GqaSmooth, Probe, QuantSettings, SmoothMeasure, SmoothSettings, TrainingSettings
from quantize.sizes import checkpoint_bytes
from quantize.state import LayerState
from utils.errors import InputError

SEEN = TOKENS.clamp(min=3)  # without the padding token: of its embedding, zero, any error is infinitely large
TWELVE = 12  # bits that show what is not exact, and next to nothing of rounding
EXACT = 0.03
every_family = pytest.mark.parametrize("family", CASES)

ALONE = {
    **{name: {"extras": extras} for name, extras in EXTRAS.items()},
    "energy": {"smooth": SmoothSettings(0.5, measure=SmoothMeasure.ENERGY)},
    "energy, folded": {"smooth": SmoothSettings(0.5, gqa=GqaSmooth.FOLD, measure=SmoothMeasure.ENERGY)},
    "peaks": {"probe": Probe.PEAKS, "probe_tokens": 5},
    "gptq": {"rounding": RoundingSettings(Rounding.GPTQ)},
    "gptq, target": {"rounding": GPTQ},
    "searched weights": {"clip": ClipSettings(None, "search")},
    "searched inputs": {"clip": ClipSettings("search")},
    "two_hadamard": {"transform": Transform.TWO_HADAMARD},
}
TOGETHER = {
    "best": best(TWELVE),
    "all": best(TWELVE, GqaSmooth.FOLD, extras=EXTRAS["all"], transform=Transform.TWO_HADAMARD),
    "groups": best(bits=BitSettings(TWELVE, TWELVE, group_size=8, act_group_size=16)),
    "no transform": best(TWELVE, transform=Transform.NONE, extras=ExtraSettings(True, True, True, True)),
}


def error_of(model: nn.Module, config: QuantSettings) -> float:
    quantized, _ = quantize(model, config, tokens=SEEN)
    return relative_error(logits(quantized, SEEN), logits(model, SEEN))


@every_family
@pytest.mark.parametrize("name", ALONE)
def test_nothing_by_itself_changes_what_a_family_computes(family, name):
    assert error_of(make_model(family), settings(TWELVE, **ALONE[name])) < EXACT


@every_family
@pytest.mark.parametrize("name", TOGETHER)
def test_nothing_together_changes_what_a_family_computes(family, name):
    assert error_of(make_model(family), TOGETHER[name]) < EXACT


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2", "mixtral"])
@pytest.mark.parametrize("bits", [(16, 4), (4, 16), (16, 16)], ids=str)
def test_a_side_at_16_bits_is_left_alone(family, bits):
    model = make_model(family)
    roles = dict.fromkeys(("query", "key", "value"), 16)
    quantized, _ = quantize(model, best(bits=BitSettings(*bits, **roles), extras=EXTRAS["all"]), tokens=SEEN)
    error = relative_error(logits(quantized, SEEN), logits(model, SEEN))
    assert (error < 1e-4) == (bits == (16, 16))
    assert error < 0.5


@every_family
def test_four_bits_have_a_smaller_error_with_all_of_it(family):
    model, plain = make_model(family), settings(4)
    ratio = error_of(model, best(4)) / error_of(model, plain)
    assert ratio < (1.1 if family == "gemma2" else 0.95)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "mixtral"])
def test_half_precision_stays_half_precision_and_comes_close(family, dtype):
    model = make_model(family)
    expected = logits(model, SEEN)
    half, _ = quantize(model.to(dtype), best(8, extras=EXTRAS["all"]), tokens=SEEN)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert relative_error(logits(half, SEEN).float(), expected) < 0.15


KEPT = {
    "best": best(),
    "all, trained": best(
        extras=EXTRAS["all"], clip=ClipSettings("search"), training=TrainingSettings(epochs=1), gqa=GqaSmooth.FOLD
    ),
    "groups": best(bits=BitSettings(4, 4, group_size=8, symmetric=True), extras=EXTRAS["balanced values"]),
    "ten bits": best(10, rounding=RoundingSettings(), transform=Transform.TWO_HADAMARD),
}


@every_family
@pytest.mark.parametrize("name", KEPT)
def test_a_resumed_and_a_saved_model_give_the_same_logits_to_the_bit(family, name, model_folder, tmp_path):
    model, config = make_model(family), KEPT[name]
    spec = decoder_spec(model.config)
    quantized, layers = quantize(model, config)
    expected = checkpoint_bytes(model, spec, config)
    with_files = Checkpoint.create(tmp_path / "kept", {"of": family}, family, expected)
    for index, done in layers.items():
        with_files.layer_done(index, done, restored=False)
    written = sum(path.stat().st_size for path in (tmp_path / "kept/layers").iterdir())
    assert written <= expected <= written + 2 * 2**16
    kept = with_files.finished(2, spec)
    for count in (1, 2):
        resumed, computed = quantize(model, config, {index: kept[index] for index in range(count)})
        assert computed.keys() == {0, 1} - set(range(count))
        assert torch.equal(logits(resumed), logits(quantized))
        assert_same_tensors(resumed, quantized)
    save(tmp_path / "saved", quantized, config, model_folder)
    loaded, saved = reload(tmp_path / "saved")
    assert saved == config
    assert torch.equal(logits(loaded), logits(quantized))
    assert_same_tensors(loaded, quantized)


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_every_tensor_of_a_state_goes_into_a_file_and_comes_back():
    model = make_model("llama")
    _, layers = quantize(model, best(extras=EXTRAS["all"]))
    spec, state = decoder_spec(model.config), layers[0].state
    tensors = state.tensors()
    groups = {f"groups.{group.name}.{part}" for group in spec.groups for part in ("shift", "ratios", "scale")}
    paths = [path for group in spec.groups for path in group.linears]
    codes = {f"weights.{path}.{part}" for path in paths for part in ("values", "scale", "zero")}
    heads = {"matrix", "key_matrix", "key.mean", "value.mean"}
    heads |= {f"{role}.clip.ratios" for role in ("query", "key", "value")}
    assert tensors.keys() >= groups | codes | {f"attention.{name}" for name in heads} | {"values"}
    back = LayerState.from_tensors(tensors, spec)
    again = back.to(CPU).tensors()
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], each) and again[name].dtype == each.dtype for name, each in tensors.items())
    moved = state.to(torch.device("meta"))
    assert {each.device.type for _, each in moved._named()} == {"meta"}


@every_family
def test_generation_with_a_cache_is_generation_without(family):
    model, _ = quantize(make_model(family, torch.float64), best(extras=EXTRAS["all"]), tokens=SEEN)
    prompt, cache, steps = random_tokens(2, 12, seed=5).clamp(min=3), None, []
    expected = logits(model, prompt)
    with torch.no_grad():
        for part in (prompt[:, :7], *prompt[:, 7:].split(1, dim=1)):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert relative_error(torch.cat(steps, dim=1), expected) < 1e-5


def test_quantizing_twice_gives_the_same_to_the_bit():
    model = make_model("llama")
    first, second = (quantize(model, best())[0] for _ in range(2))
    assert_same_tensors(first, second)


def test_the_figures_tell_the_clip_that_was_searched():
    _, layers = quantize(make_model("llama"), best())
    _, without = quantize(make_model("llama"), settings())
    for done in layers.values():
        assert all(0.6 < group["clip"] <= 1 for group in done.figures["groups"])
    assert all(group["clip"] is None for group in without[0].figures["groups"])
    assert GroupReport("qkv", 16, "none", (), ()).clip is None


def test_the_target_moves_the_weights_towards_the_full_precision_output():
    model = make_model("llama")
    found = [quantize(model, best(rounding=replace(GPTQ, target=target)))[0] for target in (0.0, 0.5, 1.0)]
    weights = [each.model.layers[1].mlp.down_proj.weight for each in found]
    assert 0 < (weights[1] - weights[0]).norm() < (weights[2] - weights[0]).norm()


def test_codes_depend_on_samples_and_are_then_part_of_the_state():
    model = make_model("llama")
    weights_alone = replace(settings(rounding=GPTQ), bits=BitSettings(16, 4))
    for config in (settings(), settings(clip=ClipSettings("search")), weights_alone):
        _, layers = quantize(model, config)
        assert layers[0].state.weights == {}
    for config in (settings(rounding=RoundingSettings(Rounding.GPTQ)), settings(clip=ClipSettings(None, "search"))):
        _, layers = quantize(model, config)
        assert len(layers[0].state.weights) == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoundingSettings(damping=0.0), "--gptq_damping 0"),
        (lambda: RoundingSettings(damping=1.5), "--gptq_damping 1.5"),
        (lambda: RoundingSettings(target=-0.1), "--gptq_target -0.1"),
        (lambda: RoundingSettings(target=float("nan")), "--gptq_target nan"),
        (lambda: ClipSettings("serch"), "--lac serch"),
        (lambda: ClipSettings(None, "serch"), "--swc serch"),
        (lambda: best(probe_tokens=0), "--probe_tokens 0"),
        (lambda: best(transform=Transform.NONE), "--head_transform balanced"),
        (lambda: best(transform=Transform.PERMUTATION, extras=ExtraSettings(head_transform=BALANCED)), "permutation"),
    ],
)
def test_what_cannot_be_is_refused_by_its_flag(make, message):
    with pytest.raises(InputError, match=message):
        make()
