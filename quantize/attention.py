"""Quantized q, k and v: caught after RoPE, through transformers' registry of attention functions.

Every decoder layer of transformers calls an attention function by name. A name of ours wraps each implementation: it
looks for a quantizer on the attention module and otherwise does what the implementation does, so a model with the
wrapper installed is unchanged until `attach_` puts a quantizer on a layer.
"""

import sys

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantize.rotation import hadamard

QUANTIZER = "qkv_quantizer"  # attribute of an attention module
PREFIX = "quantized_"  # of the names in the registry


class AttentionQuantizer(nn.Module):
    """Quantizes q and k after RoPE and v, each per token and head: [batch, heads, T, head_dim] → same.

    q and k are first multiplied by one orthonormal Hadamard matrix H: (qH)(kH)ᵀ = qkᵀ, and outliers of k are spread
    over the head. `matrix` None leaves that out.
    """

    def __init__(self, matrix: Tensor | None, qk_quantizer: nn.Module, v_quantizer: nn.Module):
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.qk_quantizer = qk_quantizer
        self.v_quantizer = v_quantizer

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The quantized (query, key, value), in their dtypes."""
        return self._quantize_rotated(query), self._quantize_rotated(key), self.v_quantizer(value)

    def _quantize_rotated(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rotated = wide if self.matrix is None else wide @ self.matrix.to(wide.dtype)
        return self.qk_quantizer(rotated).to(x.dtype)


def head_hadamard(head_dim: int, device: torch.device) -> Tensor:
    """The Hadamard matrix for heads of `head_dim` (not of the block size), on `device`."""
    return hadamard(head_dim).to(device)


def install(model: nn.Module) -> None:
    """Make `model` call the wrapper of the attention implementation that it has now. Idempotent."""
    base = model.config._attn_implementation
    if base.startswith(PREFIX):
        return
    name = PREFIX + base
    AttentionInterface.register(name, _wrapper(base))
    if base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)


def attach_(attention: nn.Module, quantizer: AttentionQuantizer) -> None:
    """Let `attention` (a module of a model where `install` was called) quantize with `quantizer` from now on."""
    setattr(attention, QUANTIZER, quantizer)


def _wrapper(base: str):
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        quantizer = getattr(module, QUANTIZER, None)
        if quantizer is not None:
            query, key, value = quantizer(query, key, value)
        # each modelling file has its own eager function; all others are in the registry
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)(module, query, key, value, *args, **kwargs)

    return attention
