"""Text that a model generates: a prompt that fits, tokens one at a time with a cache, and where it ends."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from evaluation.base import Candidate, Context, Evaluation, Finding
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


def generate_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    stops: Sequence[str],
    device: torch.device,
) -> str:
    """What the model says after `prompt`, up to an end token or one of `stops`; empty where there is no room.

    Sampling is from the whole distribution at `temperature` (0: greedy). Of the model's own generation settings only
    the end tokens are used: penalties and truncations would make figures of different models incomparable.
    """
    if max_new_tokens < 1 or not prompt:
        return ""
    end = end_tokens(model, tokenizer, stops)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end or None,
        pad_token_id=end[0] if end else 0,
        use_cache=True,
        **(sampling or {"do_sample": False}),
    )
    inputs = torch.tensor([prompt], device=device)

    def stopped(tokens: Tensor, scores: object, **_: object) -> Tensor:
        # a token is at least a byte, so this many of the last ones hold any stop
        window = tokens[0, len(prompt) :][-max(len(stop.encode()) for stop in stops) - 1 :]
        text = tokenizer.decode(window)
        return torch.tensor([any(stop in text for stop in stops)], device=tokens.device)

    own, model.generation_config = model.generation_config, config  # else it fills what ours leaves open
    try:
        generated = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=config,
            stopping_criteria=[stopped] if stops else None,
        )
    finally:
        model.generation_config = own
    tokens = generated[0, len(prompt) :].tolist()
    if tokens[-1] in end:  # the model's end token need not be a special one of the tokenizer
        tokens.pop()
    return cut_at_stops(tokenizer.decode(tokens, skip_special_tokens=True), stops)


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


def complete(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, device: torch.device, max_new_tokens: int
) -> str:
    """What `model` writes behind `prompt`, the most probable token each time, up to `max_new_tokens` or its end."""
    return generate_text(model, tokenizer, tokenizer(prompt).input_ids, max_new_tokens, 0.0, (), device)


class Completions(Evaluation):
    """What every candidate writes behind the prompts."""

    def __init__(self, settings: PromptSettings, context: Context, common: EvaluationSettings):
        super().__init__(settings.STAGE, settings)
        self.prompts, self.context = settings.prompt, context
        self.max_new_tokens = common.text.max_new_tokens or 64

    def identity(self) -> dict[str, object]:
        """The prompts, and the most tokens that are written behind each."""
        return {"prompts": self.prompts, "max_new_tokens": self.max_new_tokens}

    def for_comparison(self, shown: bool) -> bool:
        """Both models' texts are shown beneath each other."""
        return True

    def run(self, model: nn.Module, candidate: Candidate) -> Iterator[Finding]:
        """Text by prompt."""
        for prompt in self.prompts:
            text = complete(model, self.context.tokenizer, prompt, self.context.device, self.max_new_tokens)
            yield Finding({"completions": {prompt: text}})
