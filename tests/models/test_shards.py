"""Checkpoints read tensor by tensor: the weights that loading the whole model gives, and errors that name the file."""

import itertools
import json
import shutil
import struct
import threading

import pytest
import torch
from conftest import tiny_model
from families import CASES, make_model
from safetensors.torch import load_file, save_file

import models.shards
import models.streaming
from models import decoder_spec
from models.load import ModelSource, load_config, load_model, load_skeleton
from models.shards import INDEX, SINGLE, open_shards, read_header, read_tensor, warm
from models.streaming import LayerReader, load_shell
from utils.errors import InputError

CPU = torch.device("cpu")
DENSE = [name for name in CASES if not name.startswith(("mixtral", "qwen3_moe"))]


def save(model, folder, size="50KB"):
    model.save_pretrained(folder, max_shard_size=size)
    return ModelSource(str(folder))


def opened(source: ModelSource):
    config = load_config(source)
    return config, decoder_spec(config), open_shards(source, config, load_skeleton(config))


def shell_and_reader(source, dtype=torch.float32, compute=torch.float32, device=CPU):
    config, spec, shards = opened(source)
    shell = load_shell(source, config, spec, shards, dtype, compute, "sdpa")
    return shell, spec, LayerReader(shell, spec, shards, dtype, device)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        a.dtype == second[name].dtype and torch.equal(a, second[name]) for name, a in first.items()
    )


def whole_state(module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, persistent or not."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", DENSE)
def test_shell_and_layers_are_those_of_the_whole_model(name, stored, tmp_path):
    source = save(make_model(name, stored), tmp_path)
    whole = load_model(source, load_config(source), torch.bfloat16, "sdpa").float()
    shell, spec, reader = shell_and_reader(source, torch.bfloat16)
    prefix = f"{spec.layers}."
    outside = [{k: v for k, v in whole_state(model).items() if not k.startswith(prefix)} for model in (whole, shell)]
    assert same(*outside)
    assert {p.device.type for p in spec.decoder_layers(shell).parameters()} == {"meta"}
    with reader:
        for index, wanted in enumerate(spec.decoder_layers(whole)):
            layer = reader.open(index)
            assert same(whole_state(layer), whole_state(wanted))
            assert not any(parameter.requires_grad for parameter in layer.parameters())
            reader.drop_(layer)
            assert sum(parameter.nbytes for parameter in layer.parameters()) == 0
    assert {p.device.type for p in spec.decoder_layers(shell).parameters()} == {"meta"}
    assert shell.config._attn_implementation == whole.config._attn_implementation
    assert shell.dtype == whole.dtype


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_is_refused(name, tmp_path):
    source = save(make_model(name), tmp_path)
    with pytest.raises(InputError, match=r"--stream: model type .* cannot be streamed"):
        opened(source)


def test_the_text_part_of_a_composite_has_its_own_names(tmp_path):
    model = make_model("gemma3_text")
    source = save(model, tmp_path)
    config = load_config(source)
    for path in tmp_path.glob("*.safetensors"):
        tensors = {
            f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
    shards = open_shards(source, config, load_skeleton(config))
    assert set(shards) == set(model.state_dict())


def test_tied_embeddings_are_one_tensor_unless_the_checkpoint_has_two(tmp_path):
    source = save(tiny_model(tie_word_embeddings=True), tmp_path / "tied")
    shell, _, reader = shell_and_reader(source)
    with reader:
        assert shell.lm_head.weight is shell.model.embed_tokens.weight
    save(tiny_model(), tmp_path / "apart")
    config_path = tmp_path / "apart/config.json"
    settings = json.loads(config_path.read_text()) | {"tie_word_embeddings": True}
    config_path.write_text(json.dumps(settings))
    source = ModelSource(str(tmp_path / "apart"))
    shell, _, reader = shell_and_reader(source)
    whole = load_model(source, load_config(source), torch.float32, "sdpa")
    with reader:
        assert torch.equal(shell.lm_head.weight, whole.lm_head.weight)
        assert not torch.equal(shell.lm_head.weight, shell.model.embed_tokens.weight)


def test_modules_made_afterwards_have_parameters_again(tmp_path):
    save(tiny_model(), tmp_path)
    shell_and_reader(ModelSource(str(tmp_path)))
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of several files."""
    source = save(tiny_model(), tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return source, tmp_path / "model"


def shard_of(folder, name: str):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


VICTIM = "model.layers.1.mlp.down_proj.weight"


def rewrite(folder, change) -> None:
    """Apply `change` to the tensors of the file that holds the victim."""
    path = shard_of(folder, VICTIM)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_missing_file_is_named(sharded):
    source, folder = sharded
    path = shard_of(folder, VICTIM)
    path.unlink()
    with pytest.raises(InputError, match=path.name):
        opened(source)


@pytest.mark.parametrize("keep", [5, 60, -1], ids=["no length", "half a header", "one byte short"])
def test_a_truncated_file_is_named(sharded, keep):
    source, folder = sharded
    path = shard_of(folder, VICTIM)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"{path.name}.*damaged"):
        opened(source)


def test_a_file_that_is_no_safetensors_is_named(sharded):
    source, folder = sharded
    path = shard_of(folder, VICTIM)
    entry = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode()
    too_long, negative = struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", len(entry)) + entry
    for content in (too_long, negative, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"{{{{"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{path.name}.*damaged"):
            opened(source)


def test_a_missing_tensor_a_wrong_shape_and_a_wrong_type_are_named(sharded):
    source, folder = sharded
    rewrite(folder, lambda tensors: tensors.update({VICTIM: tensors[VICTIM][:, 1:].contiguous()}))
    with pytest.raises(InputError, match=rf"{VICTIM}.*\[48, 79\], not \[48, 80\]"):
        opened(source)
    rewrite(folder, lambda tensors: tensors.update({VICTIM: torch.zeros(48, 80, dtype=torch.int8)}))
    with pytest.raises(InputError, match=rf"{VICTIM}.*floating-point"):
        opened(source)
    rewrite(folder, lambda tensors: tensors.pop(VICTIM))
    with pytest.raises(InputError, match=rf"lacks {VICTIM}"):
        opened(source)


def test_an_index_that_leads_out_of_its_folder_or_is_none_is_refused(sharded):
    source, folder = sharded
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][VICTIM] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="outside its folder"):
        opened(source)
    (folder / INDEX).write_text("[]")
    with pytest.raises(InputError, match=f"{INDEX}: cannot be read"):
        opened(source)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_named_when_its_layer_is_read(sharded, value):
    source, folder = sharded
    rewrite(folder, lambda tensors: tensors[VICTIM][3].fill_(value))
    _, _, reader = shell_and_reader(source)
    with reader:
        reader.open(0)
        with pytest.raises(InputError, match=rf"{VICTIM} contains NaN or inf"):
            reader.open(1)


def test_a_weight_too_large_for_the_dtype_is_named(sharded):
    source, folder = sharded
    rewrite(folder, lambda tensors: tensors[VICTIM][3].fill_(1e30))
    _, _, reader = shell_and_reader(source, torch.float16)
    with reader, pytest.raises(InputError, match=VICTIM):
        reader.open(1)


def test_a_file_that_shrinks_while_it_is_read_ahead_is_named(sharded):
    source, folder = sharded
    _, _, reader = shell_and_reader(source)
    path = shard_of(folder, VICTIM)
    path.write_bytes(path.read_bytes()[: reader.shards[VICTIM].start + 8])
    with reader:
        reader.open(0)
        with pytest.raises(InputError, match=rf"{path.name}.*shorter than it was"):
            reader.open(1)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta stands for any accelerator: what is read is handed over
def test_the_next_layer_is_read_while_one_is_in_use(sharded, device, monkeypatch):
    source, _ = sharded
    _, spec, reader = shell_and_reader(source, device=torch.device(device))
    read = threading.Event()
    names, now = [], []

    def note(function):
        def noted(stored, *arguments):
            result = function(stored, *arguments)
            if threading.current_thread() is threading.main_thread():
                now.append(stored)
            else:
                names.append(stored)
                if len(names) == len([name for name in reader.shards if name.startswith(f"{spec.layers}.1.")]):
                    read.set()
            return result

        return noted

    monkeypatch.setattr(models.streaming, "warm", note(warm))
    monkeypatch.setattr(models.streaming, "read_tensor", note(read_tensor))
    with reader:
        reader.open(0)
        assert read.wait(30)
        assert names == [stored for name, stored in reader.shards.items() if name.startswith(f"{spec.layers}.1.")]
        now.clear()
        reader.open(1)
        assert len(now) == (0 if device == "meta" else len(names)), "what was handed over is not read again"


def test_closing_gives_up_what_is_read_ahead(sharded, monkeypatch):
    source, _ = sharded
    _, _, reader = shell_and_reader(source)
    begun, asked = threading.Event(), []

    def endless(stored, given_up):
        begun.set()
        asked.append(stored)
        while not given_up():
            pass

    monkeypatch.setattr(models.streaming, "warm", endless)
    with reader:
        reader.open(0)
        assert begun.wait(30)
    assert len(asked) == 1


def test_long_tensors_are_warmed_whole_in_pieces(sharded, monkeypatch):
    _, folder = sharded
    stored = read_header(shard_of(folder, VICTIM))[VICTIM]
    pieces = []
    monkeypatch.setattr(models.shards, "CHUNK", 1000)
    monkeypatch.setattr(models.shards, "read_into", lambda piece, buffer: pieces.append((piece.start, len(buffer))))
    warm(stored, lambda: False)
    assert pieces[0][0] == stored.start
    assert sum(length for _, length in pieces) == stored.nbytes
    assert all(start + length == following for (start, length), (following, _) in itertools.pairwise(pieces))
    pieces.clear()
    warm(stored, lambda: len(pieces) == 2)
    assert len(pieces) == 2


def test_one_file_without_an_index_is_read_too(tmp_path):
    source = save(tiny_model(), tmp_path, "1GB")
    assert (tmp_path / SINGLE).exists()
    assert opened(source)[2]
    shutil.copy(tmp_path / SINGLE, tmp_path / "consolidated.safetensors")  # a second copy is not read
    assert {stored.path.name for stored in opened(source)[2].values()} == {SINGLE}
