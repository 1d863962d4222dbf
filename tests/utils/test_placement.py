"""A model spread over devices by accelerate's device map."""

import pytest
import torch
from conftest import random_tokens, tiny_model

from models import decoder_spec
from quantize.bits import BitSettings
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationSettings
from quantize.settings import QuantSettings
from utils.errors import InputError
from utils.placement import device_map, free_memory, parse_memory, placed, room_for_weights

CPU = torch.device("cpu")
TOKENS = random_tokens(2, 12)


@pytest.fixture(scope="module")
def model():
    made = tiny_model(num_hidden_layers=4)
    config = QuantSettings(BitSettings(4, 4), rotation=RotationSettings(16, 8))
    quantize_model(made, decoder_spec(made.config), random_tokens(4, 16), None, config, CPU)
    return made


def state(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("limit", ["80KB", "120KB", "1GB"])
def test_a_quantized_model_partly_on_disk_computes_the_same_and_comes_back_whole(model, limit):
    before = state(model)
    with torch.no_grad():
        expected = model(TOKENS).logits
        with placed(model, CPU, spread=True, limits=parse_memory([f"cpu={limit}"])):
            places = set(model.hf_device_map.values())
            assert ("disk" in places) == (limit != "1GB")
            codes = model.model.layers[-1].mlp.down_proj.codes
            assert codes.is_meta == (limit != "1GB"), "what is on disk is not in memory too"
            assert torch.equal(model(TOKENS).logits, expected)
            written = model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(model(TOKENS).logits, expected)
        assert torch.equal(model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0), written)
    assert not hasattr(model, "hf_device_map")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_model_comes_back_when_the_block_fails(model):
    before = state(model)
    with pytest.raises(KeyError), placed(model, CPU, spread=True, limits={"cpu": "160KB"}):
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_limits_that_leave_no_room_are_named(model):
    with pytest.raises(InputError, match="--max_memory"), placed(model, CPU, spread=True, limits={"cpu": "1KB"}):
        pass


def tensors(model) -> list:
    return [*model.named_parameters(), *model.named_buffers()]


@pytest.fixture
def two_gpus(model, monkeypatch) -> int:
    """Two GPUs with room for the model and a twentieth more each; half of it is in PyTorch's cache. Bytes that fit."""
    room = sum(tensor.nbytes for _, tensor in tensors(model)) * 21 // 20
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room // 2, 10 * room))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: room)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda number: room - room // 2)
    return room


def test_what_pytorch_has_cached_counts_as_free(two_gpus):
    free = free_memory()
    assert free[0] == free[1] == pytest.approx(two_gpus, abs=2)
    assert free["cpu"] > 0


def test_weights_leave_an_eighth_of_every_gpu_to_activations(model, two_gpus):
    limits = room_for_weights(model, free_memory())
    places = device_map(model, limits)
    held = dict.fromkeys(limits, 0)
    for name, tensor in tensors(model):
        part = next(part for part in places if name == part or name.startswith(f"{part}."))
        held[places[part]] += tensor.nbytes
    assert 0 < held[0] <= two_gpus * 7 / 8
    assert 0 < held[1] <= two_gpus * 7 / 8
    assert held["cpu"] == 0


def test_a_model_on_the_host_may_stay_where_less_than_as_much_again_is_free(model):
    free = sum(tensor.nbytes for tensor in state(model).values()) // 2
    assert set(device_map(model, room_for_weights(model, {"cpu": free})).values()) == {"cpu"}


def test_running_out_of_memory_names_what_helps(model):
    with pytest.raises(InputError, match="--multigpu"), placed(model, CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")


def test_limits_are_read_by_device():
    assert parse_memory(["0=20GiB", "1=10GB", "cpu=60GiB"]) == {0: "20GiB", 1: "10GB", "cpu": "60GiB"}
    assert parse_memory([]) == {}


@pytest.mark.parametrize("limit", ["20GiB", "cuda=20GiB", "0=", "0=much", "=5GB", "0"])
def test_a_limit_that_cannot_be_read_is_named(limit):
    with pytest.raises(InputError, match=f"--max_memory {limit}"):
        parse_memory([limit])
