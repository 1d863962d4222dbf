"""How much memory and disk there is."""

import os
import shutil
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes of host memory that this process can still take, a container's limit counted in; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text(encoding="utf-8").strip() for name in ("max", "current"))
    except OSError:
        limit = "max"
    if limit != "max":
        found.append(int(limit) - int(used))
    return min(found, default=None)


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has free; None for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def free_disk(folder: Path) -> tuple[int, int]:
    """The file system that `folder` is or would be on, as a number, and its free bytes."""
    path = nearest_existing(folder)
    return os.stat(path).st_dev, shutil.disk_usage(path).free
