"""--save_model: a folder that loads again and gives exactly the same figures."""

import argparse
import json
import shutil

import pytest
import torch
from conftest import random_tokens, run_script, tiny_model
from quantize.export import TRANSFORMS_FILE, attach_transforms_, save_model, saved_config
from safetensors.torch import load_file
from test_cli import assert_refused, snapshot
from torch import nn
from transformers import PreTrainedTokenizerFast

from evaluation.perplexity import perplexity
from experiment.plan import refuse_for_saved
from models import decoder_spec
from models.load import ModelSource, load_config, load_model
from quantize.quantization import quantize_model
from quantize.settings import (
    BitSettings,
    ClipSettings,
    QuantSettings,
    RotationSettings,
    SmoothSettings,
    TrainingSettings,
    Transform,
)
from quantize.statistics import channel_statistics
from utils.errors import InputError

CPU = torch.device("cpu")
FLAGS = ("--wbits", 4, "--abits", 4, "--smooth", "--lac", 0.95, "--swc", 0.9, "--block_size", 16)
STEPS = ("--max_rotation_step", 20)


def settings(**changes) -> QuantSettings:
    usual = {"bits": BitSettings(4, 4), "clip": ClipSettings(0.95, 0.9), "smooth": SmoothSettings()}
    return QuantSettings(
        **{**usual, "rotation": RotationSettings(16, 6, 1), "training": TrainingSettings(epochs=1), **changes}
    )


def quantize(config: QuantSettings, **shape) -> nn.Module:
    model = tiny_model(**shape)
    spec, tokens = decoder_spec(model.config), random_tokens(4, 16)
    peaks = channel_statistics(model, spec, tokens, CPU).scales if config.smooth else None
    quantize_model(model, spec, tokens, peaks, config, CPU)
    return model


def reload(folder) -> tuple[nn.Module, QuantSettings]:
    """The model as main.py --model loads it, and its settings."""
    source = ModelSource(str(folder))
    config = load_config(source)
    saved = saved_config(config)
    del config.quantization_config
    model = load_model(source, config, torch.float32, "sdpa")
    attach_transforms_(model, folder, decoder_spec(config), saved)
    return model, saved


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return PreTrainedTokenizerFast.from_pretrained(model_folder)


CASES = {
    "usual": (settings(), {}),
    "folded": (settings(), {"num_key_value_heads": 6}),
    "tied embeddings": (settings(), {"tie_word_embeddings": True}),
    "biases": (settings(), {"attention_bias": True, "mlp_bias": True}),
    "no smoothing": (settings(smooth=None), {}),
    "no transform": (settings(transform=Transform.NONE), {}),
    "rotation and permutation": (settings(transform=Transform.ROTATION_PERMUTATION), {}),
    "Hadamard": (settings(transform=Transform.HADAMARD), {}),
    "groups, symmetric, lwc": (settings(bits=BitSettings(3, 6, 16, True), clip=ClipSettings(0.9, None, True)), {}),
    "two permutations": (settings(rotation=RotationSettings(16, 6, 2)), {}),
    "weights only": (settings(bits=BitSettings(4, 16)), {}),
    "activations only": (settings(bits=BitSettings(16, 4)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_loads_again_bit_for_bit(name, tokenizer, tmp_path):
    config, shape = CASES[name]
    model = quantize(config, **shape)
    save_model(tmp_path / "saved", model, tokenizer, decoder_spec(model.config), config)
    again, saved = reload(tmp_path / "saved")
    tokens, spec = random_tokens(3, 16, seed=9), decoder_spec(model.config)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert perplexity(again, spec, tokens, CPU) == perplexity(model, spec, tokens, CPU)
    assert (saved.bits, saved.transform, saved.label) == (config.bits, config.transform, config.label)
    assert saved.clip.activation_ratio == config.clip.activation_ratio


def test_the_weights_file_has_exactly_the_ordinary_names_and_shapes(tokenizer, tmp_path):
    model = quantize(settings())
    save_model(tmp_path / "saved", model, tokenizer, decoder_spec(model.config), settings())
    tensors, ordinary = load_file(tmp_path / "saved/model.safetensors"), tiny_model().state_dict()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in ordinary.items()
    }


def test_saving_leaves_the_model_as_it_was(tokenizer, tmp_path):
    model = quantize(settings())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(tmp_path / "saved", model, tokenizer, decoder_spec(model.config), settings())
    assert getattr(model.config, "quantization_config", None) is None
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_that_was_not_quantized_is_not_saved(tokenizer, tmp_path):
    model = tiny_model()
    with pytest.raises(InputError, match="--save_model"):
        save_model(tmp_path / "saved", model, tokenizer, decoder_spec(model.config), settings())
    assert not (tmp_path / "saved").exists()


def test_transforms_that_lack_a_tensor_are_refused(tokenizer, tmp_path):
    model = quantize(settings())
    save_model(tmp_path / "saved", model, tokenizer, decoder_spec(model.config), settings())
    shallow = quantize(settings(), num_hidden_layers=1)
    save_model(tmp_path / "shallow", shallow, tokenizer, decoder_spec(model.config), settings())
    shutil.copy(tmp_path / "shallow" / TRANSFORMS_FILE, tmp_path / "saved")
    with pytest.raises(InputError, match=f"{TRANSFORMS_FILE}: lacks 'model.layers.1"):
        reload(tmp_path / "saved")


def test_a_damaged_description_of_the_settings_is_refused(tokenizer, tmp_path):
    model = quantize(settings())
    save_model(tmp_path / "saved", model, tokenizer, decoder_spec(model.config), settings())
    described = json.loads((tmp_path / "saved/config.json").read_text())
    for damage in ({"wbits": "x"}, {"transform": "other"}, None):
        changed = {**described["quantization_config"], **(damage or {})}
        if damage is None:
            del changed["abits"]
        (tmp_path / "saved/config.json").write_text(json.dumps({**described, "quantization_config": changed}))
        with pytest.raises(InputError, match="quantization_config"):
            reload(tmp_path / "saved")


@pytest.fixture(scope="module")
def exported(model_folder, token_file, tmp_path_factory):
    """A run of main.py --save_model: its folder and results."""
    folder = tmp_path_factory.mktemp("exported")
    data = ("--model", model_folder, "--calib_dataset", token_file, "--test_dataset", token_file, "--net", "tiny")
    done = run_script("main.py", *data, *FLAGS, *STEPS, "--eval_ppl", "--save_model", "saved", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "output/tiny_w4a4/results.json").read_text())


def test_the_command_line_evaluates_a_saved_model_to_exactly_the_same_perplexity(exported, token_file, tmp_path):
    folder, results = exported
    flags = ("--model", folder / "saved", "--calib_dataset", "nowhere.txt", "--test_dataset", token_file, "--eval_ppl")
    done = run_script("main.py", *flags, "--net", "again", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "output/again_w4a4/results.json").read_text())
    assert again["perplexity"] == results["perplexity"]
    assert again["perplexity_details"] == results["perplexity_details"]
    assert not {"quantize", "statistics"} & set(again["seconds"])


def test_a_target_that_is_not_empty_is_refused_before_any_work(exported, model_folder, token_file):
    folder, _ = exported
    before = snapshot(folder)
    data = ("--model", model_folder, "--calib_dataset", token_file, "--net", "tiny")
    done = run_script("main.py", *data, *FLAGS, "--save_model", "saved", folder=folder)
    assert_refused(done, "--save_model saved: is there already and not empty")
    assert snapshot(folder) == before


def test_flags_that_quantize_again_are_refused_for_a_saved_model(exported, token_file, tmp_path):
    usual = ("--model", exported[0] / "saved", "--test_dataset", token_file, "--eval_ppl")
    done = run_script("main.py", *usual, "--save_dir", "d", folder=tmp_path)
    assert_refused(done, f"--save_dir: {exported[0] / 'saved'} is quantized already")
    assert list(tmp_path.iterdir()) == []
    names = ("save_dir", "resume", "save_model", "act_scales", "eval_kl", "report")
    for name in names:
        flags = {**dict.fromkeys(names), name: ["full"], "model": "saved"}
        with pytest.raises(InputError, match=f"--{name.replace('act_', 'act-')}: saved is quantized already"):
            refuse_for_saved(argparse.Namespace(**flags))


def test_a_saved_model_without_its_transforms_is_refused(exported, token_file, tmp_path):
    shutil.copytree(exported[0] / "saved", tmp_path / "broken")
    (tmp_path / "broken" / TRANSFORMS_FILE).unlink()
    done = run_script("main.py", "--model", "./broken", "--test_dataset", token_file, "--eval_ppl", folder=tmp_path)
    assert_refused(done, f"{TRANSFORMS_FILE}: no such file")


def test_a_model_quantized_by_another_method_is_refused(model_folder, token_file, tmp_path):
    shutil.copytree(model_folder, tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq/config.json").write_text(json.dumps(config))
    done = run_script("main.py", "--model", "./gptq", "--calib_dataset", token_file, "--abits", 4, folder=tmp_path)
    assert_refused(done, "quantized already, by another method")


def test_saving_what_16_bits_leave_alone_is_refused(model_folder, token_file, tmp_path):
    flags = ("--calib_dataset", token_file, "--wbits", 16, "--abits", 16, "--block_size", 16, "--save_model", "saved")
    assert_refused(run_script("main.py", "--model", model_folder, *flags, folder=tmp_path), "--save_model")
    assert not (tmp_path / "saved").exists()
