"""lm-eval's Hugging Face adapter around a model that is quantized and placed already. Importing it imports lm-eval."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import nn

from quantize.observe import tokens_at_once
from utils.distributed import own_part, together
from utils.log import meter


class PlacedLM(HFLM):
    """A model as it is, on `device` or spread from there; all processes answer its requests together.

    Each process must be asked the same. `cut` counts the requests so far that were longer than the model's context and
    lost their beginning. The main process shows on `screen` how many of its requests for `label` are answered.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, device: torch.device, batch_size: int | str):
        with _weights_left_alone(model):
            super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self._device = device
        self.cut, self.label, self.screen = 0, "requests", sys.stderr

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) of every (context, continuation)."""
        return self._shared(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of every text."""
        return self._shared(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The continuation of every context, up to its stop words."""
        return self._shared(super().generate_until, requests)

    def _loglikelihood_tokens(self, requests: list, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        longest = self.max_length + 1
        self._own_cut += sum(len(context) + len(continuation) > longest for _, context, continuation in requests)
        fitting = [(key, *last_tokens(context, continuation, longest)) for key, context, continuation in requests]
        if self.batch_size == "auto":  # lm-eval finds what fits, whole logits among it
            return super()._loglikelihood_tokens(fitting, *args, **kwargs)
        answers: list[Any] = [None] * len(fitting)
        for numbers, read in self._batches(fitting):
            with _last_states(self.model, read):
                found = super()._loglikelihood_tokens([fitting[number] for number in numbers], *args, **kwargs)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
        return answers

    def _batches(self, requests: list) -> Iterator[tuple[list[int], int]]:
        """Which requests run at once, and from how many of their last positions on logits are read.

        As many as lm-eval would take, in its order, but fewer where their logits are too many: those whose tokens are
        the same up to the last one are one row. `requests`: (what for, context, continuation), tokens.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            rows.setdefault(tuple(context + continuation[:-1]), []).append(number)
        waiting = sorted(rows, key=lambda row: (-len(row), row))
        most = tokens_at_once(self.model.config.vocab_size)
        while waiting:
            longest, begins, count = min(len(waiting[0]), self.max_length), [], 0
            for row in waiting[: self.batch_size]:
                wanted = max(len(requests[number][2]) for number in rows[row])
                begins.append(min(len(row), self.max_length) - wanted)
                if count and (count + 1) * (longest - min(begins)) > most:
                    break
                count += 1
            yield [number for row in waiting[:count] for number in rows[row]], longest - min(begins[:count])
            waiting = waiting[count:]

    def _shared(self, answer: Callable, requests: list) -> list:
        """Answers to all requests, in order; every process works on a contiguous part.

        Neighbours often share a context, whose logits are then computed once.
        """
        own = own_part(requests)

        def work() -> tuple[list, int]:
            self._own_cut = 0
            with meter(len(own), self.label, "request", stream=self.screen) as bar:
                self.set_cache_hook(_Counting(bar.update))
                return answer(own, disable_tqdm=True) if own else [], self._own_cut

        parts = together(work)
        self.cut += sum(cut for _, cut in parts)
        return [result for results, _ in parts for result in results]


class _Counting:
    """Stands where lm-eval has a cache that is told of every answer, and counts them."""

    def __init__(self, count: Callable[[], object]):
        self.count = count

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """An answer is there."""
        self.count()


def last_tokens(context: list[int], continuation: list[int], longest: int) -> tuple[list[int], list[int]]:
    """The request as it is if its continuation fits; else the last `longest` tokens, the first of them as the context.

    lm-eval cuts contexts itself, but stops the whole task at a continuation that is longer than the model's context.
    """
    if len(continuation) < longest:
        return context, continuation
    kept = continuation[-longest:]
    return kept[:1], kept[1:]


@contextlib.contextmanager
def _last_states(model: nn.Module, count: int) -> Iterator[None]:
    """Inside the block the head is given the states of the last `count` positions alone, and gives as many logits."""
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0][:, -count:],))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _weights_left_alone(model: nn.Module) -> Iterator[None]:
    """Keep the adapter from tying weights anew: of a model spread over devices that would move some."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights
