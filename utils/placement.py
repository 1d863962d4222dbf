"""Where a whole model is while something runs it: on one device, or spread over several with accelerate."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from utils.capacity import free_device_memory
from utils.device import on_device
from utils.errors import InputError
from utils.memory import available_memory

Memory = dict[int | str, int | str]  # device number, or "cpu", → the most it may hold: bytes, or such as "20GiB"
# Of a GPU's free memory, for activations. A token of a 70B takes 28 bytes for each of 28,672 channels (rounded inputs
# and their float32 copies), 10 for each of 128,256 logits, and 0.3 MB of keys and values: 5 GB for 2048 tokens, an
# eighth of 40 GB. And its weights, 141 GB, still fit into seven eighths of two GPUs of 79 GiB.
ACTIVATION_SHARE = 1 / 8


@contextmanager
def placed(
    model: nn.Module, device: torch.device, spread: bool = False, limits: Memory | None = None
) -> Iterator[None]:
    """`model` is ready to run on inputs on `device` inside the block, and after it where it was before.

    With `spread` its layers are dealt to all visible GPUs, then to the host, then to disk, as far as the memory of
    each, less some for activations, or its limit, goes (accelerate's device map). Raises InputError if it does not fit.
    """
    if not spread:
        try:
            with on_device(model, device):
                yield
        except torch.OutOfMemoryError as error:
            remedy = "try --multigpu, or a lower --eval_batch_size"
            reason = str(error).splitlines()[0]
            raise InputError(f"the model does not fit on {device} as a whole ({reason}); {remedy}") from None
        return
    with tempfile.TemporaryDirectory(prefix="offload_") as folder, _dispatched(model, limits, folder):
        yield


@contextmanager
def _dispatched(model: nn.Module, limits: Memory | None, folder: str) -> Iterator[None]:
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    places = device_map(model, limits or room_for_weights(model, free_memory()))
    dispatch_model(model, places, offload_dir=folder, offload_buffers=True, force_hooks=True)  # codes are buffers
    try:
        yield
    finally:
        remove_hook_from_submodules(model)
        model.to("cpu")
        del model.hf_device_map


def device_map(model: nn.Module, limits: Memory) -> dict[str, int | str]:
    """Where each part of `model` goes: part → device number, "cpu" or "disk". Raises InputError if all is on disk."""
    from accelerate import infer_auto_device_map

    whole = list(model._no_split_modules or ())
    places = infer_auto_device_map(model, limits, no_split_module_classes=whole, offload_buffers=True)
    if places == {"": "disk"}:
        raise InputError("--max_memory leaves no room for even the smallest part of the model; raise a limit")
    return places


def room_for_weights(model: nn.Module, free: dict[int | str, int]) -> Memory:
    """Bytes of weights that each device may hold of a `model` on the host, from those that are `free` there."""
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))  # needs no new memory if it stays
    gpus = {device: int(bytes_free * (1 - ACTIVATION_SHARE)) for device, bytes_free in free.items() if device != "cpu"}
    return {**gpus, "cpu": free["cpu"] + held}


def free_memory() -> dict[int | str, int]:
    """Free bytes of every visible GPU, by number, and of the host ("cpu"); what PyTorch only caches is free."""
    free: dict[int | str, int] = {"cpu": available_memory()}
    for number in range(torch.cuda.device_count()):
        free[number] = free_device_memory(torch.device("cuda", number))
    return free


def parse_memory(limits: list[str]) -> Memory:
    """`["0=20GiB", "cpu=60GiB"]` → {0: "20GiB", "cpu": "60GiB"}. Raises InputError for anything else."""
    from accelerate.utils.modeling import convert_file_size_to_int

    parsed: Memory = {}
    for limit in limits:
        name, _, size = limit.partition("=")
        try:
            parsed[int(name) if name != "cpu" else name] = size
            convert_file_size_to_int(size)
        except ValueError:
            raise InputError(f"--max_memory {limit}: must be a GPU's number, or cpu, and a size: 0=20GiB") from None
    return parsed
