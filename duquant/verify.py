"""Whether a folder that `main.py --export` wrote computes what the run did: a process of its own, without the suite.

    python -m duquant.verify FOLDER REQUEST

REQUEST is a safetensors file: `logits` [n, T, vocabulary] of the first windows of `tokens.0`, and windows of tokens
[N, T] in `tokens.0`, `tokens.1`, …. The model is loaded with transformers and compressed-tensors; the last line that is
printed is JSON: `difference`, ‖found − logits‖/‖logits‖; `levels`, the most distinct values that a range in front of a
linear's product has; `perplexity`, of `tokens.0` and so on.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from duquant.exported import load


class Watch(TorchFunctionMode):
    """Counts the distinct values that products of linears are given, by range of `group` channels (None: the token)."""

    def __init__(self, group: int | None):
        super().__init__()
        self.group, self.inside, self.levels, self.products = group, False, 0, 0

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if self.inside and function is F.linear:
            self.levels, self.products = max(self.levels, levels(arguments[0], self.group)), self.products + 1
        return function(*arguments, **(keywords or {}))


def levels(x: Tensor, group: int | None) -> int:
    """The most distinct values of a vector along the last axis of `x` [..., C], or of a group of its channels."""
    vectors = x if group is None else x.unflatten(-1, (-1, group))
    ordered = vectors.flatten(0, -2).sort(dim=-1).values
    return 1 + int((ordered.diff(dim=-1) != 0).sum(dim=-1).max())


@contextmanager
def watched(model: nn.Module, group: int | None) -> Iterator[Watch]:
    """Inside the block the quantized linears of `model` are watched."""
    watch, handles = Watch(group), []

    def entered(entering: bool):
        return lambda *_: setattr(watch, "inside", entering)

    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            handles += [
                module.register_forward_pre_hook(entered(True)),
                module.register_forward_hook(entered(False)),
            ]
    try:
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def verify(folder: str, request: str, device: str, dtype: str) -> dict:
    """What is to be printed. Raises what loading raises, and ValueError if nothing is quantized there."""
    wanted = load_file(request)
    model = load(folder, dtype=getattr(torch, dtype)).to(device)
    logits, windows = wanted["logits"], [wanted[f"tokens.{index}"] for index in range(len(wanted) - 1)]
    inputs = model.config.quantization_config.quantization_config.config_groups
    [group] = {each.input_activations and each.input_activations.group_size for each in inputs.values()}
    with watched(model, group) as watch:
        found = torch.cat([model(each[None].to(device)).logits.cpu().float() for each in windows[0][: len(logits)]])
    if not watch.products:
        raise ValueError(f"{folder}: no linear is quantized when it runs")
    difference = ((found - logits).norm() / logits.norm()).item()
    perplexities = [perplexity(model, each, device) for each in windows]
    return {"difference": difference, "levels": watch.levels, "perplexity": perplexities}


def perplexity(model: nn.Module, windows: Tensor, device: str) -> float:
    """exp of the mean over windows [N, T] of the mean loss of their tokens 1 … T − 1."""
    losses = []
    for window in windows.to(device):
        logits = model(window[None]).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, window[1:]).double().item())
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    print(json.dumps(verify(*sys.argv[1:])))
