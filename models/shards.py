"""Safetensors files as a table of tensors, read one tensor at a time with plain file I/O.

Mapped files would count as resident memory wherever they were touched; a read leaves nothing behind but the tensor.
"""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn
from transformers import PretrainedConfig

from models import COMPOSITES, decoder_spec
from models.load import TEXT_PART, ModelSource
from utils.errors import InputError
from utils.memory import all_finite

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 2**24  # bytes read at a time where a read can be given up
LARGEST_HEADER = 10**8  # bytes, as in the format's own reader


@dataclass(frozen=True)
class Stored:
    """Where one tensor is: file, first byte, and what it is."""

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Shards = dict[str, Stored]  # by the name that the model has for the tensor


def open_shards(source: ModelSource, config: PretrainedConfig, skeleton: nn.Module) -> Shards:
    """Every tensor of a checkpoint that `skeleton`, its model without weights, needs; no tensor is read yet.

    Raises InputError if the family cannot be read tensor by tensor, if a file is missing or damaged, or if a tensor is
    missing or has another shape or a dtype that is none of a weight.
    """
    if decoder_spec(config).experts is not None:
        raise InputError(
            f"--stream: model type '{config.model_type}' cannot be streamed, its checkpoints hold experts under other "
            "names than the model; leave the flag out, or give --no-stream"
        )
    shards: Shards = {}
    for path in shard_paths(source, config):
        shards |= read_header(path)
    if config.model_type in COMPOSITES.values():
        shards = {text_name(name): stored for name, stored in shards.items()}
    return required(shards, skeleton, source.name)


def shard_paths(source: ModelSource, config: PretrainedConfig) -> list[Path]:
    """The safetensors files of a local folder, or of a hub id (fetched if they are not there yet)."""
    folder = Path(source.name)

    def fetch(name: str) -> Path | None:
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        try:
            return Path(hf_hub_download(source.name, name, revision=getattr(config, "_commit_hash", None)))
        except EntryNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"--model {source.name}: {name} cannot be fetched ({error})") from None

    index = fetch(INDEX)
    names = [SINGLE] if index is None else shard_names(index)
    paths = {name: fetch(name) for name in names}
    for name, path in paths.items():
        if path is None:
            raise InputError(f"--model {source.name}: its weights file {name} is missing")
    return list(paths.values())


def shard_names(index: Path) -> list[str]:
    """The files that an index names. Raises InputError if it cannot be read."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: cannot be read ({type(error).__name__}: {error})") from None
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index}: names a file outside its folder ({name})")
    return names


def read_header(path: Path) -> Shards:
    """What a safetensors file holds. Raises InputError if it is damaged, or shorter than its header says."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LARGEST_HEADER, size):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _stored(path, 8 + length, size, entry) for name, entry in header.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path}: is damaged, no whole safetensors file ({error}); fetch it again") from None


def _stored(path: Path, data_start: int, size: int, entry: dict) -> Stored:
    first, end = entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])
    stored = Stored(path, data_start + first, tuple(entry["shape"]), dtype or torch.uint8)
    if first < 0 or data_start + end > size:
        raise ValueError("it ends before its last tensor")
    if dtype is not None and end - first != stored.nbytes:
        raise ValueError("a tensor has not the size its shape asks for")
    return stored


def text_name(name: str) -> str:
    """The name that a text model has for a tensor, from that in a checkpoint of a larger model."""
    for pattern, replacement in TEXT_PART.items():
        name = re.sub(pattern, replacement, name)
    return name


def required(shards: Shards, skeleton: nn.Module, model_name: str) -> Shards:
    """Those of `shards` that `skeleton` has; of tied tensors one is enough. Raises InputError as `open_shards`."""
    tied = dict(skeleton.all_tied_weights_keys)
    tied |= {source: target for target, source in tied.items()}
    needed = skeleton.state_dict()
    for name, tensor in needed.items():
        stored = shards.get(name)
        if stored is None and tied.get(name) in shards:
            continue
        if stored is None:
            raise InputError(f"--model {model_name}: its checkpoint lacks {name}, or has another name for it")
        if stored.shape != tuple(tensor.shape):
            shapes = f"{list(stored.shape)}, not {list(tensor.shape)} as config.json asks for"
            raise InputError(f"--model {model_name}: {name} in {stored.path.name} has the shape {shapes}")
        if stored.dtype not in DTYPES.values():
            raise InputError(f"--model {model_name}: {name} in {stored.path.name} is not of a floating-point type")
    return {name: shards[name] for name in needed if name in shards}


def read_tensor(stored: Stored, name: str, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, on the host. Raises InputError if it cannot be read or has NaN or inf."""
    raw = torch.empty(stored.nbytes, dtype=torch.uint8)
    read_into(stored, memoryview(raw.numpy()))
    tensor = raw.view(stored.dtype).view(stored.shape).to(dtype)
    if not all_finite(tensor):
        raise InputError(f"{stored.path}: {name} contains NaN or inf; the checkpoint is damaged")
    return tensor


def read_into(stored: Stored, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of a tensor, or with as many of them as there is room for."""
    try:
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.start)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done : done + 2**30])
                if not count:
                    raise InputError(f"{stored.path}: is shorter than it was; it is being changed by somebody else")
                done += count
    except OSError as error:
        raise InputError(f"{stored.path}: cannot be read ({error.strerror})") from None


def warm(stored: Stored, given_up: Callable[[], bool]) -> None:
    """Read the bytes of a tensor and forget them: the system has them in its file cache now, our process has not."""
    buffer = memoryview(bytearray(min(CHUNK, stored.nbytes)))
    for start in range(0, stored.nbytes, CHUNK):
        if given_up():
            return
        part = buffer[: min(CHUNK, stored.nbytes - start)]
        read_into(Stored(stored.path, stored.start + start, stored.shape, stored.dtype), part)
