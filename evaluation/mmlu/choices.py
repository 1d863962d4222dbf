"""Which of a few endings a model gives to a prompt, for many prompts that begin alike.

What all prompts begin with runs through the model once; its keys and values are then repeated for batches of the
remainders. Remainders are padded on the right, where causal attention lets no real token see it, so neither mask nor
positions are needed, and a prompt gets what it would get alone, up to the order of floating-point sums.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedTokenizerBase

from utils.batching import BatchSize
from utils.errors import InputError

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt and of the endings it is to be compared under, none of them empty."""

    stem: Tokens
    endings: tuple[Tokens, ...]

    def __len__(self) -> int:
        """How many tokens the model is fed: the last of an ending is only predicted."""
        return len(self.stem) + max(map(len, self.endings)) - 1


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], endings: Sequence[str]) -> list[Prompt]:
    """The prompts whose texts are `texts`, all of which close with the same words, under the same `endings`.

    Every text is encoded whole, ending included, because a tokenizer may merge across the border. What the encodings
    of one text with each of the endings have in common is the stem, so an ending begins where they differ: with ' A'
    that is one token in the usual vocabularies, the letter after the space in those of characters. Raises InputError
    if the tokenizer cannot tell the endings apart.
    """
    if not texts:
        return []
    usual = _split(tokenizer, texts[0], endings).endings
    return [
        Prompt(ids[: -len(usual[0])], usual) if ids[-len(usual[0]) :] == usual[0] else _split(tokenizer, text, endings)
        for text, ids in zip(texts, _encode(tokenizer, [text + endings[0] for text in texts]), strict=True)
    ]


def cut_left(prompt: Prompt, length: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """`prompt` without as many of its first tokens (after the one that begins every text) as make it `length`."""
    first = prompt.stem[:1] if prompt.stem[:1] == (tokenizer.bos_token_id,) else ()
    surplus = len(prompt) - length
    return Prompt(first + prompt.stem[len(first) + surplus :], prompt.endings) if surplus > 0 else prompt


@torch.no_grad()
def ending_log_probabilities(
    model: nn.Module, prompts: Sequence[Prompt], device: torch.device, batch_size: int | None = None
) -> Tensor:
    """Log-probability of each ending after each prompt, [prompts, endings], float32 on the host.

    `model` is on `device`. Prompts of about the same length run together, the longest first.
    """
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    shared = common_prefix([prompt.stem for prompt in prompts]) if len(prompts) > 1 else ()
    shared = shared[: min(len(prompt.stem) for prompt in prompts) - 1]  # what is read comes from the remainder
    cache = _run_prefix(model, shared, device)
    batches = BatchSize.choose(batch_size, len(prompts[order[0]]), device)
    scores = list(batches.run(order, lambda batch: _score(model, [prompts[i] for i in batch], shared, cache, device)))
    return torch.cat(scores)[torch.tensor(order).argsort()]


def common_prefix(sequences: Sequence[Tokens]) -> Tokens:
    """The longest beginning that all sequences share."""
    lowest, highest = min(sequences), max(sequences)  # whatever these two share, all between them share
    differ = (i for i, (a, b) in enumerate(zip(lowest, highest, strict=False)) if a != b)
    return lowest[: next(differ, len(lowest))]


class _Row(NamedTuple):
    """One row of a batch: its tokens behind the shared prefix, and from which of them on logits are read."""

    tokens: Tokens
    read: int


def _split(tokenizer: PreTrainedTokenizerBase, text: str, endings: Sequence[str]) -> Prompt:
    encoded = _encode(tokenizer, [text + ending for ending in endings])
    stem = common_prefix(encoded)
    rest = tuple(ids[len(stem) :] for ids in encoded)
    if not all(rest) or len(set(rest)) < len(rest):
        raise InputError(f"--model: its tokenizer cannot tell the answers {', '.join(map(repr, endings))} apart")
    return Prompt(stem, rest)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Tokens]:
    """Token ids as the tokenizer makes them by default, without the end of text that some append."""
    encoded = (tuple(ids) for ids in tokenizer(texts).input_ids)
    return [ids[:-1] if ids[-1:] == (tokenizer.eos_token_id,) else ids for ids in encoded]


def _run_prefix(model: nn.Module, tokens: Tokens, device: torch.device) -> Cache | None:
    if not tokens:
        return None
    ids = torch.tensor([tokens], device=device)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _score(
    model: nn.Module, prompts: Sequence[Prompt], shared: Tokens, cache: Cache | None, device: torch.device
) -> Tensor:
    """Log-probabilities [prompts, endings] of one batch, on the host. A prompt is one row if endings are one token."""
    rows: list[_Row] = []
    wanted = []  # (which score it is part of, row, how many tokens behind the row's first reading, token)
    for number, prompt in enumerate(prompts):
        rest = prompt.stem[len(shared) :]
        begun = _longest([ending[:-1] for ending in prompt.endings])
        for which, ending in enumerate(prompt.endings):
            row = len(rows) + next(i for i, tokens in enumerate(begun) if tokens[: len(ending) - 1] == ending[:-1])
            wanted += [(number * len(prompt.endings) + which, row, *read) for read in enumerate(ending)]
        rows += [_Row(rest + tokens, len(rest) - 1) for tokens in begun]
    score, row, offset, token = torch.tensor(wanted, device=device).T
    token_scores = _run_rows(model, rows, int(offset.max()) + 1, cache, device)[row, offset, token]
    scores = torch.zeros(int(score.max()) + 1, device=device).index_add_(0, score, token_scores)
    return scores.view(len(prompts), -1).cpu()


def _longest(sequences: Sequence[Tokens]) -> list[Tokens]:
    """The sequences that no other one begins with: what is run for them is run for all."""
    kept: list[Tokens] = []
    for tokens in sorted(sequences, key=len, reverse=True):
        if not any(other[: len(tokens)] == tokens for other in kept):
            kept.append(tokens)
    return kept


def _run_rows(model: nn.Module, rows: list[_Row], reads: int, cache: Cache | None, device: torch.device) -> Tensor:
    """Log-probabilities [rows, reads, vocabulary], float32, behind tokens `read`, `read` + 1, … of each row."""
    width = max(len(row.tokens) for row in rows)
    ids = torch.tensor([row.tokens + (0,) * (width - len(row.tokens)) for row in rows], device=device)
    positions = torch.tensor([row.read for row in rows])[:, None] + torch.arange(reads)
    positions = positions.clamp(max=width - 1).to(device)  # an ending with fewer tokens has fewer readings
    if cache is not None:
        cache = copy.deepcopy(cache)  # the model adds to it
        cache.batch_repeat_interleave(len(rows))
    with _reading(model, positions):
        output = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
    return output.logits.float().log_softmax(dim=-1)


@contextmanager
def _reading(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside the block the head gets only the hidden states at `positions` [rows, reads], each row its own.

    `logits_to_keep` does that too, but only in the newest versions of transformers.
    """

    def pick(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        states = args[0]
        return (states.gather(1, positions.to(states.device)[..., None].expand(-1, -1, states.shape[-1])),)

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
