"""How much there is left on a GPU and on disks; for host memory see `utils.memory`."""

import os
import shutil
from pathlib import Path

import torch


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
