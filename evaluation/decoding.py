"""Tokens behind several prompts at once: every step reads the weights once for all of them.

Each prompt is read by itself, so nothing is computed of padding; then the caches are joined, the shorter ones padded
with zeros on the left and masked there. Distances within a row stay what they are, so windows that slide stay right,
and its positions count its own tokens. A row that ends leaves the batch. What a row is given beside others is what it
is given alone, but for the order in which products of other shapes sum floats.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, PretrainedConfig

from utils.batching import BatchSize
from utils.memory import available_memory

AT_ONCE = 32  # by then a CPU's products cost what reading the weights does, and an interruption loses no more answers
CACHE_SHARE = 0.5  # of a host's free memory, at most, for keys and values: running out of it may end the process


@dataclass(frozen=True)
class Request:
    """What is to be written behind `prompt` (token ids): at most `max_new_tokens`.

    `temperature` 0: the most probable token each time. Else tokens are drawn from the whole distribution, with
    `generator` (on the device of the inputs), which nothing else may use meanwhile.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    generator: torch.Generator | None = None


@torch.no_grad()
def write_tokens(
    model: nn.Module, requests: Sequence[Request], ended: Callable[[list[int]], bool], device: torch.device
) -> list[list[int]]:
    """The tokens that `model` writes behind each prompt; `ended` says of those of one whether its last is the last.

    No prompt may be empty, and each is followed by at least one token.
    """
    switch = rope_switch(model.config)
    if len(requests) > 1 and any(len(each.prompt) + each.max_new_tokens > switch for each in requests):
        return [write_tokens(model, [each], ended, device)[0] for each in requests]
    written: list[list[int]] = [[] for _ in requests]
    going = list(range(len(requests)))  # which request each row of the batch is
    cache, logits, mask = _read(model, [each.prompt for each in requests], device)
    while True:
        for row, token in zip(going, _choose(logits, [requests[row] for row in going]), strict=True):
            written[row].append(token)
        left = [
            at
            for at, row in enumerate(going)
            if len(written[row]) < requests[row].max_new_tokens and not ended(written[row])
        ]
        if not left:
            return written
        if len(left) < len(going):
            kept = torch.tensor(left)  # on the host, since layers may be on several devices
            cache.batch_select_indices(kept)
            mask, going = mask[kept], [going[at] for at in left]
        if len(requests) == 1 and mask.shape[1] == switch:  # the frequencies its cache was made with hold no more
            cache, logits, mask = _read(model, [[*requests[0].prompt, *written[0]]], device)
            continue
        tokens = torch.tensor([written[row][-1:] for row in going], device=device)
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
        positions = mask.sum(dim=1, keepdim=True) - 1
        cache, logits = _forward(model, tokens, device, cache, attention_mask=mask, position_ids=positions)


def _forward(
    model: nn.Module, tokens: Tensor, device: torch.device, cache: Cache | None = None, **inputs: Tensor
) -> tuple[Cache, Tensor]:
    """The cache with the `tokens` [rows, T], and the logits [rows, vocabulary] behind the last of them, in float32."""
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
    return output.past_key_values, output.logits[:, -1].to(device, torch.float32)


def _read(model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Cache, Tensor, Tensor]:
    """The joined cache, the logits [rows, vocabulary] and what is no padding [rows, T] of prompts of up to T tokens."""
    read = [_forward(model, torch.tensor([list(prompt)], device=device), device) for prompt in prompts]
    caches, logits = zip(*read, strict=True)
    width = max(map(len, prompts))
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= padding[:, None]).long()
    return _joined(caches, prompts), torch.cat(logits), mask


def _joined(caches: Sequence[Cache], prompts: Sequence[Sequence[int]]) -> Cache:
    """The caches of one prompt each as that of a batch: the longest one's, which the others are padded to.

    A layer with a window keeps the last tokens alone, so there too the right ends meet. The others' memory is freed.
    """
    whole = caches[max(range(len(prompts)), key=lambda row: len(prompts[row]))]
    for layer, *rows in zip(whole.layers, *(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            parts = [getattr(row, name) for row in rows]
            width = max(part.shape[-2] for part in parts)
            together = torch.cat([pad(part, (0, 0, width - part.shape[-2], 0)) for part in parts])
            for row in rows:
                setattr(row, name, None)
            setattr(layer, name, together)
    return whole


def _choose(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of each row of `logits` [rows, vocabulary]."""
    tokens = logits.argmax(dim=-1)
    for row, request in enumerate(requests):
        if request.temperature > 0:
            probabilities = (logits[row] / request.temperature).softmax(dim=-1)
            tokens[row] = torch.multinomial(probabilities, 1, generator=request.generator)[0]
    return tokens.tolist()


def rope_switch(config: PretrainedConfig) -> float:
    """The most tokens of a text before RoPE's frequencies change for all of it; infinite where they never do.

    They depend on the longest row of a batch then, so rows that may come there are on their own.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]  # some have one per type of layer
    found = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(found, default=math.inf)


def choose_batch(given: int | None, model: nn.Module, tokens: int, device: torch.device) -> BatchSize:
    """The `given` number of texts at a time, or where to begin for texts of up to `tokens` each."""
    if given is not None:
        return BatchSize(given, given=True)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize * tokens
    fitting = AT_ONCE if device.type != "cpu" else int(CACHE_SHARE * available_memory() / max(1, size))
    return BatchSize(max(1, min(AT_ONCE, fitting)))
