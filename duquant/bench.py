"""How fast a model reads and writes, and what memory it takes: a quantized one beside what it was made from."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from duquant.loading import DTYPES, load, model_bytes, peak_bytes

WARM_UP_TOKENS = 4  # the first call of a model sets things up


@dataclass(frozen=True)
class Speed:
    """Tokens per second read (`prefill`) and written one by one (`decode`), and bytes: of the model, and at most."""

    prefill: float
    decode: float
    model_bytes: int
    peak_bytes: int


@torch.no_grad()
def measure(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Speed:
    """Let `model` read `prompt` [1, T] and write so many tokens behind it, the likeliest each time."""
    device = prompt.device
    _continue(model, prompt[:, :WARM_UP_TOKENS], 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prefill, decode = _continue(model, prompt, new_tokens)
    return Speed(prompt.shape[1] / prefill, new_tokens / decode, model_bytes(model), peak_bytes(device))


def _continue(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for reading the prompt, and for the tokens behind it."""
    started = _now(prompt.device)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    read = _now(prompt.device)
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return read - started, _now(prompt.device) - read


def _now(device: torch.device) -> float:
    """The time when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_prompt(model: PreTrainedModel, length: int, new_tokens: int) -> Tensor:
    """Token ids [1, length], the same in every run. Raises ValueError if the model cannot read so many."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length + new_tokens > longest:
        raise ValueError(f"--prompt_tokens {length} and --new_tokens {new_tokens}: the model's maximum is {longest}")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)


def compare(
    open_quantized: Callable[[], PreTrainedModel],
    base: str | None,
    device: torch.device,
    lengths: tuple[int, int],
) -> dict[str, Speed]:
    """What was measured, by name: of the quantized model, and of `base`, if there is one, in every precision.

    `lengths`: tokens that are read and written. One model is in memory at a time. Raises ValueError if the prompt is
    too long for the model, or `base` cannot be loaded.
    """
    model = open_quantized()
    prompt = random_prompt(model, *lengths)
    speeds = {f"quantized, {_short(model.dtype)}": measure(model, prompt, lengths[1])}
    for name in DTYPES if base is not None else ():
        model = None
        _collect(device)
        model = load(base, device, name)
        speeds[name] = measure(model, prompt, lengths[1])
    return speeds


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(speeds: dict[str, Speed], device: torch.device) -> str:
    """The measurements, a line each, and behind those of other models what the quantized one has of them."""
    own = next(iter(speeds.values()))
    header = ["", "prefill, tokens/s", "decode, tokens/s", "model, GB"] + ["peak, GB"] * (device.type == "cuda")
    rows = [header]
    for name, speed in speeds.items():
        pairs = [(own.prefill, speed.prefill), (own.decode, speed.decode), (own.model_bytes, speed.model_bytes)]
        pairs += [(own.peak_bytes, speed.peak_bytes)] * (device.type == "cuda")
        units = (1, 1, 1e9, 1e9)
        rows.append([name, *(_cell(pair, unit, speed is own) for pair, unit in zip(pairs, units, strict=False))])
    return _aligned(rows)


def _cell(pair: tuple[float, float], unit: float, alone: bool) -> str:
    own, value = pair
    shown = f"{value / unit:.4g}"
    return shown if alone else f"{shown} ({own / value:.2f}x)"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
