"""--save_model: a folder that loads again and gives exactly the same figures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_tokens, tiny_config, tiny_model
from families import reload, save
from safetensors.torch import load_file, save_file
from settings_cases import switched_on, with_another
from torch import nn
from transformers import LlamaConfig

from duquant.structure import ModelStructure
from evaluation.perplexity import perplexity
from models import decoder_spec
from models.earlier import FIRST_VERSION_TRANSFORMS
from models.load import ModelSource, load_config, load_model
from models.saved import INDEX, ModelWriter, read_settings, saved_settings
from quantize.bits import BitSettings, ClipSettings
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import GqaSmooth, QuantSettings, SmoothSettings, TrainingSettings
from quantize.statistics import channel_statistics
from utils.errors import InputError
from utils.settings import options

CPU = torch.device("cpu")
LLAMA = decoder_spec(tiny_config())
FIRST_VERSION = ROOT / "tests/fixtures/version_1"


def settings(**changes) -> QuantSettings:
    usual = {"bits": BitSettings(4, 4), "clip": ClipSettings(0.95, 0.9), "smooth": SmoothSettings()}
    return QuantSettings(**{**usual, "rotation": RotationSettings(16, 6, 1), **changes})


def quantize(config: QuantSettings, **shape) -> nn.Module:
    model = tiny_model(**shape)
    quantize_(model, config)
    return model


def quantize_(model: nn.Module, config: QuantSettings) -> None:
    spec, tokens = decoder_spec(model.config), random_tokens(4, 16)
    peaks = channel_statistics(model, spec, tokens, CPU).scales if config.smooth else None
    quantize_model(model, spec, tokens, peaks, config, CPU)


CASES = {
    "usual": (settings(), {}),
    "folded": (settings(), {"num_key_value_heads": 6}),
    "shared by query heads": (settings(smooth=SmoothSettings(gqa=GqaSmooth.FOLD)), {}),
    "tied embeddings": (settings(), {"tie_word_embeddings": True}),
    "biases": (settings(), {"attention_bias": True, "mlp_bias": True}),
    "no smoothing": (settings(smooth=None), {}),
    "no transform": (settings(transform=Transform.NONE), {}),
    "permutation": (settings(transform=Transform.PERMUTATION), {}),
    "rotation and permutation": (settings(transform=Transform.ROTATION_PERMUTATION), {}),
    "Hadamard": (settings(transform=Transform.HADAMARD), {}),
    "groups, symmetric, lwc": (
        settings(bits=BitSettings(3, 6, 16, True), clip=ClipSettings(0.9), training=TrainingSettings(epochs=1)),
        {},
    ),
    "two permutations": (settings(rotation=RotationSettings(16, 6, 2)), {}),
    "nine bits": (settings(bits=BitSettings(9, 12)), {}),
    "weights only": (settings(bits=BitSettings(4, 16)), {}),
    "activations only": (settings(bits=BitSettings(16, 4)), {}),
    "bits by role": (settings(bits=BitSettings(4, 8, query=3, key=5, value=2, act_group_size=16)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_loads_again_bit_for_bit(name, model_folder, tmp_path):
    config, shape = CASES[name]
    model = quantize(config, **shape)
    save(tmp_path / "saved", model, config, model_folder)
    again, saved = reload(tmp_path / "saved")
    tokens, spec = random_tokens(3, 16, seed=9), decoder_spec(model.config)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert perplexity(again, spec, tokens, CPU) == perplexity(model, spec, tokens, CPU)
    assert saved == config
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_loads_again_bit_for_bit(dtype, model_folder, tmp_path):
    source = ModelSource(str(model_folder))
    model = load_model(source, load_config(source), dtype, "sdpa")
    quantize_(model, settings())
    save(tmp_path / "saved", model, settings(), model_folder)
    again, _ = reload(tmp_path / "saved", dtype)
    tokens = random_tokens(3, 16, seed=9)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def sound(model_folder, tmp_path_factory) -> tuple[Path, nn.Module]:
    """A folder with a saved model, and the model."""
    folder, model = tmp_path_factory.mktemp("sound") / "saved", quantize(settings())
    save(folder, model, settings(), model_folder)
    return folder, model


@pytest.fixture
def saved(sound, tmp_path) -> Path:
    """A copy of the folder, to be damaged."""
    return shutil.copytree(sound[0], tmp_path / "saved")


def test_codes_are_written_as_integers_under_the_names_of_their_modules(sound):
    folder, model = sound
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert set(tensors) == set(places)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    for index, layer in enumerate(tiny_model().model.layers):
        for path, linear in layer.named_modules():
            if isinstance(linear, nn.Linear):
                codes = tensors[f"model.layers.{index}.{path}.codes"]
                assert (codes.dtype, codes.shape) == (torch.uint8, (linear.out_features, linear.in_features // 2))
    shared = [name for name in tensors if name.endswith("transform.rotations")]
    assert len(shared) == 2 * 4, "what the linears of a group share is written once"


def test_a_folder_of_the_third_version_did_not_describe_its_modules(sound, saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["version"] = 3
    del config["quantization_config"]["structure"]
    (saved / "config.json").write_text(json.dumps(config))
    again, _ = reload(saved)
    assert torch.equal(again(random_tokens(2, 12)).logits, sound[1](random_tokens(2, 12)).logits)


def test_a_folder_of_the_second_version_had_a_byte_for_every_code(sound, saved):
    for file in saved.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(".codes")]:
            low, high = tensors[name] & 15, tensors[name] >> 4
            tensors[name] = torch.stack((low, high), dim=-1).flatten(1)
        save_file(tensors, file, {"format": "pt"})
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (saved / "config.json").write_text(json.dumps(config))
    again, _ = reload(saved)
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, sound[1](tokens).logits)


def test_there_is_a_file_for_every_layer_and_one_for_the_rest(sound):
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in sound[0].glob("*.safetensors")) == names
    places = json.loads((sound[0] / INDEX).read_text())["weight_map"]
    for name, place in places.items():
        assert place == names[int(name.split(".")[2]) if name.startswith("model.layers.") else 2]


def test_saving_leaves_the_model_as_it_was(model_folder, tmp_path):
    model = quantize(settings())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(tmp_path / "saved", model, settings(), model_folder)
    assert getattr(model.config, "quantization_config", None) is None
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("each", options(QuantSettings), ids=lambda each: each.name)
def test_every_setting_survives_a_saved_model(each, sound, tmp_path):
    config = with_another(switched_on(QuantSettings, each), each)
    described = tiny_config()
    described.quantization_config = saved_settings(config, structure_of(sound[0]))
    described.save_pretrained(tmp_path)
    assert read_settings(LlamaConfig.from_pretrained(tmp_path)) == config


def structure_of(folder: Path) -> ModelStructure:
    return ModelStructure.from_dict(
        json.loads((folder / "config.json").read_text())["quantization_config"]["structure"]
    )


def test_a_config_that_is_not_ours_has_no_settings():
    config = tiny_config()
    assert read_settings(config) is None
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert read_settings(config) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda made: made.pop("settings"),
        lambda made: made["settings"]["bits"].update(weight="x"),
        lambda made: made["settings"]["bits"].update(weight=99),
        lambda made: made["settings"].update(transform="other"),
        lambda made: made["settings"].update(bits=4),
        lambda made: made.update(settings=[]),
        lambda made: made["settings"]["bits"].update(weight=3),
        lambda made: made.pop("structure"),
        lambda made: made["structure"].pop("experts"),
        lambda made: made["structure"].update(attention="attention"),
        lambda made: made["structure"]["layer_kinds"].pop(),
        lambda made: made["structure"]["layer_kinds"].append(0),
        lambda made: made["structure"].update(layer_kinds=[0, 7]),
        lambda made: made["structure"]["kinds"][0]["groups"].pop(),
        lambda made: made["structure"]["kinds"][0]["groups"][0]["linears"].append("mlp.up_proj"),
        lambda made: made["structure"]["kinds"][0]["groups"][0].update(plain=["elsewhere"]),
        lambda made: made["structure"]["kinds"][0]["groups"][0].update(readers="3"),
        lambda made: made["structure"]["kinds"][0].update(attention={"key.mean": "x"}),
    ],
)
def test_a_damaged_description_of_the_settings_is_refused(damage, saved):
    config = json.loads((saved / "config.json").read_text())
    damage(config["quantization_config"])
    (saved / "config.json").write_text(json.dumps(config))
    refused(saved, "quantization_config")


def refused(folder: Path, words: str) -> None:
    """Loading the folder is an InputError of one line."""
    with pytest.raises(InputError, match=words) as error:
        reload(folder)
    assert "\n" not in str(error.value)


def test_a_model_of_a_later_version_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (saved / "config.json").write_text(json.dumps(config))
    refused(saved, "later version")


SHARD = "model-00002-of-00003.safetensors"  # of the second layer
CODES = "model.layers.1.mlp.down_proj.codes"


def without(folder: Path, name: str, index_too: bool) -> None:
    """Take a tensor out of its file, and out of the index."""
    index = json.loads((folder / INDEX).read_text())
    place = index["weight_map"].pop(name)
    tensors = load_file(folder / place)
    del tensors[name]
    save_file(tensors, folder / place, {"format": "pt"})
    if index_too:
        (folder / INDEX).write_text(json.dumps(index))


def index_with(folder: Path, place: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][CODES] = place
    (folder / INDEX).write_text(json.dumps(index))


def cut(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors[CODES] = tensors[CODES][:, 1:].clone()
    save_file(tensors, folder / SHARD, {"format": "pt"})


DAMAGE = {
    "no index": (lambda folder: (folder / INDEX).unlink(), INDEX),
    "an index cut short": (lambda folder: (folder / INDEX).write_text('{"weight_map": {'), INDEX),
    "an index that is a list": (lambda folder: (folder / INDEX).write_text("[]"), INDEX),
    "an index without places": (lambda folder: (folder / INDEX).write_text("{}"), INDEX),
    "an index that leads away": (lambda folder: index_with(folder, "../elsewhere.safetensors"), "outside"),
    "an index of a number": (lambda folder: index_with(folder, 3), INDEX),
    "an index that says more": (lambda folder: index_with(folder, "model-00001-of-00003.safetensors"), "what"),
    "no shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: no such file"),
    "a shard cut short": (lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-9]), SHARD),
    "an empty shard": (lambda folder: (folder / SHARD).write_bytes(b""), SHARD),
    "a shard without codes": (lambda folder: without(folder, CODES, False), CODES),
    "no codes anywhere": (lambda folder: without(folder, CODES, True), "down_proj.codes"),
    "codes of another width": (cut, "down_proj.codes is "),
    "no norm": (lambda folder: without(folder, "model.layers.1.input_layernorm.weight", True), "input_layernorm"),
    "no head": (lambda folder: without(folder, "lm_head.weight", True), "lm_head"),
    "no rotations": (lambda folder: without(folder, CODES.replace("codes", "group.transform.rotations"), True), "rota"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_is_damaged_is_refused_in_one_line(name, saved):
    damage, words = DAMAGE[name]
    damage(saved)
    refused(saved, words)


def write_layers(folder: Path, model: nn.Module) -> ModelWriter:
    """Begin to save: the layers, without the rest."""
    writer = ModelWriter(folder, LLAMA, 2)
    for index, layer in enumerate(model.model.layers):
        writer.visit(index, layer)
    return writer


def test_a_writer_that_dies_leaves_no_folder_of_that_name(sound, tmp_path):
    def dying():
        with write_layers(tmp_path / "saved", sound[1]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dying()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_does_not_enter_the_next_folder(sound, model_folder, tmp_path):
    write_layers(tmp_path / "saved", sound[1])  # never finished, never left
    (left,) = tmp_path.iterdir()
    assert left.name != "saved"
    (left / "leftover.txt").write_text("half")
    save(tmp_path / "saved", sound[1], settings(), model_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert not (tmp_path / "saved/leftover.txt").exists()
    assert torch.equal(reload(tmp_path / "saved")[0](random_tokens(1, 8)).logits, sound[1](random_tokens(1, 8)).logits)


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(InputError, match=r"--save_model .*is there already and not empty"):
            ModelWriter(place, LLAMA, 2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"mine.txt": "mine"}


def test_an_empty_folder_is_taken(sound, model_folder, tmp_path):
    (tmp_path / "saved").mkdir()
    save(tmp_path / "saved", sound[1], settings(), model_folder)
    reload(tmp_path / "saved")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"--save_model .*cannot be written"):
        ModelWriter(tmp_path / "file/below", LLAMA, 2)


def test_a_disk_that_fills_up_is_named_and_nothing_is_left(sound, tmp_path, monkeypatch):
    writer = ModelWriter(tmp_path / "saved", LLAMA, 2)
    writer.visit(0, sound[1].model.layers[0])

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.io.save_file", full)
    with pytest.raises(InputError, match="No space left on device"):
        writer.visit(1, sound[1].model.layers[1])
    assert list(tmp_path.iterdir()) == []


def first_version_perplexity(folder: Path) -> float:
    model, config = reload(folder)
    assert config.bits == BitSettings(4, 4)
    tokens = load_file(FIRST_VERSION / "tokens.safetensors")["test"].long()
    return perplexity(model, decoder_spec(model.config), tokens, CPU).perplexity


def test_a_model_that_the_first_version_saved_gives_the_perplexity_that_it_had_there():
    expected = json.loads((FIRST_VERSION / "expected.json").read_text())["saved"]["perplexity"]
    assert first_version_perplexity(FIRST_VERSION / "saved") == expected


def test_a_model_of_the_first_version_that_lacks_a_transform_is_refused(tmp_path):
    folder = shutil.copytree(FIRST_VERSION / "saved", tmp_path / "saved")
    tensors = load_file(folder / FIRST_VERSION_TRANSFORMS)
    del tensors["model.layers.1.down.rotations"]
    save_file(tensors, folder / FIRST_VERSION_TRANSFORMS)
    refused(folder, f"{FIRST_VERSION_TRANSFORMS}: lacks 'model.layers.1")


def test_a_model_of_the_first_version_saved_anew_is_the_same(model_folder, tmp_path):
    model, config = reload(FIRST_VERSION / "saved")
    save(tmp_path / "anew", model, config, model_folder)
    again, saved = reload(tmp_path / "anew")
    assert saved == config
    assert torch.equal(again(random_tokens(2, 16)).logits, model(random_tokens(2, 16)).logits)
