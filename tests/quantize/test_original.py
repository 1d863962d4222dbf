"""Reading the checkpoint of the paper's own code."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from best_settings import EXTRAS, best
from conftest import random_tokens, tiny_model
from safetensors.torch import load_file
from torch import nn

from evaluation.perplexity import perplexity
from models import decoder_spec
from models.load import ModelSource, load_config, load_model
from quantize.bits import BitSettings, ClipSettings
from quantize.observer import Observer
from quantize.original import SCALES, read_original
from quantize.quantization import quantize_model
from quantize.refinements import Rounding, RoundingSettings
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import GqaSmooth, QuantSettings, SmoothSettings, TrainingSettings
from quantize.state import FinishedLayer
from quantize.statistics import channel_statistics
from utils.errors import InputError

CPU = torch.device("cpu")
GOLDEN_PERPLEXITY = 2.7304  # golden/original_checkpoint/README.md


def settings(**changes) -> QuantSettings:
    usual = {
        "bits": BitSettings(4, 4),
        "clip": ClipSettings(0.95),
        "smooth": SmoothSettings(),
        "rotation": RotationSettings(16, 6, 1),
        "training": TrainingSettings(epochs=1),
    }
    return QuantSettings(**{**usual, **changes})


def quantize(config: QuantSettings, finished=None, shape=None):
    """The quantized model, and the layers it was made with."""
    model = tiny_model(**(shape or {}))
    spec, tokens = decoder_spec(model.config), random_tokens(4, 16)
    peaks = channel_statistics(model, spec, tokens, CPU).scales if finished is None else None
    done = Done()
    quantize_model(model, spec, tokens, peaks, config, CPU, finished, [done])
    return model, done.layers


class Done(Observer):
    """Every layer's state, by index."""

    def __init__(self):
        self.layers = {}

    def layer_done(self, index: int, finished: FinishedLayer, restored: bool) -> None:
        self.layers[index] = finished


def as_original(layers, spec, dtype=torch.float16) -> dict[int, dict]:
    """States in the form of the original's file (see the README of the golden checkpoint)."""
    saved = {}
    for index, layer in layers.items():
        tensors = {"init_duquant_params": torch.tensor(1), "qkt_smooth_scale": torch.ones(96, dtype=dtype)}
        for group in spec.groups:
            found = layer.state.groups[group.name]
            tensors[SCALES[group.name]] = found.scale.to(dtype)
            tensors[SCALES[group.name].replace("scale", "shift")] = torch.zeros(len(found.scale), dtype=dtype)
            for path in group.linears:
                for side in ("act", "weight"):
                    tensors[f"{path}.{side}_quantizer.R"] = found.rotations.to(dtype)
                    tensors[f"{path}.{side}_quantizer.permutation_list"] = found.permutations.clone()
                if path in layer.state.clips:
                    low, high = (logits.reshape(-1, 1).to(dtype) for logits in layer.state.clips[path])
                    tensors[f"{path}.weight_quantizer.lowbound_factor"] = low
                    tensors[f"{path}.weight_quantizer.upbound_factor"] = high
        saved[index] = tensors
    return saved


@pytest.fixture(scope="module")
def made():
    """A tiny quantized model, its spec, and its layers in the original's form."""
    model, layers = quantize(settings())
    spec = decoder_spec(model.config)
    return model, spec, as_original(layers, spec)


def write(tmp_path: Path, saved: object) -> Path:
    torch.save(saved, tmp_path / "duquant_parameters.pth")
    return tmp_path / "duquant_parameters.pth"


def distance(one: nn.Module, other: nn.Module) -> float:
    tokens = random_tokens(2, 16, seed=9)
    a, b = one(tokens).logits, other(tokens).logits
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kv_heads", [2, 6], ids=["o's scale online", "o's scale folded"])
@pytest.mark.parametrize(
    "changes",
    [
        {"bits": BitSettings(4, 16)},
        {"bits": BitSettings(4, 16), "rotation": RotationSettings(16, 6, 2)},
        {"bits": BitSettings(3, 16, group_size=16)},
        {"bits": BitSettings(4, 16), "clip": ClipSettings(None, 0.9), "training": None},
    ],
    ids=["W4", "two permutations", "groups", "no lwc"],
)
def test_a_state_in_the_originals_form_gives_the_same_model_to_half_precision(changes, kv_heads, tmp_path):
    config, shape = settings(**changes), {"num_key_value_heads": kv_heads}
    expected, layers = quantize(config, shape=shape)
    spec = decoder_spec(expected.config)
    exact = read_original(write(tmp_path, as_original(layers, spec, torch.float32)), tiny_model(**shape), spec, config)
    assert distance(quantize(config, exact, shape)[0], expected) < 1e-6
    half = read_original(write(tmp_path, as_original(layers, spec)), tiny_model(**shape), spec, config)
    assert distance(quantize(config, half, shape)[0], expected) < 0.15  # some weights round to the next code
    wrong = {index: layers[len(layers) - 1 - index] for index in layers}
    assert distance(quantize(config, wrong, shape)[0], expected) > 0.2, "the comparison must be able to tell"


def test_every_part_of_the_state_comes_from_its_key(made, tmp_path):
    _, spec, saved = made
    layers = read_original(write(tmp_path, saved), tiny_model(), spec, settings())
    assert list(layers) == [0, 1]
    for index, layer in layers.items():
        assert layer.figures == {}
        for group in spec.groups:
            found, first = layer.state.groups[group.name], group.linears[0]
            assert torch.equal(found.scale, saved[index][SCALES[group.name]].float())
            assert torch.equal(found.rotations, saved[index][f"{first}.act_quantizer.R"].float())
            assert torch.equal(found.permutations, saved[index][f"{first}.act_quantizer.permutation_list"])
            for path in group.linears:
                low, high = layer.state.clips[path]
                assert torch.equal(low, saved[index][f"{path}.weight_quantizer.lowbound_factor"].float())
                assert torch.equal(high, saved[index][f"{path}.weight_quantizer.upbound_factor"].float())


def without(saved, key):
    return {index: {name: t for name, t in layer.items() if name != key} for index, layer in saved.items()}


def changed(saved, key, change):
    return {index: {**layer, key: change(layer[key])} for index, layer in saved.items()}


PERMUTATIONS = "mlp.down_proj.act_quantizer.permutation_list"
WRONG = {
    "no rotation": (lambda saved: without(saved, "self_attn.o_proj.act_quantizer.R"), {}, "self_attn.o_proj.act"),
    "no scale": (lambda saved: without(saved, "fc1_smooth_scale"), {}, "fc1_smooth_scale.*--smooth"),
    "no clip": (lambda saved: without(saved, "mlp.up_proj.weight_quantizer.upbound_factor"), {}, "upbound.*--lwc"),
    "block size": (lambda saved: saved, {"rotation": RotationSettings(8, 6, 1)}, "--block_size"),
    "permutation times": (lambda saved: saved, {"rotation": RotationSettings(16, 6, 2)}, "--permutation_times"),
    "group size": (lambda saved: saved, {"bits": BitSettings(4, 4, 16)}, "--group_size"),
    "no transform asked for": (lambda saved: saved, {"transform": Transform.NONE}, "--transform"),
    "fewer layers": (lambda saved: {0: saved[0]}, {}, "2 layers"),
    "other keys": (lambda saved: {"a": 1}, {}, "2 layers"),
    "a list": (lambda saved: [1, 2], {}, "2 layers"),
    "layers that are none": (lambda saved: {0: 1, 1: 2}, {}, "duquant_parameters.pth"),
    "no tensor": (lambda saved: changed(saved, "qkv_smooth_scale", lambda t: "x"), {}, "qkv_smooth_scale"),
    "width of a permutation": (lambda saved: changed(saved, PERMUTATIONS, lambda t: t[:, :48]), {}, "of this model"),
    "too few permutations": (lambda saved: changed(saved, PERMUTATIONS, lambda t: t[:0]), {}, "permutation"),
    "no permutation": (lambda saved: changed(saved, PERMUTATIONS, lambda t: t * 0), {}, "permutation"),
    "width of a scale": (lambda saved: changed(saved, "down_smooth_scale", lambda t: t[:-1]), {}, "of this model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_does_not_fit_is_refused_in_one_line(name, made, tmp_path):
    change, other, message = WRONG[name]
    path = write(tmp_path, change(made[2]))
    with pytest.raises(InputError, match=message) as refused:
        read_original(path, tiny_model(), made[1], settings(**other))
    assert str(refused.value).startswith(f"--resume {path}: ")
    assert "\n" not in str(refused.value)


def test_a_checkpoint_of_a_wider_model_is_refused(made, tmp_path):
    wider = tiny_model(hidden_size=96)
    with pytest.raises(InputError, match="is not of this model"):
        read_original(write(tmp_path, made[2]), wider, made[1], settings())


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_never_run(made, tmp_path):
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        path = tmp_path / "evil.pth"
        save({0: Malicious(tmp_path / "ran"), 1: {}}, path)
        with pytest.raises(InputError, match="cannot be read") as refused:
            read_original(path, tiny_model(), made[1], settings())
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "ran").exists()


UNREADABLE = {
    "empty": lambda sound: b"",
    "cut": lambda sound: sound[: len(sound) // 2],
    "cut early": lambda sound: sound[:10],
    "text": lambda sound: b"hello, this is not a checkpoint",
    "zeros": lambda sound: bytes(1000),
    "json": lambda sound: b'{"a": 1}',
    "pickle operators": lambda sound: b"h\x05.",
    "unfinished pickle": lambda sound: pickle.dumps({0: {"a": [1, 2, 3]}})[:-4],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(name, made, tmp_path):
    path = write(tmp_path, made[2])
    path.write_bytes(UNREADABLE[name](path.read_bytes()))
    with pytest.raises(InputError, match="cannot be read") as refused:
        read_original(path, tiny_model(), made[1], settings())
    assert "\n" not in str(refused.value)


def test_a_missing_file_and_a_folder_are_refused(made, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    for name, message in (("nowhere.pth", "no such file"), ("folder.pth", "cannot be read")):
        with pytest.raises(InputError, match=message):
            read_original(tmp_path / name, tiny_model(), made[1], settings())


def test_the_golden_checkpoint_gives_the_perplexity_of_its_readme(golden_dir, shared_data):
    path = golden_dir / "original_checkpoint/duquant_parameters.pth"
    source = ModelSource(str(shared_data / "models/babyllama_root"))
    config = load_config(source)
    model, spec = load_model(source, config, torch.float32, "sdpa"), decoder_spec(config)
    tokens = load_file(golden_dir / "babyllama_root_tokens.safetensors")
    quant = settings(rotation=RotationSettings(32, 256, 1))
    finished = read_original(path, model, spec, quant)
    quantize_model(model, spec, tokens["calibration"].long(), None, quant, CPU, finished)
    found = perplexity(model, spec, tokens["test"].long(), CPU).perplexity
    assert found == pytest.approx(GOLDEN_PERPLEXITY, abs=0.02)


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (
            best(),
            "--smooth_measure energy, --probe peaks, --rounding gptq, --swc search, --lac search, --head_transform "
            "balanced, --channel_shift, --key_mean",
        ),
        (settings(clip=ClipSettings("search")), "--lac search"),
        (settings(rounding=RoundingSettings(Rounding.GPTQ)), "--rounding gptq"),
        (settings(extras=EXTRAS["value rotation"]), "--value_rotation"),
    ],
    ids=["best", "clip", "gptq", "values"],
)
def test_settings_that_need_samples_are_refused_by_their_flags(config, flags, made, tmp_path):
    path = write(tmp_path, made[2])
    with pytest.raises(InputError) as refused:
        read_original(path, tiny_model(), made[1], config)
    assert str(refused.value) == f"--resume {path}: is of the paper's code, which knows nothing of {flags}"


def test_scales_of_single_query_heads_are_not_folded_into_a_kv_head(made, tmp_path):
    smooth = SmoothSettings(gqa=GqaSmooth.FOLD)
    with pytest.raises(InputError, match="leave out --gqa_smooth fold"):
        read_original(write(tmp_path, made[2]), tiny_model(), made[1], settings(smooth=smooth))
    shape = {"num_key_value_heads": 6}  # where nothing is shared the flag says nothing
    _, layers = quantize(settings(), shape=shape)
    model = tiny_model(**shape)
    spec = decoder_spec(model.config)
    read_original(write(tmp_path, as_original(layers, spec)), model, spec, settings(smooth=smooth))
