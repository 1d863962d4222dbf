"""Where a whole model is while something runs it: on one device, or spread over several with accelerate."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from utils.device import on_device
from utils.errors import InputError

Memory = dict[int | str, str]  # device number, or "cpu", → the most it may hold, such as "20GiB"


@contextmanager
def placed(
    model: nn.Module, device: torch.device, spread: bool = False, limits: Memory | None = None
) -> Iterator[None]:
    """`model` is ready to run on inputs on `device` inside the block, and on the host after it.

    With `spread` its layers are dealt to all visible GPUs, then to the host, then to disk, as far as the memory of
    each, or its limit, goes (accelerate's device map). Raises InputError if it does not fit.
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
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.hooks import remove_hook_from_submodules

    whole = list(model._no_split_modules or ())
    places = infer_auto_device_map(model, limits, no_split_module_classes=whole, offload_buffers=True)
    if places == {"": "disk"}:
        raise InputError("--max_memory leaves no room for even the smallest part of the model; raise a limit")
    dispatch_model(model, places, offload_dir=folder, offload_buffers=True, force_hooks=True)  # codes are buffers
    try:
        yield
    finally:
        remove_hook_from_submodules(model)
        model.to("cpu")
        del model.hf_device_map


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
