"""Devices and memory: where things run, moving one layer there and back, and what it cost."""

import resource
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from utils.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(name: str | None, number: int = 0) -> torch.device:
    """The device called `name`, by default the accelerator with this number, else the CPU.

    Raises InputError if it is missing.
    """
    if name is None and (number == 0 or not torch.cuda.is_available()):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name is None:
        name = f"cuda:{number}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    return device


def home_of(module: nn.Module) -> torch.device:
    """Where `module` is, between the times that it is used."""
    tensor = next(module.parameters(), next(module.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """`module` is on `device` inside the block, and after it where it was before.

    Tensors that are not changed in the block are not copied back: those that they were copied from wait for them.
    """
    home = home_of(module)
    lent = [] if home == device else [(held, name, tensor, tensor.data) for held, name, tensor in tensors_of(module)]
    module.to(device)
    waiting = [(*each, _mark(each[0][each[1]])) for each in lent]
    del lent
    try:
        yield
    finally:
        while waiting:
            held, name, tensor, data, mark = waiting.pop()
            if held.get(name) is not None and _mark(held[name]) == mark:
                tensor.data = data
                held[name] = tensor  # of a buffer it was another one
        module.to(home)


def tensors_of(module: nn.Module) -> Iterator[tuple[dict, str, torch.Tensor]]:
    """Every parameter and buffer in `module`, with the dict that holds it and its name there."""
    for owner in module.modules():
        for held in (owner._parameters, owner._buffers):
            yield from ((held, name, tensor) for name, tensor in held.items() if tensor is not None)


def _mark(tensor: torch.Tensor) -> tuple[object, int]:
    """What is equal as long as the tensor has its memory, and nothing was written there."""
    return weakref.ref(tensor.untyped_storage()), tensor._version


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Use `count` threads for operations on the CPU inside the block; None leaves the number alone."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Inside the block a GPU multiplies float32 by 10 bits of each factor's fraction, in an eighth of the time.

    A CPU multiplies as ever.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def to_device(value: object, device: torch.device) -> object:
    """`value` with every tensor in its tuples, lists and dicts on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    return value


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes since the start: of this process on the host, and of the accelerator where one is used.

    `peak_memory_bytes` is that of the device the layers ran on.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host
    return {"peak_memory_bytes": used, "peak_host_memory_bytes": host}


def describe(device: torch.device) -> str:
    """Name of the device for results: `cpu (2 threads)` or `cuda (NVIDIA H200)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"
