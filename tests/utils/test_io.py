"""Files: whole or not at all, and errors that name them."""

import json

import pytest
import torch

from utils.errors import InputError
from utils.io import read_tensors, write_atomically, write_json, write_tensors


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half of the new")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["kept.txt"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


def test_folders_are_made_on_the_way(tmp_path):
    write_json(tmp_path / "a/b/c.json", 1)
    assert (tmp_path / "a/b/c.json").read_text() == "1\n"


def test_json_is_readable_by_people_and_comes_back(tmp_path):
    value = {"name": "Ωμέγα", "values": [1, 2.5, None, True]}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "Ωμέγα" in text
    assert text.count("\n") > 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_is_not_json_is_refused_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "x.json"
    write_json(path, "old")
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"value": value})
    assert json.loads(path.read_text()) == "old"
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_tensors_come_back_to_the_bit_with_their_metadata(tmp_path, dtype):
    tensors = {"a": torch.arange(6).view(2, 3).to(dtype), "b.c": torch.ones(0, 4, dtype=dtype)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"model": "m"})
    found, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"model": "m"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_shared_strided_and_trainable_tensors_can_be_written(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "whole": base,
        "same": base,
        "column": base[:, 1],
        "turned": base.T,
        "trained": base.clone().requires_grad_(),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    found, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x02}q\x00."], ids=["empty", "json", "pickle"])
def test_a_file_that_is_not_safetensors_is_named(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.safetensors: not a readable safetensors file"):
        read_tensors(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such file"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_tensors(tmp_path)
