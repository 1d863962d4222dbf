"""Perplexity, one decoder layer on the device at a time, so that it needs no more memory than quantizing did."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.observe import advance_, layer_calls, layers_replaced, shell_on_device
from quantize.spec import DecoderSpec
from utils.device import on_device
from utils.log import progress


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean over windows of the mean token loss, that loss in nats, and what it was measured on."""

    perplexity: float
    nats: float
    windows: int
    tokens_per_window: int


@torch.no_grad()
def perplexity(
    model: nn.Module, spec: DecoderSpec, tokens: Tensor, device: torch.device, label: str = "perplexity"
) -> Perplexity:
    """Perplexity of `model` on windows of token ids [N, T]; every window predicts its tokens 1…T−1."""
    calls = layer_calls(model, spec, tokens, device)
    layers = spec.decoder_layers(model)
    for index, layer in enumerate(progress(layers, label, unit="layer")):
        with on_device(layer, device):
            advance_(layer, calls.hidden, calls.kwargs[index], device)
    losses = []
    with shell_on_device(model, spec, device):
        for window, hidden in zip(tokens, calls.hidden, strict=True):
            logits = head_logits(model, spec, window[None].to(device), hidden[None].to(device))[0]
            losses.append(F.cross_entropy(logits[:-1].float(), window[1:].to(device)).double().cpu())
    nats = torch.stack(losses).mean().item()
    return Perplexity(math.exp(nats) if nats < 700 else math.inf, nats, *tokens.shape)


def head_logits(model: nn.Module, spec: DecoderSpec, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits [N, T, vocabulary] from the last layer's output `hidden` [N, T, C].

    The model's own forward pass computes them, with its layers replaced by `hidden`, so whatever a family does behind
    its layers (norm, scaling, soft-capping) is done.
    """
    with layers_replaced(spec.decoder_layers(model), lambda index, states, **kwargs: hidden):
        return model(input_ids=tokens, use_cache=False).logits
