"""Leaving parts of a quantized layer at 16 bits for a while: what their rounding costs is what changes then.

It is exact: with y = x Wᵀ = T(x) T(W)ᵀ a group of linears computes what it did in full precision once neither T(x) nor
T(W) is rounded, and a Hadamard matrix H that stays on q and k does no harm, since (qH)(kH)ᵀ = qkᵀ. Only quantizers and
weights are put aside; every forward pass is the layer's own.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from duquant.attention import QUANTIZER, AttentionQuantizer
from duquant.linear import QuantLinear
from quantize.spec import DecoderSpec, InputGroup

WEIGHT, INPUT = "weight", "input"
HEADS = ("query", "key", "value")
ROLES = (WEIGHT, INPUT, *HEADS)  # as in `duquant.scheme.Scheme`


@dataclass(frozen=True)
class Part:
    """Tensors of a decoder layer: weights and inputs of linears by their paths, and which of `HEADS`."""

    weights: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.weights or self.inputs or self.heads)

    def of_role(self, role: str) -> "Part":
        """What of it has this role, one of `ROLES`."""
        if role == WEIGHT:
            return Part(weights=self.weights)
        return Part(inputs=self.inputs) if role == INPUT else Part(heads=tuple(h for h in self.heads if h == role))

    def of_group(self, group: InputGroup) -> "Part":
        """Weights and inputs of the group's linears."""
        weights, inputs = (tuple(p for p in paths if p in group.linears) for paths in (self.weights, self.inputs))
        return Part(weights, inputs)


def rounded_part(layer: nn.Module, spec: DecoderSpec) -> Part:
    """Everything that the quantized `layer`, whose spec is `spec`, rounds."""
    linears = {path: layer.get_submodule(path) for group in spec.groups for path in group.linears}
    heads = _heads(layer, spec)
    return Part(
        weights=tuple(path for path, linear in linears.items() if linear.packed_codes is not None),
        inputs=tuple(path for path, linear in linears.items() if _rounds(linear.group.quantizer)),
        heads=tuple(role for role in HEADS if heads is not None and _rounds(getattr(heads, role))),
    )


@contextmanager
def left_unrounded(
    layer: nn.Module, spec: DecoderSpec, part: Part, weights: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Inside the block nothing of `part` is rounded; after it, whatever happened, `layer` is what it was.

    `weights` (path → T(W Λ) [O, C]) are needed for the weights of `part`: codes do not tell what they were made from.
    """
    inputs = {id(each): each for each in (layer.get_submodule(path).group for path in part.inputs)}
    with ExitStack() as stack:
        for path in part.weights:
            stack.enter_context(_weight_replaced(layer.get_submodule(path), weights[path]))
        for shared in inputs.values():
            stack.enter_context(_quantizer_removed(shared, "quantizer"))
        for role in part.heads:
            stack.enter_context(_quantizer_removed(_heads(layer, spec), role))
        yield


@contextmanager
def _weight_replaced(linear: QuantLinear, weight: Tensor) -> Iterator[None]:
    def decoded(dtype: torch.dtype) -> Tensor:
        return weight.to(dtype)

    linear.decoded = decoded
    try:
        yield
    finally:
        del linear.decoded


@contextmanager
def _quantizer_removed(owner: nn.Module, name: str) -> Iterator[None]:
    quantizer = getattr(owner, name)
    setattr(owner, name, nn.Identity())
    try:
        yield
    finally:
        setattr(owner, name, quantizer)


def _heads(layer: nn.Module, spec: DecoderSpec) -> AttentionQuantizer | None:
    return getattr(layer.get_submodule(spec.attention), QUANTIZER, None)


def _rounds(quantizer: nn.Module) -> bool:
    return not isinstance(quantizer, nn.Identity)
