"""Memory: how much the host has, and large tensors: in memory, in files that the system pages out, and checked."""

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import InputError

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]  # shape, dtype → a tensor, not initialised
CGROUP = Path("/sys/fs/cgroup")
HIDDEN_SHARE = 0.5  # of the free memory, the most that hidden states take before they live in files


def available_memory() -> int:
    """Bytes of host memory that can be had without pushing anything out: the machine's, or the container's if less."""
    free = [_machine_memory(), _container_memory(CGROUP)]
    return min(bytes_free for bytes_free in free if bytes_free is not None)


def _machine_memory() -> int:
    """What Linux estimates; elsewhere all memory there is."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_memory(folder: Path) -> int | None:
    """What the limit of a control group (version 2) leaves, cached files not counted; None without a limit."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        counters = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return limit - used + int(counters["inactive_file"]) + int(counters["active_file"])
    except (OSError, KeyError, ValueError):
        return None


def in_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A tensor in ordinary memory, by default the host's."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def memory_of(device: torch.device) -> Allocate:
    """Makes tensors in the memory of `device`."""
    return partial(in_memory, device=device)


def all_finite(x: Tensor) -> bool:
    """Whether `x` has neither NaN nor inf: both show in the extremes. Nothing as large as `x` is made."""
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def too_large(hidden: int, free: int) -> bool:
    """Whether hidden states of so many bytes are to live in files, because they would fill the `free` memory."""
    return hidden > HIDDEN_SHARE * free


def on_disk(folder: Path) -> Allocate:
    """Makes tensors that live in temporary files in `folder`: memory is used as long as there is some to spare.

    A file has no name from the beginning, so its space is free again when its tensor is, however the process ends.
    Raises InputError if there is no room for it.
    """

    def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                _reserve(file.fileno(), size)
                mapping = mmap.mmap(file.fileno(), size)
        except OSError as error:
            problem = f"{size / 1e9:.1f} GB for hidden states cannot be written there ({error.strerror})"
            raise InputError(f"--cache_dir {folder}: {problem}; choose another folder") from None
        return torch.frombuffer(mapping, dtype=dtype).view(tuple(shape))

    return allocate


def _reserve(handle: int, size: int) -> None:
    """Give the file its space now: a mapping that runs out of disk later would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)
