"""Families, and models from a folder with errors a user can act on. No network: every name is a local folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, GPT2Config, MistralConfig

from models import FAMILIES, decoder_spec, require_supported
from models.load import (
    ModelSource,
    context_length,
    load_config,
    load_model,
    load_skeleton,
    load_tokenizer,
    model_fingerprint,
    pick_attention,
    pick_dtype,
)
from quantize.spec import Norm, Rows, SharedRows
from utils.device import DTYPES
from utils.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DAMAGED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def copied(model_folder, tmp_path) -> Path:
    """A copy of the tiny model's folder that a test may damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "copied"))


def load(folder: Path, dtype: torch.dtype = torch.float32):
    source = ModelSource(str(folder))
    return load_model(source, load_config(source), dtype, "sdpa")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def fingerprint(folder: Path) -> str:
    source = ModelSource(str(folder))
    return model_fingerprint(source, load_config(source))


def load_error(folder: Path) -> str:
    """The one line that loading `folder` ends with."""
    with pytest.raises(InputError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_supported_families_include_llama_and_mistral():
    assert {"llama", "mistral"} <= set(FAMILIES)
    shape = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    assert decoder_spec(MistralConfig(**shape)) == decoder_spec(tiny_config())


@pytest.mark.parametrize("model_type", ["gpt2", "", None])
def test_an_unsupported_model_type_lists_what_is_supported(model_type):
    with pytest.raises(
        InputError, match=rf"model type '{model_type}' is not supported; supported are .*llama, mistral"
    ):
        require_supported(model_type)


def test_an_unsupported_model_is_refused_before_its_weights_are_looked_at(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'gpt2' is not supported; supported are .*llama"):
        load_config(ModelSource(str(tmp_path)))


@pytest.mark.parametrize(("kv_heads", "sharing"), [(6, 1), (2, 3), (1, 6)])
def test_o_proj_folds_into_v_proj_alone_or_shared_by_the_query_heads_of_a_kv_head(kv_heads, sharing):
    groups = {group.name: group for group in decoder_spec(tiny_config(num_key_value_heads=kv_heads)).groups}
    value = "self_attn.v_proj"
    assert groups["o"].absorbers == (Rows(value) if sharing == 1 else SharedRows(value, 0, sharing, 16),)
    assert groups["qkv"].absorbers == (Norm("input_layernorm"),)
    assert groups["gate_up"].absorbers == (Norm("post_attention_layernorm"),)
    assert groups["down"].absorbers == (Rows("mlp.up_proj"),)


def test_groups_cover_every_linear_of_a_layer_once_and_all_paths_exist():
    model = tiny_model()
    spec = decoder_spec(model.config)
    paths = [path for group in spec.groups for path in group.linears]
    for layer in spec.decoder_layers(model):
        found = {name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        assert sorted(paths) == sorted(found)
        for group in spec.groups:
            assert group.representative in group.linears
            assert all(layer.get_submodule(absorber.path) is not None for absorber in group.absorbers)
        assert layer.get_submodule(spec.attention) is layer.self_attn


def test_a_linear_is_called_as_in_the_whole_model():
    model = tiny_model()
    spec = decoder_spec(model.config)
    assert model.get_submodule(spec.linear_key(1, "mlp.up_proj")) is model.model.layers[1].mlp.up_proj


def test_a_model_comes_back_in_the_dtype_asked_for_and_ready_for_inference(model_folder):
    expected = tiny_model()
    for dtype in DTYPES.values():
        model = load(model_folder, dtype)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected.get_parameter(name).to(dtype))


def test_a_skeleton_has_shapes_and_no_memory():
    skeleton = load_skeleton(tiny_config())
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert skeleton.model.layers[0].mlp.down_proj.in_features == 80


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--model .*nowhere: no such folder"):
        load_config(ModelSource(str(tmp_path / "nowhere")))


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json, so it is not a Hugging Face model"):
        load_config(ModelSource(str(tmp_path)))


def test_a_config_that_is_no_json_is_named(copied):
    (copied / "config.json").write_text("{")
    assert load_error(copied).startswith(f"--model {copied}: cannot be loaded (")


def test_a_config_with_a_wrong_value_is_named(copied):
    edit_config(copied, num_attention_heads="six")
    error = load_error(copied)
    assert error.startswith(f"--model {copied}: cannot be loaded (")
    assert "num_attention_heads" in error


def test_pickled_weights_are_refused_and_never_opened(copied, monkeypatch):
    (copied / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), copied / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    error = load_error(copied)
    assert error.startswith(f"--model {copied}: the folder has no safetensors weights; ")
    assert "pickled weights are never loaded" in error


def test_a_missing_tensor_is_named(copied):
    edit_weights(copied, lambda weights: weights.pop(DAMAGED))
    assert load_error(copied) == f"--model {copied}: its checkpoint lacks {DAMAGED} (and 0 more)"


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_named(copied, damage):
    edit_weights(copied, lambda weights: weights[DAMAGED].__setitem__((2, 3), damage))
    assert load_error(copied) == f"--model {copied}: {DAMAGED} contains NaN or inf; the checkpoint is damaged"


def test_a_weight_beyond_half_precision_is_named(copied):
    edit_weights(copied, lambda weights: weights[DAMAGED].__setitem__((2, 3), 1e6))
    load(copied)
    source = ModelSource(str(copied))
    with pytest.raises(InputError, match=DAMAGED):
        load_model(source, load_config(source), torch.float16, "sdpa")


def test_a_tensor_of_another_shape_is_named(copied):
    edit_weights(copied, lambda weights: weights.update({DAMAGED: weights[DAMAGED][:, :7].clone()}))
    assert load_error(copied).startswith(f"--model {copied}: ")


@pytest.mark.parametrize("length", [0, 1000], ids=["empty", "cut short"])
def test_a_weights_file_that_is_not_whole_is_an_input_error(copied, length):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert load_error(copied).startswith(f"--model {copied}: ")


def test_a_folder_without_tokenizer_is_named(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_tokenizer(ModelSource(str(tmp_path)))


def test_fingerprint_is_the_same_for_a_copy_in_another_folder(model_folder, copied):
    assert fingerprint(copied) == fingerprint(model_folder)


def test_fingerprint_tells_two_models_of_one_architecture_apart(model_folder, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == (model_folder / "config.json").read_text()
    assert (tmp_path / "model.safetensors").stat().st_size == (model_folder / "model.safetensors").stat().st_size
    assert fingerprint(tmp_path) != fingerprint(model_folder)


@pytest.mark.parametrize(
    "changes", [{"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rms_norm_eps": 1e-3}]
)
def test_fingerprint_tells_two_configs_of_the_same_weights_apart(model_folder, copied, changes):
    edit_config(copied, **changes)
    assert fingerprint(copied) != fingerprint(model_folder)


def test_fingerprint_ignores_who_wrote_the_config(model_folder, copied):
    edit_config(copied, transformers_version="0.0.0")
    assert fingerprint(copied) == fingerprint(model_folder)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_fingerprint_is_the_same_before_and_after_loading(model_folder, dtype):
    source = ModelSource(str(model_folder))
    config = load_config(source)
    before = model_fingerprint(source, config)
    load_model(source, config, dtype, "eager")
    assert model_fingerprint(source, config) == before


@pytest.mark.parametrize(
    ("own", "device", "expected"),
    [
        (torch.float16, CPU, torch.float32),
        (torch.bfloat16, CPU, torch.float32),
        (torch.float16, CUDA, torch.float16),
        (torch.bfloat16, CUDA, torch.bfloat16),
        (torch.float32, CUDA, torch.float16),
        (None, CUDA, torch.float16),
    ],
)
def test_auto_dtype_is_float32_on_the_cpu_and_the_checkpoint_s_own_half_elsewhere(own, device, expected):
    assert pick_dtype("auto", tiny_config(dtype=own), device, DTYPES) is expected


@pytest.mark.parametrize(("asked", "softcap", "given"), [("sdpa", 50.0, "eager"), ("sdpa", None, "sdpa")])
def test_soft_capped_attention_is_not_left_to_sdpa(asked, softcap, given):
    assert pick_attention(asked, Gemma2Config(attn_logit_softcapping=softcap)) == given
    assert pick_attention(asked, tiny_config()) == asked
    assert pick_attention("flex_attention", Gemma2Config()) == "flex_attention"


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_dtype_by_name_is_that_dtype_everywhere(name, device):
    assert pick_dtype(name, tiny_config(dtype=torch.bfloat16), device, DTYPES) is DTYPES[name]


@pytest.mark.parametrize(("maximum", "expected"), [(64, 64), (2048, 2048), (131072, 2048)])
def test_context_is_the_model_s_own_up_to_2048(maximum, expected):
    assert context_length(tiny_config(max_position_embeddings=maximum)) == expected


def test_context_of_a_model_without_maximum_is_2048():
    assert context_length(object()) == 2048


def mapped_from(path: Path) -> list[range]:
    """The addresses at which this process has the file mapped, as Linux tells them."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [line[0].split("-") for line in lines if line[-1] == str(path)]
    return [range(int(first, 16), int(last, 16)) for first, last in ends]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped where")
@pytest.mark.parametrize(("dtype", "mapped"), [(torch.float32, True), (torch.float16, False)])
def test_weights_in_the_dtype_of_their_files_are_mapped_from_them_and_not_copied(dtype, mapped, model_folder):
    model = load(model_folder, dtype)
    places = mapped_from((model_folder / "model.safetensors").resolve())
    found = {any(parameter.data_ptr() in place for place in places) for parameter in model.parameters()}
    assert found == {mapped}
