"""The contract that every model family keeps, each on a tiny random model of two layers with outliers."""

import copy

import pytest
import torch
from conftest import random_tokens
from families import CASES, logits, make_config, make_model, quantize, relative_error, reload, save, settings
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from duquant.linear import QuantLinear
from duquant.transform import DualTransform
from models import FAMILIES, decoder_spec
from models.load import ModelSource, load_config, load_model
from quantize.bits import ClipSettings
from quantize.checkpoint import Checkpoint
from quantize.refinements import ExtraSettings
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import GqaSmooth, TrainingSettings
from quantize.sizes import checkpoint_bytes

HALVES = (torch.float16, torch.bfloat16)
W8A8_ERROR = 0.1  # relative error of the logits
every_family = pytest.mark.parametrize("name", CASES)


def test_every_family_is_tried():
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


@every_family
def test_gemma_alone_needs_bos(name):
    assert decoder_spec(make_config(name)).needs_bos is name.startswith("gemma")


@every_family
@pytest.mark.parametrize("gqa", GqaSmooth)
def test_smoothing_and_rotating_without_rounding_change_nothing(name, gqa):
    model = make_model(name, torch.float64)
    transformed, _ = quantize(model, settings(16, gqa))
    assert relative_error(logits(transformed), logits(model)) < 1e-5


def orders_of(layers: dict) -> dict[str, set[str]]:
    """Group name → where its channels were put into another order, in any layer."""
    found: dict[str, set[str]] = {}
    for done in layers.values():
        for group in done.figures["groups"]:
            found.setdefault(group["name"], set()).add(group["order"])
    return found


@every_family
@pytest.mark.parametrize("extras", [ExtraSettings(), ExtraSettings(value_rotation=True)], ids=["", "value rotation"])
def test_channels_in_another_order_upstream_change_nothing_and_nothing_is_permuted_when_it_runs(name, extras):
    model, rotation = make_model(name, torch.float64), RotationSettings(block_size=4, steps=8)
    how = {"gqa": GqaSmooth.FOLD, "transform": Transform.PERMUTE_ROTATE, "rotation": rotation, "extras": extras}
    transformed, layers = quantize(model, settings(16, **how))
    assert relative_error(logits(transformed), logits(model)) < 1e-5
    transforms = [each for each in transformed.modules() if isinstance(each, DualTransform)]
    assert all(len(each.rotations) == 1 and not len(each.permutations) for each in transforms)
    spec = decoder_spec(model.config)
    for index, done in layers.items():
        assert done.state.orders.keys() == {"o", "down"}, "a head of two blocks or more, and the MLP"
        for group in spec.at(index).groups:
            kept = next(iter(layer_transforms(spec.decoder_layers(transformed)[index], group)))
            assert kept.scale is None or not group.absorbers
    assert orders_of(layers)["qkv"] == {"as it was, nothing upstream can take another"}
    assert all(each.startswith("folded into") for each in orders_of(layers)["down"] | orders_of(layers)["o"])


def layer_transforms(layer: nn.Module, group) -> list[DualTransform]:
    """Those of a group's linears."""
    return [layer.get_submodule(path).group.transform for path in group.linears]


@every_family
def test_a_model_with_ordered_channels_is_the_same_when_it_is_resumed_and_saved(name, model_folder, tmp_path):
    model, rotation = make_model(name), RotationSettings(block_size=4, steps=6)
    config = settings(gqa=GqaSmooth.FOLD, transform=Transform.PERMUTE_ROTATE, rotation=rotation)
    spec = decoder_spec(model.config)
    quantized, layers = quantize(model, config)
    checkpoint = Checkpoint.create(tmp_path / "kept", {"of": name}, name, checkpoint_bytes(model, spec, config))
    for index, done in layers.items():
        checkpoint.layer_done(index, done, restored=False)
    resumed, _ = quantize(model, config, checkpoint.finished(2, spec))
    assert torch.equal(logits(resumed), logits(quantized))
    save(tmp_path / "saved", quantized, config, model_folder)
    assert torch.equal(logits(reload(tmp_path / "saved")[0]), logits(quantized))


@every_family
def test_every_linear_of_the_decoder_is_quantized_and_nothing_else_is(name):
    model = make_model(name)
    spec = decoder_spec(model.config)
    quantized, _ = quantize(model, settings())
    for index, layer in enumerate(spec.decoder_layers(quantized)):
        found = {path for path, module in layer.named_modules() if isinstance(module, QuantLinear)}
        assert found == {path for group in spec.at(index).groups for path in group.linears}
        assert not any(isinstance(module, nn.Linear) for module in layer.modules())
        assert layer.get_submodule(spec.attention).qkv_quantizer is not None
    assert type(quantized.lm_head) is nn.Linear
    assert torch.equal(quantized.lm_head.weight, model.lm_head.weight)


LLAMA_FOLDED = {
    "qkv": "folded into input_layernorm",
    "gate_up": "folded into post_attention_layernorm",
    "down": "folded into mlp.up_proj",
}
FOLDED = {  # with --gqa_smooth fold
    "qwen2": {**LLAMA_FOLDED, "o": "folded into self_attn.v_proj, shared by 3 heads"},
    "phi3": {
        **LLAMA_FOLDED,
        "o": "folded into self_attn.qkv_proj[72:], shared by 2 heads",
        "down": "folded into mlp.gate_up_proj[80:]",
    },
    "phi3, no GQA": {
        **LLAMA_FOLDED,
        "o": "folded into self_attn.qkv_proj[96:]",
        "down": "folded into mlp.gate_up_proj[80:]",
    },
    "gemma2": {
        **LLAMA_FOLDED,
        "o": "folded into self_attn.v_proj, shared by 3 heads",
        "gate_up": "folded into pre_feedforward_layernorm",
    },
    "olmo2, no GQA": {
        "qkv": "online",
        "o": "folded into self_attn.v_proj",
        "gate_up": "online",
        "down": LLAMA_FOLDED["down"],
    },
    "mixtral": {
        **LLAMA_FOLDED,
        "o": "folded into self_attn.v_proj, shared by 3 heads",
        "down": "folded into mlp.experts.0.gate_up_proj[80:] and 3 like it",
    },
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("gqa", GqaSmooth)
def test_the_figures_say_where_every_scale_went(name, gqa):
    _, layers = quantize(make_model(name), settings(gqa=gqa))
    for done in layers.values():
        for group in done.figures["groups"]:
            online = gqa is GqaSmooth.ONLINE and "shared" in FOLDED[name][group["name"]]
            assert group["scale"] == ("online" if online else FOLDED[name][group["name"]])


@every_family
@pytest.mark.parametrize("gqa", GqaSmooth)
def test_eight_bits_come_close_and_four_bits_run_to_the_end(name, gqa):
    model = make_model(name)
    expected = logits(model)
    errors = [relative_error(logits(quantize(model, settings(bits, gqa))[0]), expected) for bits in (8, 4)]
    assert errors[0] < W8A8_ERROR
    assert errors[0] < errors[1] < 1.5


@every_family
@pytest.mark.parametrize("gqa", GqaSmooth)
def test_a_resumed_and_a_saved_model_give_the_same_logits_to_the_bit(name, gqa, model_folder, tmp_path):
    model, config = make_model(name), settings(gqa=gqa, clip=ClipSettings(0.95), training=TrainingSettings(epochs=1))
    spec = decoder_spec(model.config)
    quantized, layers = quantize(model, config)
    checkpoint = Checkpoint.create(tmp_path / "kept", {"of": name}, name, checkpoint_bytes(model, spec, config))
    for index, done in layers.items():
        checkpoint.layer_done(index, done, restored=False)
    kept = checkpoint.finished(2, spec)
    assert kept.keys() == {0, 1}
    for count in (1, 2):
        resumed, computed = quantize(model, config, {index: kept[index] for index in range(count)})
        assert computed.keys() == {0, 1} - set(range(count))
        assert torch.equal(logits(resumed), logits(quantized))

    save(tmp_path / "saved", quantized, config, model_folder)
    loaded, saved = reload(tmp_path / "saved")
    assert saved == config
    assert torch.equal(logits(loaded), logits(quantized))


@every_family
def test_generation_with_a_cache_is_generation_without(name):
    model, _ = quantize(make_model(name, torch.float64), settings())
    prompt = random_tokens(2, 10, seed=5)
    cached, uncached = (
        model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    expected, cache, steps = logits(model, cached), None, []
    with torch.no_grad():
        for part in (cached[:, :10], *cached[:, 10:].split(1, dim=1)):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert relative_error(torch.cat(steps, dim=1), expected) < 1e-5


@every_family
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_stays_half_precision_and_finite_and_comes_close(name, dtype):
    model = make_model(name)
    expected = logits(model)
    half, _ = quantize(copy.deepcopy(model).to(dtype), settings(8))
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert logits(half).isfinite().all()
    assert relative_error(logits(half).float(), expected) < 1.5 * W8A8_ERROR


def test_the_text_part_of_a_model_with_images_is_loaded_alone(model_folder, tmp_path):
    text = {**make_config("gemma3_text").to_dict(), "tie_word_embeddings": True}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    whole = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    whole.save_pretrained(tmp_path / "whole")
    source = ModelSource(str(tmp_path / "whole"))
    config = load_config(source)
    assert config.model_type == "gemma3_text"
    model = load_model(source, config, torch.float32, "sdpa")
    torch.testing.assert_close(logits(model), logits(whole))
    assert not any("vision" in name for name, _ in model.named_parameters())
    quantized, _ = quantize(model, settings())
    save(tmp_path / "saved", quantized, settings(), model_folder)
    assert torch.equal(logits(reload(tmp_path / "saved")[0]), logits(quantized))
