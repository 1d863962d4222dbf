"""Quantized q, k and v: caught after RoPE, through transformers' registry of attention functions.

Every decoder layer of transformers calls an attention function by name. A name of ours wraps each implementation: it
looks for a quantizer on the attention module and otherwise does what the implementation does, so a model with the
wrapper installed is unchanged until `attach_` puts a quantizer on a layer.

With a KV cache, k and v are quantized once, when they enter it: what is cached is what a quantized cache would hold.
Every token has its own ranges, so decoding with a cache computes what running the whole text again would.
"""

import sys

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from duquant.hadamard import hadamard
from duquant.quantizer import make_quantizer
from duquant.scheme import Scheme
from duquant.tensors import widen

QUANTIZER = "qkv_quantizer"  # attribute of an attention module
PREFIX = "quantized_"  # of the names in the registry
CACHED = "keys_are_quantized"  # keyword argument by which the hook below tells the attention function


class AttentionQuantizer(nn.Module):
    """Quantizes q and k after RoPE and v, each per token and head: [batch, heads, T, head_dim] → same.

    q and k are first multiplied by one orthonormal Hadamard matrix H: (qH)(kH)ᵀ = qkᵀ, and outliers of k are spread
    over the head. `matrix` None leaves that out.
    """

    def __init__(self, matrix: Tensor | None, query: nn.Module, key: nn.Module, value: nn.Module):
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=False)  # it follows from the scheme
        self.query, self.key, self.value = query, key, value

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The quantized (query, key, value), in their dtypes."""
        return self.quantized_query(query), *self.key_value(key, value)

    def quantized_query(self, query: Tensor) -> Tensor:
        """The rotated and quantized query, in its dtype."""
        return self._rotated(query, self.query)

    def key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The quantized (key, value), in their dtypes."""
        return self._rotated(key, self.key), self.value(value)

    def _rotated(self, x: Tensor, quantizer: nn.Module) -> Tensor:
        wide = widen(x)
        return quantizer(wide if self.matrix is None else wide @ self.matrix.to(wide.dtype)).to(x.dtype)


def make_attention_quantizer(scheme: Scheme, head_dim: int, device: torch.device) -> AttentionQuantizer:
    """The quantizer of q, k and v for heads of `head_dim`; the Hadamard matrix has the size of the head."""
    matrix = hadamard(head_dim).to(device) if scheme.rotate_heads else None
    return AttentionQuantizer(matrix, *map(make_quantizer, (scheme.query, scheme.key, scheme.value)))


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
    if not hasattr(attention, QUANTIZER):
        attention.register_forward_pre_hook(_quantize_what_is_cached, with_kwargs=True)
    setattr(attention, QUANTIZER, quantizer)


class QuantizedCache:
    """A KV cache of transformers as one attention module sees it: keys and values are quantized as they enter."""

    def __init__(self, cache: Cache, quantizer: AttentionQuantizer):
        self._cache, self._quantizer = cache, quantizer

    def update(self, key: Tensor, value: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add new keys and values [batch, kv heads, T, head_dim]; return all there are, quantized."""
        return self._cache.update(*self._quantizer.key_value(key, value), *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._cache, name)


def _quantize_what_is_cached(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    cache = kwargs.get("past_key_values")
    if cache is None:
        return args, kwargs
    return args, {**kwargs, "past_key_values": QuantizedCache(cache, getattr(module, QUANTIZER)), CACHED: True}


def _wrapper(base: str):
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        quantizer, cached = getattr(module, QUANTIZER, None), kwargs.pop(CACHED, False)
        if quantizer is not None:
            query, key, value = (
                (quantizer.quantized_query(query), key, value) if cached else quantizer(query, key, value)
            )
        # each modelling file has its own eager function; all others are in the registry
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)(module, query, key, value, *args, **kwargs)

    return attention
