"""Text that a model generates: prompts that fit, what is written behind several of them at once, and where it ends."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from evaluation.base import Candidate, Context, Evaluation, Finding
from evaluation.decoding import Request, choose_batch, write_tokens
from evaluation.settings import EvaluationSettings, PromptSettings


def fit_prompt(tokens: list[int], context: int, max_new_tokens: int, bos: int | None) -> list[int]:
    """The last of `tokens`, behind the BOS they begin with, so many that an answer has room.

    That is `max_new_tokens`, or half of the context where that is less.
    """
    limit = context - min(max_new_tokens, context // 2)
    if len(tokens) <= limit:
        return tokens
    start = tokens[:1] if tokens[0] == bos and limit > 1 else []
    return start + tokens[len(tokens) - limit + len(start) :]


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    stops: Sequence[str],
    device: torch.device,
) -> list[str]:
    """What the model says behind each prompt, up to an end token or one of `stops`; empty where there is no room.

    Of the model's own generation settings only the end tokens are used: penalties and truncations would make figures of
    different models incomparable.
    """
    end = end_tokens(model, tokenizer, stops)
    window = max((len(stop.encode()) for stop in stops), default=0) + 1  # a token is at least a byte

    def ended(written: list[int]) -> bool:
        text = tokenizer.decode(written[-window:]) if stops else ""
        return written[-1] in end or any(stop in text for stop in stops)

    texts = [""] * len(requests)
    asked = [number for number, request in enumerate(requests) if request.max_new_tokens > 0 and request.prompt]
    if asked:
        written = write_tokens(model, [requests[number] for number in asked], ended, device)
        for number, tokens in zip(asked, written, strict=True):
            if tokens[-1] in end:  # the model's end token need not be a special one of the tokenizer
                tokens.pop()
            texts[number] = cut_at_stops(tokenizer.decode(tokens, skip_special_tokens=True), stops)
    return texts


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the stops, without space around it."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text.strip()


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> list[int]:
    """Ids at which generation ends: the model's and the tokenizer's EOS, and stops that are single special tokens."""
    own = model.generation_config.eos_token_id
    special = tokenizer.get_added_vocab()
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    return sorted((ends | {special.get(stop) for stop in stops}) - {None})


class Completions(Evaluation):
    """What every candidate writes behind the prompts."""

    def __init__(self, settings: PromptSettings, context: Context, common: EvaluationSettings):
        super().__init__(settings.STAGE, settings)
        self.prompts, self.context = settings.prompt, context
        self.max_new_tokens, self.batch_size = common.text.max_new_tokens or 64, common.eval_batch_size

    def identity(self) -> dict[str, object]:
        """The prompts, and the most tokens that are written behind each."""
        return {"prompts": self.prompts, "max_new_tokens": self.max_new_tokens}

    def for_comparison(self, shown: bool) -> bool:
        """Both models' texts are shown beneath each other."""
        return True

    def run(self, model: nn.Module, candidate: Candidate) -> Iterator[Finding]:
        """Text by prompt: the most probable token each time."""
        tokenizer, device = self.context.tokenizer, self.context.device
        requests = [Request(tokenizer(prompt).input_ids, self.max_new_tokens) for prompt in self.prompts]
        length = max(len(request.prompt) for request in requests) + self.max_new_tokens
        batches = choose_batch(self.batch_size, model, length, device)
        texts = batches.run(requests, lambda batch: generate_texts(model, tokenizer, batch, (), device))
        for prompt, text in zip(self.prompts, itertools.chain.from_iterable(texts), strict=True):
            yield Finding({"completions": {prompt: text}})
