"""Several processes that share one run, as `torchrun` or `accelerate launch` start them; alone, all of this is trivial.

What is on the host is exchanged with gloo, what is on a GPU with nccl.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")
Result = TypeVar("Result")
PATIENCE = timedelta(hours=12)  # one rank may wait while another quantizes or answers


def join_group() -> None:
    """Join the processes that a launcher started together with this one, if it says that there are others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def leave_group() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Number of this process among those on the same machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if dist.is_initialized() else 0


def local_size() -> int:
    """How many of the processes are on the same machine as this one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def world_size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return rank() == 0


def gather(value: Result) -> list[Result]:
    """The values of all processes, by rank, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Result] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(work: Callable[[], Result]) -> Result:
    """`work()` of the main process, on every process; a failure there ends all."""
    return together(lambda: work() if is_main() else None)[0]


def own_part(items: Sequence[Item]) -> Sequence[Item]:
    """The contiguous part of `items` that is this process's; in order of rank the parts make the whole."""
    bounds = [len(items) * number // world_size() for number in range(world_size() + 1)]
    return items[bounds[rank()] : bounds[rank() + 1]]


def share(items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Yield `work(item)` of every item, in order and on every process; each item is worked on by one process.

    Every process must make the same call. As many items as there are processes are done at a time, so results can be
    kept while the rest is still to be done. A failure on any process ends all of them: its own exception there,
    RuntimeError on the others.
    """
    for start in range(0, len(items), world_size()):
        chunk = items[start : start + world_size()]
        yield from together(lambda chunk=chunk: work(chunk[rank()]) if rank() < len(chunk) else None)[: len(chunk)]


def together(work: Callable[[], Result]) -> list[Result]:
    """`work()` of every process, by rank, on every process; a failure on one of them ends all (see `share`)."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        if world_size() == 1:
            raise
        failure = error
    outcomes = gather((result, f"{type(failure).__name__}: {failure}" if failure else None))
    if failure is not None:
        raise failure
    for number, (_, message) in enumerate(outcomes):
        if message is not None:
            raise RuntimeError(f"process {number} failed: {message}")
    return [value for value, _ in outcomes]


def own_batches(total: int, size: int) -> list[tuple[range, int]]:
    """Of `total` items in batches of `size`: for each batch, which items are this process's, and how many it has."""
    batches = [range(start, min(start + size, total)) for start in range(0, total, size)]
    return [(own_part(batch), len(batch)) for batch in batches]


def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its sum over all processes, in one exchange; the same bits on every process."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def make_equal_(model: nn.Module) -> None:
    """Give every process the main one's parameters and buffers, bit for bit."""
    make_tensors_equal_(model.state_dict().values())


def make_tensors_equal_(tensors: Iterable[Tensor]) -> None:
    """Give every process the main one's content of these tensors, which are contiguous, bit for bit."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.view(torch.uint8) if tensor.dtype is torch.int16 else tensor, 0)  # nccl has no int16
