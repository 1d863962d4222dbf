"""Folders for other engines: what compressed-tensors reads of them is what was quantized, to the bit."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from families import logits, make_model, quantize, save
from safetensors.torch import load_file, save_file
from torch import nn

from duquant.exported import apply_transforms_, load
from duquant.linear import QuantLinear
from duquant.verify import levels, watched
from experiment.verify import rotating_as_exported
from models import decoder_spec
from models.exported import ExportWriter, packed_words
from quantize.bits import BitSettings, ClipSettings, Format, FormatSettings, SymmetricRange
from quantize.refinements import ExtraSettings, Rounding, RoundingSettings
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import GqaSmooth, QuantSettings, SmoothSettings

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed; pip install compressed-tensors==0.20.0",
)
FULL = {"symmetric": True, "act_symmetric": True, "symmetric_range": SymmetricRange.FULL}
HEADS = {"query": 16, "key": 16, "value": 16}
UNBIASED = ("llama", "mistral", "phi3", "gemma2", "gemma3_text", "olmo2, no GQA", "granite")
REST = ("qwen2", "qwen3")  # with biases: without rotations


def exportable(group_size: int | None = None, activation: int = 4, **changes) -> QuantSettings:
    bits = BitSettings(4, activation, group_size, **HEADS, **FULL)
    how = {"transform": Transform.PERMUTE_ROTATE, "rotation": RotationSettings(block_size=16, steps=12)}
    return QuantSettings(**{"bits": bits, "smooth": SmoothSettings(0.6, gqa=GqaSmooth.FOLD), **how, **changes})


def export(folder: Path, model: nn.Module, config: QuantSettings, tokenizer_folder: Path) -> Path:
    """Write a quantized model as `--export` does."""
    save(folder, model, config, tokenizer_folder, ExportWriter)
    return folder


def description(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def same(quantized: nn.Module, folder: Path) -> bool:
    """Whether compressed-tensors computes the logits of the quantized model, to the bit."""
    with rotating_as_exported(quantized):
        return torch.equal(logits(load(folder)), logits(quantized))


@needs_package
@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("transform", [Transform.PERMUTE_ROTATE, Transform.HADAMARD])
def test_other_engines_compute_what_was_quantized(name, transform, model_folder, tmp_path):
    smooth = {"smooth": None} if name.startswith("olmo2") else {}  # whose scales have nowhere to go
    config = exportable(transform=transform, **smooth)
    quantized, _ = quantize(make_model(name), config)
    assert same(quantized, export(tmp_path / "out", quantized, config, model_folder))


@needs_package
@pytest.mark.parametrize("name", [*REST, "llama"])
def test_so_they_do_without_rotations_where_linears_have_biases(name, model_folder, tmp_path):
    config = exportable(transform=Transform.NONE)
    quantized, _ = quantize(make_model(name), config)
    folder = export(tmp_path / "out", quantized, config, model_folder)
    assert "transform_config" not in description(folder)
    assert same(quantized, folder)


HOW = {
    "groups of weights": exportable(8),
    "a block whose root is no power of two": exportable(rotation=RotationSettings(block_size=8, steps=12)),
    "the whole width": exportable(rotation=RotationSettings(block_size=-1, steps=6)),
    "eight bits of inputs": exportable(activation=8),
    "weights alone": exportable(activation=16),
    "GPTQ, clips of weights, heads of v rotated": exportable(
        clip=ClipSettings(None, "search"),
        rounding=RoundingSettings(Rounding.GPTQ),
        extras=ExtraSettings(value_rotation=True),
    ),
}


@needs_package
@pytest.mark.parametrize("how", HOW)
def test_they_do_so_however_weights_were_rounded(how, model_folder, tmp_path):
    quantized, _ = quantize(make_model("llama"), HOW[how])
    assert same(quantized, export(tmp_path / "out", quantized, HOW[how], model_folder))


@needs_package
@pytest.mark.parametrize("inputs", [16, 4])
def test_they_compute_mxfp4_to_the_bit(inputs, model_folder, tmp_path):
    form = FormatSettings(Format.MXFP4, Format.MXFP4 if inputs == 4 else Format.INT)
    how = {"bits": BitSettings(4, inputs, **HEADS), "clip": ClipSettings(8 / 7), "formats": form}
    config = exportable(**how) if inputs == 4 else exportable(**{**how, "clip": ClipSettings()})
    model = tiny_model(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    quantized, _ = quantize(model, config)
    assert same(quantized, export(tmp_path / "out", quantized, config, model_folder))


@needs_package
@pytest.mark.parametrize("inputs", [16, 4])
def test_they_compute_nvfp4_to_the_bit(inputs, model_folder, tmp_path):
    form = FormatSettings(Format.NVFP4, Format.NVFP4 if inputs == 4 else Format.INT)
    config = exportable(bits=BitSettings(4, inputs, **HEADS), formats=form)
    quantized, _ = quantize(make_model("llama"), config)
    assert same(quantized, export(tmp_path / "out", quantized, config, model_folder))


@needs_package
def test_without_the_rotations_the_logits_are_others(model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    config = exportable()
    quantized, _ = quantize(make_model("llama"), config)
    folder = export(tmp_path / "out", quantized, config, model_folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(model) - logits(quantized)).norm() > 0.5 * logits(quantized).norm()
    apply_transforms_(model, folder)
    with rotating_as_exported(quantized):
        assert torch.equal(logits(model), logits(quantized))


@needs_package
def test_a_folder_that_lacks_a_rotation_is_refused(model_folder, tmp_path):
    config = exportable()
    quantized, _ = quantize(make_model("llama"), config)
    folder = export(tmp_path / "out", quantized, config, model_folder)
    file = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.layer_1_down_input.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.down_proj\.layer_1_down_input\.weight"):
        load(folder)


@needs_package
@pytest.mark.parametrize("bits", [4, 8])
def test_a_token_has_as_many_values_in_front_of_a_linear_as_there_are_codes(bits, model_folder, tmp_path):
    config = exportable(activation=bits)
    quantized, _ = quantize(make_model("llama"), config)
    model = load(export(tmp_path / "out", quantized, config, model_folder))
    with watched(model, None) as watch:
        logits(model)
    assert watch.products == sum(isinstance(each, QuantLinear) for each in quantized.modules())
    assert 10 < watch.levels <= min(2**bits, 96), "no linear has more channels"


def test_levels_are_counted_by_vector_or_by_group():
    x = torch.tensor([[[1.0, 2.0, 1.0, 3.0], [0.0, 0.0, 0.0, 4.0]]])
    assert levels(x, None) == 3
    assert levels(x, 2) == 2


def test_words_hold_eight_codes_the_first_in_the_lowest_bits():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 15, 0, 9]], dtype=torch.uint8)
    words = [word & 0xFFFFFFFF for word in packed_words(codes)[0].tolist()]
    assert [f"{word:08x}" for word in words] == ["87654321", "0000090f"]


def test_every_group_of_linears_has_one_rotation_which_is_told_of_all_of_them(model_folder, tmp_path):
    config = exportable()
    quantized, _ = quantize(make_model("llama"), config)
    folder = export(tmp_path / "out", quantized, config, model_folder)
    groups = description(folder)["transform_config"]["config_groups"]
    assert len(groups) == 2 * 4
    told = [path for group in groups.values() for apply in group["apply"] for path in apply["targets"]]
    spec, full = decoder_spec(quantized.config), copy.deepcopy(quantized)
    linears = [f"model.layers.{index}.{path}" for index in range(2) for g in spec.groups for path in g.linears]
    assert sorted(told) == sorted(linears)
    stored = {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
    for name, group in groups.items():
        for path in group["apply"][0]["targets"]:
            rotation = full.get_submodule(path).group.transform.rotations[0]
            torch.testing.assert_close(stored[f"{path}.{name}_input.weight"] / 4, rotation)
    assert not any("qkv_quantizer" in name or name.endswith(".codes") for name in stored)
