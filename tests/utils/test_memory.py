"""Large tensors are checked without anything as large being made."""

from collections.abc import Callable

import pytest
import torch
from conftest import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

import utils.memory
from models.load import ModelSource, load_model
from quantize.observe import require_finite
from utils.errors import InputError
from utils.memory import all_finite, available_memory, on_disk

HALF_TO_DOUBLE = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class LargestMask(TorchDispatchMode):
    """Remembers how large the largest tensor of truth values is that was made."""

    largest = 0

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype is torch.bool:
            self.largest = max(self.largest, made.numel())
        return made


@pytest.mark.parametrize("dtype", HALF_TO_DOUBLE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(bad, dtype):
    x = torch.randn(7, 1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(x)
    for place in (0, 1, 63, 3500, 7005, 7006):
        damaged = x.clone()
        damaged.view(-1)[place] = bad
        assert not all_finite(damaged)
        assert not all_finite(damaged.T)


@pytest.mark.parametrize("dtype", HALF_TO_DOUBLE)
def test_the_largest_numbers_there_are_and_none_at_all_are_finite(dtype):
    limits = torch.finfo(dtype)
    assert all_finite(torch.tensor([limits.min, 0, limits.max], dtype=dtype))
    assert all_finite(torch.empty(0, 3, dtype=dtype))


def test_weights_and_activations_are_checked_without_masks_of_their_size(model_folder):
    with LargestMask() as watched:
        load_model(ModelSource(str(model_folder)), tiny_config(), torch.float32, "sdpa")
        require_finite(torch.ones(5, 200), "down_proj")
    assert watched.largest <= 2


def test_memory_is_that_of_the_machine_or_of_the_container_if_less(tmp_path, monkeypatch):
    machine = available_memory()
    assert machine > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(utils.memory, "CGROUP", tmp_path)
    assert available_memory() == pytest.approx(machine, rel=0.5)
    for name, content in (("max", "1000"), ("current", "700"), ("stat", "anon 1\ninactive_file 50\nactive_file 7\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert available_memory() == 357


def test_a_tensor_in_a_file_keeps_what_is_written_to_it_and_its_file_has_no_name(tmp_path):
    tensor = on_disk(tmp_path / "new")((3, 4), torch.bfloat16)
    assert list((tmp_path / "new").iterdir()) == []
    tensor.copy_(torch.arange(12).view(3, 4))
    tensor[1:2].mul_(2)
    assert tensor.tolist() == [[0, 1, 2, 3], [8, 10, 12, 14], [8, 9, 10, 11]]
    assert tensor.shape == (3, 4)
    assert tensor.dtype is torch.bfloat16


def test_a_disk_without_room_is_said_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"--cache_dir .*cannot be written"):
        on_disk(tmp_path)((2**55,), torch.float16)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache_dir"):
        on_disk(tmp_path / "file")((2,), torch.float16)
