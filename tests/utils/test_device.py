"""Devices: choosing one, moving things there and back."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tools.fake_device import fake_device
from utils.device import cpu_threads, describe, on_device, peak_memory, pick_device, tf32, to_device
from utils.errors import InputError

CPU, META = torch.device("cpu"), torch.device("meta")


def test_the_default_is_an_accelerator_if_there_is_one(monkeypatch):
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert pick_device(None).type == expected


def test_a_device_by_name():
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "", "xla", "hpu"])
def test_a_device_that_is_not_there_is_an_input_error(name):
    with pytest.raises(InputError, match=f"--device {name}: not usable here") as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)


def test_a_device_without_memory_is_no_place_to_run():
    with pytest.raises(InputError, match="--device meta"):
        pick_device("meta")


@pytest.fixture
def module():
    """A real module; its tensors know their device and have no content, so that a GPU need not be there."""
    with FakeTensorMode():
        yield nn.BatchNorm1d(2, affine=False)


def places(module: nn.Module) -> set[str]:
    return {str(tensor.device) for tensor in module.state_dict().values()}


def test_a_module_comes_back_to_the_host(module):
    with on_device(module, torch.device("cuda:0")):
        assert places(module) == {"cuda:0"}
    assert places(module) == {"cpu"}


def test_a_module_comes_back_after_an_exception(module):
    with pytest.raises(KeyError), on_device(module, torch.device("cuda:0")):
        raise KeyError
    assert places(module) == {"cpu"}


@pytest.mark.parametrize(
    ("change", "copied"),
    [
        (lambda linear: None, 0),
        (lambda linear: linear.weight.mul_(2), 48),
        (lambda linear: setattr(linear.weight, "data", linear.weight.data * 2), 48),
        (lambda linear: setattr(linear, "bias", nn.Parameter(torch.ones(4, device="cuda:0"))), 16),
        (lambda linear: linear.counts.add_(1), 40),
        (lambda linear: setattr(linear, "counts", linear.counts + 1), 40),
        (lambda linear: linear.register_buffer("codes", torch.ones(7, device="cuda:0")), 28),
        (lambda linear: setattr(linear, "bias", None), 0),
    ],
)
def test_only_what_was_changed_is_copied_back(change, copied):
    with fake_device() as gpu, torch.no_grad():
        linear = nn.Linear(3, 4)
        linear.register_buffer("counts", torch.zeros(5, dtype=torch.int64))
        host = {name: tensor.untyped_storage() for name, tensor in linear.state_dict(keep_vars=True).items()}
        with on_device(linear, gpu.device):
            assert places(linear) == {"cuda:0"}
            change(linear)
        assert places(linear) == {"cpu"}
        assert gpu.traffic.bytes_to_host == copied
        again = linear.state_dict(keep_vars=True)
        same = sum(name in again and again[name].untyped_storage() is storage for name, storage in host.items())
        assert same == 3 - (change.__code__.co_names != () and copied != 28)


def test_tensors_move_wherever_they_are_nested():
    tensor = torch.ones(1)
    value = {"mask": None, "position": (tensor, [tensor, 3]), "deep": {"x": tensor}, "flag": True}
    moved = to_device(value, META)
    assert moved["position"][0].device == moved["position"][1][0].device == moved["deep"]["x"].device == META
    assert (moved["mask"], moved["position"][1][1], moved["flag"]) == (None, 3, True)
    assert isinstance(moved["position"], tuple)
    assert tensor.device == CPU


def test_threads_are_restored_also_after_an_exception():
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with cpu_threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(KeyError), cpu_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("device", "inside"), [("cpu", "highest"), ("cuda", "high")])
def test_a_gpu_alone_multiplies_by_fewer_bits_and_only_inside_the_block(device, inside):
    with tf32(torch.device(device)):
        assert torch.get_float32_matmul_precision() == inside
    with pytest.raises(KeyError), tf32(torch.device(device)):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_peak_memory_of_the_host_is_at_least_what_is_held():
    held = torch.ones(2**24)  # 64 MiB
    figures = peak_memory(CPU)
    assert figures["peak_memory_bytes"] == figures["peak_host_memory_bytes"] > held.nbytes


def test_a_cpu_is_described_by_its_threads():
    assert describe(CPU) == f"cpu ({torch.get_num_threads()} threads)"
