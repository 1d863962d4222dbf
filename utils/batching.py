"""How many sequences run at once: a number that was given, or as many as fit, found by backing off."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from utils.distributed import gather, own_part, together, world_size
from utils.errors import InputError

Result = TypeVar("Result")
AUTO_TOKENS_CPU = 4096  # what keeps two cores busy and fits everywhere
AUTO_TOKENS_GPU = 65536  # where `auto` begins on a GPU, or with what fits if that is less

logger = logging.getLogger(__name__)


@dataclass
class BatchSize:
    """Sequences per batch; `given` by the user (then it is not changed), or to be lowered until a batch fits."""

    sequences: int
    given: bool = False

    @classmethod
    def choose(cls, given: int | None, length: int, device: torch.device) -> "BatchSize":
        """The `given` number, or where to begin for sequences of `length` tokens on `device`."""
        if given is not None:
            return cls(given, True)
        tokens = AUTO_TOKENS_GPU if device.type == "cuda" else AUTO_TOKENS_CPU
        return cls(max(1, tokens // max(1, length)))

    def fit_(self, room: float, sequence: int) -> None:
        """Lower it until its sequences, of so many bytes each, fit into `room`, but at least one; a given one stays."""
        if not self.given:
            self.sequences = max(1, min(self.sequences, int(room // sequence)))

    def run(self, items: Sequence, work: Callable[[Sequence], Result]) -> Iterator[Result]:
        """Yield `work(batch)` of consecutive batches of `items` (a list, or a tensor along its first dimension).

        A batch that runs out of memory is tried again in halves, and what follows is cut to the size that fitted; so
        `work` must have no effect before it succeeds. Raises InputError if a given size, or one sequence, does not fit.
        """
        start = 0
        while start < len(items):
            batch = items[start : start + self.sequences]
            try:
                result = work(batch)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(len(batch))
            else:
                yield result
                start += len(batch)

    def _shrink(self, tried: int) -> None:
        if tried == 1:
            raise InputError(
                "not even one sequence at a time fits into memory; make it shorter (--seqlen, --max_new_tokens)"
            ) from None
        if self.given:
            raise InputError(f"--eval_batch_size {tried}: does not fit into memory; lower it, or say auto") from None
        self.sequences = tried // 2
        logger.info("a batch of %d does not fit into memory; going on with %d", tried, self.sequences)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def share_batches(
    batches: BatchSize, items: Sequence, work: Callable[[Sequence], Sequence[Result]]
) -> Iterator[Result]:
    """Yield the results of all `items`, in order and on every process, each batch worked on by one (see `share`).

    Every process must make the same call. `work(batch)` gives a result for each item (see `BatchSize.run`). A batch per
    process is done at a time, as large as fits on all, so results can be kept while the rest is still to be done.
    """
    start = 0
    while start < len(items):
        size = min(gather(batches.sequences)) * world_size()
        part = own_part(items[start : start + size])
        for results in together(lambda part=part: [each for done in batches.run(part, work) for each in done]):
            yield from results
        start += size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on an accelerator or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory")
    )
