"""How much there is left on a GPU and on disks, and how fast the machine is; for host memory see `utils.memory`."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

MATRIX = {"cpu": 1536, "cuda": 8192}  # sides of the matrices that are multiplied to measure the rate
COPIED_BYTES = 2**26
SPARE = 1 / 8  # of a GPU's free memory, that what is computed about it may be wrong by


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has free, what PyTorch only caches among them; None for the CPU."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def free_disk(folder: Path) -> tuple[int, int]:
    """The file system that `folder` is or would be on, as a number, and its free bytes."""
    path = nearest_existing(folder)
    return os.stat(path).st_dev, shutil.disk_usage(path).free


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions per second of a matrix product, in `dtype`; on a CPU in float32."""
    side, kind = MATRIX[device.type], dtype if device.type == "cuda" else torch.float32
    matrix = torch.randn(side, side, device=device, dtype=kind)
    return 2 * side**3 / best_seconds(lambda: matrix @ matrix, device)


def copy_rate(device: torch.device) -> float:
    """Bytes per second from the host to a GPU; infinite for the CPU."""
    if device.type != "cuda":
        return float("inf")
    host = torch.empty(COPIED_BYTES, dtype=torch.uint8)
    return COPIED_BYTES / best_seconds(lambda: host.to(device), device)


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least of two runs, behind one that warms up."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])
