"""Perplexity and KL divergence, one decoder layer on the device at a time: no more memory than quantizing needed."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.observe import advance_, layer_calls, layers_replaced, shell_on_device
from quantize.spec import DecoderSpec
from utils.batching import BatchSize
from utils.device import on_device
from utils.distributed import own_part, together
from utils.log import progress


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean over windows of the mean token loss, that loss in nats, and what it was measured on.

    `divergence` is the mean over tokens of KL(full precision ‖ this model), in nats, where that was asked for.
    """

    perplexity: float
    nats: float
    windows: int
    tokens_per_window: int
    divergence: float | None = None

    def __str__(self) -> str:
        divergence = "" if self.divergence is None else f", KL {self.divergence:.4f} nats"
        counted = f"{self.windows} windows of {self.tokens_per_window} tokens"
        return f"perplexity {self.perplexity:.4f} ({self.nats:.4f} nats{divergence}, {counted})"


def perplexity(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: Tensor,
    device: torch.device,
    label: str = "perplexity",
    batch_size: BatchSize | None = None,
) -> Perplexity:
    """Perplexity of `model` on windows of token ids [N, T]; every window predicts its tokens 1…T−1."""
    return score(model, spec, tokens, final_hidden(model, spec, tokens, device, label, batch_size), device)


@torch.no_grad()
def final_hidden(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: Tensor,
    device: torch.device,
    label: str,
    batch_size: BatchSize | None = None,
) -> Tensor:
    """What the last decoder layer gives for windows of token ids [N, T], before the final norm: [n, T, C], on the host.

    Several processes share the windows; each has the part that is its own.
    """
    tokens = own_part(tokens)
    if not len(tokens):
        return torch.empty(0)
    calls = layer_calls(model, spec, tokens, device)
    for index, layer in enumerate(progress(spec.decoder_layers(model), label, unit="layer")):
        with on_device(layer, device):
            advance_(layer, calls.hidden, calls.kwargs[index], device, batch_size)
    return calls.hidden


def score(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: Tensor,
    hidden: Tensor,
    device: torch.device,
    teacher: Tensor | None = None,
) -> Perplexity:
    """Perplexity on windows [N, T] whose `final_hidden` is known; every process has the result.

    `teacher` is the `final_hidden` of the full-precision model on the same windows: with it the divergence is measured.
    """
    part = own_part(tokens)
    means = torch.cat(together(lambda: _window_means(model, spec, part, hidden, teacher, device))).mean(dim=0)
    nats, divergence = means[0].item(), means[1].item() if teacher is not None else None
    return Perplexity(math.exp(nats) if nats < 700 else math.inf, nats, *tokens.shape, divergence)


@torch.no_grad()
def _window_means(
    model: nn.Module, spec: DecoderSpec, tokens: Tensor, hidden: Tensor, teacher: Tensor | None, device: torch.device
) -> Tensor:
    """Mean token loss of every window, and mean KL divergence from the teacher (NaN without one): float64 [N, 2].

    One window at a time: logits over a large vocabulary are the largest tensors of all.
    """
    means = torch.full((len(tokens), 2), math.nan, dtype=torch.float64)
    with shell_on_device(model, spec, device):
        for index, window in enumerate(tokens.to(device)):
            logits = head_logits(model, spec, window[None], hidden[index, None].to(device))[0, :-1].float()
            means[index, 0] = F.cross_entropy(logits, window[1:]).double()
            if teacher is not None:
                wanted = head_logits(model, spec, window[None], teacher[index, None].to(device))[0, :-1].float()
                means[index, 1] = token_divergence(wanted, logits).mean().double()
    return means


def token_divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """KL(P ‖ Q) = Σ P (log P − log Q) of every token, in nats: logits [T, vocabulary] of P and of Q → [T]."""
    return F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def head_logits(model: nn.Module, spec: DecoderSpec, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits [N, T, vocabulary] from the last layer's output `hidden` [N, T, C].

    The model's own forward pass computes them, with its layers replaced by `hidden`, so whatever a family does behind
    its layers (norm, scaling, soft-capping) is done.
    """
    with layers_replaced(spec.decoder_layers(model), lambda index, states, **kwargs: hidden):
        return model(input_ids=tokens, use_cache=False).logits
