"""With duquant imported, transformers loads the folder that --save_model wrote to the bit, or says why it cannot."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_tokens, tiny_model
from families import CASES, make_model, quantize, reload, save, settings
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, pipeline
from transformers.quantizers import auto

import duquant.hub
from duquant import DuQuantConfig
from duquant.linear import linears_of
from duquant.runtime import set_runtime_
from models.load import pick_attention
from models.saved import INDEX
from quantize.bits import BitSettings, ClipSettings
from quantize.refinements import ExtraSettings, HeadTransform
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import SmoothSettings
from utils.errors import InputError

TOKENS = random_tokens(2, 12, seed=3)
MANY = {
    "shifts and heads": {
        "extras": ExtraSettings(True, True, True, True, HeadTransform.BALANCED),
        "clip": ClipSettings("search", "search"),
    },
    "groups": {"bits": BitSettings(3, 6, 8, True, act_group_size=16)},
    "nine bits": {"bits": BitSettings(9, 12)},
    "inputs only": {"bits": BitSettings(16, 4)},
    "no transform": {"transform": Transform.NONE, "smooth": None},
    "online scale": {"smooth": SmoothSettings()},
}


def hub(folder: Path, **how: object) -> PreTrainedModel:
    """The model as transformers loads it, which then multiplies decoded weights, as the suite does."""
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    set_runtime_(model, "reference")
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


def saved_model(
    folder: Path, tokenizer: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **changes: object
) -> nn.Module:
    """Quantize a tiny model of a family and save it; return it."""
    full = make_model(name)
    full.set_attn_implementation(pick_attention("sdpa", full.config))
    for parameter in full.parameters():  # buffers stay: RoPE's frequencies are in float32 always
        parameter.data = parameter.data.to(dtype)
    made = replace(settings(), **changes)
    model, _ = quantize(full, made, tokens=random_tokens(2, 12))
    save(folder, model, made, tokenizer)
    return model


def assert_same(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """transformers and the suite load the folder to the bit as it was, and so they do what transformers wrote anew."""
    loaded, expected = hub(folder), logits(model)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(reload(folder, dtype)[0]), expected)
    ours = dict(reload(folder, dtype)[0].named_buffers())
    for name, buffer in loaded.named_buffers():
        assert buffer.dtype is ours[name].dtype, name
        assert torch.equal(buffer, ours[name]), name
    again = folder.with_name("again")
    loaded.save_pretrained(again, max_shard_size="50KB")
    assert len(list(again.glob("*.safetensors"))) > 1
    assert torch.equal(logits(hub(again)), expected)


@pytest.mark.parametrize("name", CASES)
def test_every_family_gives_the_logits_it_was_saved_with(name, model_folder, tmp_path):
    assert_same(saved_model(tmp_path / "saved", model_folder, name), tmp_path / "saved", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_half_precision_gives_the_logits_it_was_saved_with(name, dtype, model_folder, tmp_path):
    assert_same(saved_model(tmp_path / "saved", model_folder, name, dtype), tmp_path / "saved", dtype)


@pytest.mark.parametrize("name", MANY)
def test_everything_a_layer_can_have_gives_the_logits_it_was_saved_with(name, model_folder, tmp_path):
    assert_same(saved_model(tmp_path / "saved", model_folder, **MANY[name]), tmp_path / "saved", torch.float32)


@pytest.mark.parametrize("clip", [None, "search"])
def test_a_group_of_all_channels_gives_the_logits_it_was_saved_with(clip, model_folder, tmp_path):
    changes = {
        "bits": BitSettings(4, 8, 48),
        "clip": ClipSettings(weight_ratio=clip),
        "rotation": RotationSettings(16, 3),
    }
    model = tiny_model(intermediate_size=48, num_attention_heads=3, num_key_value_heads=3)
    model, _ = quantize(model, replace(settings(), **changes), tokens=random_tokens(2, 12))
    save(tmp_path / "saved", model, replace(settings(), **changes), model_folder)
    assert_same(model, tmp_path / "saved", torch.float32)


@pytest.fixture(scope="module")
def sound(model_folder, tmp_path_factory) -> tuple[Path, nn.Module]:
    """A folder with a saved model, and the model."""
    folder = tmp_path_factory.mktemp("sound") / "saved"
    return folder, saved_model(folder, model_folder)


@pytest.fixture
def saved(sound, tmp_path) -> Path:
    """A copy of the folder, to be damaged."""
    return shutil.copytree(sound[0], tmp_path / "saved")


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_device_map_changes_nothing(device_map, sound):
    assert torch.equal(logits(hub(sound[0], device_map=device_map)), logits(sound[1]))


def test_another_dtype_is_that_of_weights_and_not_of_what_decodes_them(sound):
    loaded, expected = hub(sound[0], dtype=torch.bfloat16), copy.deepcopy(sound[1])
    for parameter in expected.parameters():
        parameter.data = parameter.data.bfloat16()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    found = {name: buffer.dtype for name, buffer in loaded.named_buffers()}
    assert found == {name: buffer.dtype for name, buffer in expected.named_buffers()}
    assert torch.equal(logits(loaded), logits(expected))


def test_weights_that_are_not_quantized_have_the_dtype_that_is_asked_for(model_folder, tmp_path):
    saved_model(tmp_path / "saved", model_folder, **MANY["inputs only"])
    loaded = hub(tmp_path / "saved", dtype=torch.float16)
    plain = [buffer.dtype for name, buffer in loaded.named_buffers() if name.endswith(".plain")]
    assert plain == [torch.float16] * 14


def test_it_writes_text_as_any_model_does(sound):
    text = pipeline("text-generation", model=str(sound[0]), device_map="cpu")
    asked = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    expected = sound[1].generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)[0, 3:]
    [written] = text("w1 w2 w3", **asked)
    assert written["generated_text"].split() == text.tokenizer.decode(expected).split()


def test_what_is_loaded_is_not_trained(sound):
    quantizer = hub(sound[0]).hf_quantizer
    assert quantizer.is_trainable is False
    assert quantizer.is_serializable() is True


def test_registering_again_changes_nothing():
    before = auto.AUTO_QUANTIZER_MAPPING["duquant"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["duquant"]
    duquant.hub.register()
    assert (auto.AUTO_QUANTIZER_MAPPING["duquant"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["duquant"]) == before
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(DuQuantConfig) == 1


# ------------------------------------------------------------------ what is said on loading


def test_what_is_said_on_loading_is_heeded_and_not_saved(sound, tmp_path):
    said = DuQuantConfig(runtime="reference", expand="once")
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = AutoModelForCausalLM.from_pretrained(sound[0], quantization_config=said)
    config = loaded.config.quantization_config
    assert config.get_loading_attributes() == {"runtime": "reference", "expand": "once"}
    assert {(linear.integers, linear.keeps) for linear in linears_of(loaded)} == {(False, True)}
    assert torch.equal(logits(loaded), logits(sound[1]))
    loaded.save_pretrained(tmp_path / "again")
    written = [json.loads((folder / "config.json").read_text()) for folder in (sound[0], tmp_path / "again")]
    assert written[0]["quantization_config"] == written[1]["quantization_config"]


def test_linears_multiply_integers_unless_something_else_is_said(sound):
    loaded = AutoModelForCausalLM.from_pretrained(sound[0])
    assert {(linear.integers, linear.keeps) for linear in linears_of(loaded)} == {(True, False)}
    # a rounding of floats that differs may send a code to its neighbour, in what comes behind too
    found, expected = logits(loaded), logits(sound[1])
    assert (found - expected).norm() / expected.norm() < 0.1


def test_every_loading_attribute_has_one_of_its_values():
    for wrong in ({"runtime": "fast"}, {"expand": "always"}, {"expand": None}):
        with pytest.raises(ValueError, match=f"{min(wrong)} {min(wrong.values())!r} is not known"):
            DuQuantConfig(**wrong)


def test_a_model_that_is_not_quantized_is_refused(model_folder):
    with pytest.raises(ValueError, match="quantizes none"):
        hub(model_folder, quantization_config=DuQuantConfig())


def test_a_model_without_its_head_is_refused(sound):
    with pytest.raises(ValueError, match=r"LlamaModel has no model\.layers; load the model as AutoModelForCausalLM"):
        AutoModel.from_pretrained(sound[0])


# ------------------------------------------------------------------ damaged folders

SHARD = "model-00002-of-00003.safetensors"  # of the second layer
DOWN = "model.layers.1.mlp.down_proj"


def tensors_with(folder: Path, shard: str = SHARD, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a file by name (dots as __), or take them out, and tell the index."""
    tensors, index = load_file(folder / shard), json.loads((folder / INDEX).read_text())
    for name, tensor in changes.items():
        tensors[name.replace("__", ".")] = tensor
        index["weight_map"][name.replace("__", ".")] = shard
    for name in [name for name, tensor in tensors.items() if tensor is None]:
        del tensors[name], index["weight_map"][name]
    save_file(tensors, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))


def changed(folder: Path, name: str, change) -> None:
    tensors_with(folder, **{name.replace(".", "__"): change(load_file(folder / SHARD)[name])})


def described(folder: Path, change) -> None:
    """Change the `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def with_structure(change):
    return lambda folder: described(folder, lambda made: change(made["structure"]))


def a_group(**values):
    return with_structure(lambda structure: structure["kinds"][0]["groups"][0].update(values))


DAMAGE = {
    "no shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: no such file"),
    "a shard cut short": (lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-9]), SHARD),
    "an empty shard": (lambda folder: (folder / SHARD).write_bytes(b""), SHARD),
    "no codes": (lambda folder: changed(folder, f"{DOWN}.codes", lambda _: None), "lacks .*down_proj.codes"),
    "codes of another width": (
        lambda folder: changed(folder, f"{DOWN}.codes", lambda codes: codes[:, 1:].clone()),
        r"down_proj.codes is \[48, 39\], and the model needs \[48, 40\]",
    ),
    "codes that are floats": (lambda folder: changed(folder, f"{DOWN}.codes", torch.Tensor.float), "not torch.uint8"),
    "codes of two bytes": (lambda folder: changed(folder, f"{DOWN}.codes", torch.Tensor.short), "not torch.uint8"),
    "scales of groups": (
        lambda folder: changed(folder, f"{DOWN}.scale", lambda scale: torch.ones(48, 10, 1)),
        "down_proj.scale is",
    ),
    "rotations of larger blocks": (
        lambda folder: changed(folder, f"{DOWN}.group.transform.rotations", lambda each: torch.ones(2, 20, 20)),
        "down_proj.group.transform.rotations is",
    ),
    "permutations of another model": (
        lambda folder: changed(folder, f"{DOWN}.group.transform.permutations", lambda each: each[:, 8:].clone()),
        "down_proj.group.transform.permutations is",
    ),
    "no norm": (
        lambda folder: changed(folder, "model.layers.1.input_layernorm.weight", lambda _: None),
        "lacks model.layers.1.input_layernorm",
    ),
    "a norm of another width": (
        lambda folder: changed(folder, "model.layers.1.input_layernorm.weight", lambda _: torch.ones(47)),
        r"input_layernorm.weight is \[47\]",
    ),
    "a tensor too many": (
        lambda folder: tensors_with(folder, model__layers__1__mlp__down_proj__shift=torch.ones(3)),
        "holds .*down_proj.shift",
    ),
    "a layer too many": (
        lambda folder: tensors_with(folder, model__layers__7__mlp__down_proj__codes=torch.ones(3)),
        "holds model.layers.7",
    ),
    "a later version": (lambda folder: described(folder, lambda made: made.update(version=99)), "version|format 99"),
    "no structure": (lambda folder: described(folder, lambda made: made.pop("structure")), "lacks its .*structure"),
    "no scheme": (lambda folder: described(folder, lambda made: made.pop("scheme")), "lacks its scheme"),
    "an odd scheme": (
        lambda folder: described(folder, lambda made: made["scheme"].update(query=4.5)),
        "scheme|damaged",
    ),
    "bits of another scheme": (
        lambda folder: described(folder, lambda made: made["scheme"]["weight"].update(bits=8)),
        "codes is|its scheme",
    ),
    "input groups that do not divide": (
        lambda folder: described(folder, lambda made: made["scheme"]["input"].update(group_size=7)),
        "do not divide by groups of 7|its scheme",
    ),
    "an unknown field": (lambda folder: described(folder, lambda made: made.update(speed=9)), "does not know 'speed'"),
    "an unknown part": (a_group(speed=9), "does not know 'speed'"),
    "a layer too few": (with_structure(lambda made: made["layer_kinds"].pop()), "of 1 layers, and the model has 2"),
    "an unknown kind": (with_structure(lambda made: made.update(layer_kinds=[0, 5])), "it has no kind 5"),
    "another path": (a_group(linears=["self_attn.other"], biases=[], plain=[]), "layer 0"),
    "paths that are no list": (a_group(linears="self_attn.q_proj"), "structure"),
    "a group too few": (with_structure(lambda made: made["kinds"][0]["groups"].pop()), "lacks|layer 0"),
    "a norm for a linear": (a_group(linears=["input_layernorm"], biases=[], plain=[]), "layer 0"),
    "another block size": (a_group(block_size=8), "q_proj.group.transform.rotations is"),
    "a block that does not divide": (a_group(block_size=7), "do not divide by blocks of 7"),
    "a shift that is not there": (a_group(shift=True), "lacks .*q_proj.group.shift"),
    "an attention that is not so": (
        with_structure(lambda made: made["kinds"][0].update(attention={"nothing": [3]})),
        "its attention has no nothing",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line_by_transformers_and_by_the_suite(name, saved):
    damage, words = DAMAGE[name]
    damage(saved)
    with pytest.raises(ValueError, match=words) as error:
        hub(saved)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=words) as error:
        reload(saved)
    assert "\n" not in str(error.value)


def test_a_folder_of_an_earlier_version_is_refused_and_says_what_to_do(saved):
    described(saved, lambda made: made.update(version=3))
    with pytest.raises(ValueError, match=r"of version 3, and this is 4; .*save the model again"):
        hub(saved)


# ------------------------------------------------------------------ the package alone

LOAD = """
import json, sys
import torch
import duquant
from duquant.runtime import set_runtime_
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
set_runtime_(model, "reference")
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2])), use_cache=False).logits
save_file({"logits": logits}, "logits.safetensors")
print(duquant.__file__)
"""


def test_the_installed_package_alone_gives_the_logits_of_the_run(target, sound, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(sound[0]), json.dumps(TOKENS.tolist())]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(target)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(sound[1]))
