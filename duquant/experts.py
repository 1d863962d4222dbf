"""Mixtures of experts: one linear per expert, in the place of transformers' fused parameters.

transformers 5 keeps the experts of a layer in two parameters, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].
They are taken apart into ordinary linears (views: nothing is copied), because then an expert is to the method what
every other linear is: a path in a group, with its `QuantLinear`, its clip and its statistics. Nothing is lost for
accuracy: ranges are per output channel, so those of a fused parameter would be the same. What is lost is the grouped
matrix product over all experts: here each expert is called by itself, which is slower on a GPU, and a token is
transformed once for every expert it goes to. Correct and simple came first.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

PARTS = ("gate_up_proj", "down_proj")


class Expert(nn.Module):
    """One gated MLP: down(act(gate) · up), gate and up being the halves of one linear's output."""

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: nn.Module):
        super().__init__()
        self.gate_up_proj = _linear(gate_up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """[n, H] → [n, H]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class Experts(nn.ModuleList):
    """All experts of a layer, called as transformers calls its own."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over each token's experts of weight · expert(token): [T, H], [T, k] (int64), [T, k] → [T, H]."""
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():  # an expert without tokens is not called
            tokens, slots = torch.where(top_k_index == index)
            weighted = self[index](hidden_states[tokens]) * top_k_weights[tokens, slots, None]
            output.index_add_(0, tokens, weighted.to(output.dtype))
        return output


def unfuse_experts_(layers: Iterable[nn.Module], path: str | None) -> None:
    """Put `Experts` in the place of the fused module at `path` of every decoder layer that has one. Idempotent."""
    if path is None:
        return
    parent, _, name = path.rpartition(".")
    for layer in layers:
        fused = dict(layer.named_modules()).get(path)
        if fused is None or isinstance(fused, Experts):
            continue
        weights = zip(*(getattr(fused, part).detach() for part in PARTS), strict=True)
        setattr(layer.get_submodule(parent), name, Experts(Expert(*pair, fused.act_fn) for pair in weights))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
