"""Quantized q, k and v: caught after RoPE, through transformers' registry of attention functions.

Every decoder layer of transformers calls an attention function by name. A name of ours wraps each implementation: it
looks for a quantizer on the attention module and otherwise does what the implementation does, so a model with the
wrapper installed is unchanged until `attach_` puts a quantizer on a layer.

With a KV cache, k and v are quantized once, when they enter it: an ordinary cache holds what their codes decode to,
`duquant.cache.PackedCache` the codes. Every token has its own ranges, so decoding with a cache computes what running
the whole text again would.
"""

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from duquant.hadamard import hadamard
from duquant.ops.fused import rotate_and_round
from duquant.quantizer import FoundClip, Quantizer, make_quantizer, quantized
from duquant.scheme import Scheme
from duquant.tensors import widen

HEAD_ROLES = ("query", "key", "value")
QUANTIZER = "qkv_quantizer"  # attribute of an attention module
PREFIX = "quantized_"  # of the names in the registry
CACHED = "keys_are_quantized"  # keyword argument by which the hook below tells the attention function
TAKES_QUANTIZER = "takes_quantizer"  # attribute of a cache that quantizes by itself what enters it


class AttentionQuantizer(nn.Module):
    """Quantizes q and k after RoPE and v, each per token and head: [batch, heads, T, head_dim] → same.

    q is multiplied by M = `matrix` and k by M⁻ᵀ = `key_matrix` first: (qM)(kM⁻ᵀ)ᵀ = qkᵀ. Where only M is given it is
    orthogonal, and for both: the orthonormal Hadamard matrix [head_dim, head_dim], which spreads outliers of k over the
    head. Matrices [kv heads, head_dim, head_dim] differ by kv head. Without any, nothing is multiplied.
    """

    def __init__(
        self,
        matrix: Tensor | None,
        query: nn.Module,
        key: nn.Module,
        value: nn.Module,
        key_matrix: Tensor | None = None,
    ):
        super().__init__()
        # one Hadamard matrix follows from the scheme, and so is not kept
        self.register_buffer("matrix", matrix, persistent=key_matrix is not None)
        self.register_buffer("key_matrix", key_matrix)
        self.query, self.key, self.value = query, key, value

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The quantized (query, key, value), in their dtypes."""
        return self.quantized_query(query), *self.key_value(key, value)

    def quantized_query(self, query: Tensor) -> Tensor:
        """The multiplied and quantized query, in its dtype."""
        return multiplied_and_rounded(query, self.matrix, self.query)

    def key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The quantized (key, value), in their dtypes."""
        return multiplied_and_rounded(key, self._matrix_of_key, self.key), self.value(value)

    def multiplied_key(self, key: Tensor) -> Tensor:
        """kM⁻ᵀ before it is rounded, in at least float32."""
        return by_head(widen(key), self._matrix_of_key)

    @property
    def _matrix_of_key(self) -> Tensor | None:
        return self.matrix if self.key_matrix is None else self.key_matrix


def multiplied_and_rounded(x: Tensor, matrix: Tensor | None, quantizer: nn.Module) -> Tensor:
    """Q(xM) of heads `x` [batch, heads, T, D] in its dtype; M as `by_head` takes it, any module for Q."""
    if matrix is not None and matrix.dim() == 2 and type(quantizer) is Quantizer:
        rounded = rotate_and_round(x, quantizer, matrix[None])
        if rounded is not None:
            return rounded
    return quantized(quantizer, by_head(widen(x), matrix), x.dtype)


def by_head(x: Tensor, matrix: Tensor | None) -> Tensor:
    """`x` [..., heads, T, D] times one matrix [D, D], or a matrix for each group of heads [groups, D, D]."""
    if matrix is None:
        return x
    matrix = matrix.to(x.dtype)
    if matrix.dim() == 2:
        return x @ matrix
    grouped = x.unflatten(-3, (len(matrix), -1)) @ matrix[:, None]
    return grouped.flatten(-4, -3)


def make_attention_quantizer(
    scheme: Scheme, head_dim: int, device: torch.device, found: Mapping[str, Tensor] | None = None
) -> AttentionQuantizer:
    """The quantizer of q, k and v for heads of `head_dim`; the Hadamard matrix has the size of the head.

    `found`: what was searched or trained for this layer, under the names of the result's own `state_dict`.
    """
    found = found or {}
    matrix = hadamard(head_dim).to(device) if scheme.turns_heads else None
    quantizers = []
    for role in HEAD_ROLES:
        ratios = found.get(f"{role}.clip.ratios")
        clip = None if ratios is None else FoundClip(ratios)
        quantizers.append(make_quantizer(getattr(scheme, role), clip, found.get(f"{role}.mean")))
    return AttentionQuantizer(found.get("matrix", matrix), *quantizers, found.get("key_matrix"))


def soft_capping(name: str, config: PretrainedConfig) -> str:
    """The attention implementation for a wanted one: `sdpa` cannot soft-cap scores, `eager` can."""
    caps = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if caps and name == "sdpa" else name


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
    """A KV cache of transformers as one attention module sees it: keys and values are quantized as they enter.

    An ordinary cache is given the floats they decode to; one that `TAKES_QUANTIZER` (see `duquant.cache`) is given
    the module's quantizer, and keeps codes.
    """

    def __init__(self, cache: Cache, quantizer: AttentionQuantizer):
        self._cache, self._quantizer = cache, quantizer

    def update(self, key: Tensor, value: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add new keys and values [batch, kv heads, T, head_dim]; return all there are, quantized."""
        if getattr(self._cache, TAKES_QUANTIZER, False):
            return self._cache.update(key, value, *args, quantizer=self._quantizer, **kwargs)
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
