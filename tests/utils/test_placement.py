"""A model spread over devices by accelerate's device map."""

import pytest
import torch
from conftest import random_tokens, tiny_model

from models import decoder_spec
from quantize.quantization import quantize_model
from quantize.settings import BitSettings, QuantSettings, RotationSettings
from utils.errors import InputError
from utils.placement import parse_memory, placed

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


@pytest.mark.parametrize("limit", ["80KB", "160KB", "1GB"])
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
