"""A KV cache that holds k and v as packed codes: to the bit what a cache of rounded floats computes, in less memory.

    model.generate(tokens, past_key_values=PackedCache(model))                      # grows
    model.generate(tokens, past_key_values=PackedCache(model, max_cache_len=4096))  # allocated once

A token of one head becomes one row of bytes: its codes, n = 8 // bits in a byte, then a scale for every range, then its
zero point. Rows lie in transformers' own cache layers in the place of the floats; cutting, selecting, repeating and
moving tokens, windows that slide included, is theirs, and needs to know nothing of codes.

A head of D channels has one range unless its scheme has groups. A row of 4 bits takes D/2 bytes of codes, 4 of scale
and 2 of zero, so 38 for D = 64 and 70 for D = 128, where float16 takes 128 and 256: 0.30 and 0.27 of it. The scale is
float32 (float64 in a model of that dtype), since a rounded one would decode to other numbers. Zero points are integers
within ±1e4 and thus exact in int16; symmetric formats have one for all, which is not stored.

What attention reads is decoded at every step and forgotten behind it: k and v of all tokens of one layer in the model's
dtype, what that layer takes in an ordinary cache, and beside them `PART_ELEMENTS` numbers in float32 a few times over.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from duquant.attention import QUANTIZER, AttentionQuantizer
from duquant.formats import Codes, Format
from duquant.packing import pack_last, packed_width, unpack_last
from duquant.quantizer import Quantizer

PART_ELEMENTS = 2**22  # decoded at once: 16 MB in float32, and few launches on a GPU
ZERO_DTYPE = torch.int16  # holds every integer within formats.ZERO_LIMITS


@dataclass(frozen=True)
class RowLayout:
    """Where codes, scales and zero points are in the bytes of a vector of `channels` channels.

    `group_size`: channels that share a range; None: all. `wide`: the dtype of the scales, and of the decoded vector.
    """

    form: Format
    channels: int
    group_size: int | None
    wide: torch.dtype

    @property
    def widths(self) -> tuple[int, int, int]:
        """Bytes of codes, of scales and of zero points."""
        ranges = 1 if self.group_size is None else self.channels // self.group_size
        zeros = 0 if self.form.symmetric else ranges * ZERO_DTYPE.itemsize
        return packed_width(self.channels, self.form) * self.form.dtype.itemsize, ranges * self.wide.itemsize, zeros

    def rows(self, codes: Codes) -> Tensor:
        """Codes [batch, heads, T, C], or [batch, heads, T, C/g, g] with groups → bytes [batch, heads, T, W]."""
        parts = [pack_last(codes.values.flatten(3), self.form), codes.scale.flatten(3)]
        if not self.form.symmetric:
            parts.append(codes.zero.flatten(3).to(ZERO_DTYPE))
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)

    def codes(self, rows: Tensor) -> Codes:
        """The inverse of `rows`."""
        # a copy of each part begins where its dtype must
        values, scale, zero = (part.contiguous() for part in rows.split(self.widths, dim=-1))
        values, scale = unpack_last(values.view(self.form.dtype), self.channels, self.form), scale.view(self.wide)
        zero = torch.full_like(scale, self.form.middle) if self.form.symmetric else zero.view(ZERO_DTYPE).to(self.wide)
        if self.group_size is not None:
            values, scale, zero = values.unflatten(-1, (-1, self.group_size)), scale[..., None], zero[..., None]
        return Codes(values, scale, zero)


class PackedCache(Cache):
    """The KV cache of a quantized model, packed: floats only where k, v or a layer's attention is not quantized.

    It holds what layers of `DynamicCache`, or with `max_cache_len` (in tokens) of `StaticCache`, hold for this model,
    and does what they do. It has no copy of the model's quantizers: they come with every update. Raises ValueError for
    a model without quantized attention, and when it is used with another model.
    """

    takes_quantizer = True

    def __init__(self, model: PreTrainedModel, max_cache_len: int | None = None):
        self.quantized = frozenset(module.layer_idx for module in model.modules() if hasattr(module, QUANTIZER))
        if not self.quantized:
            raise ValueError(f"PackedCache: no attention of this {type(model).__name__} is quantized; use DynamicCache")
        config = model.config
        how = DynamicCache(config=config) if max_cache_len is None else StaticCache(config, max_cache_len=max_cache_len)
        super().__init__(layers=how.layers)
        self._grows = max_cache_len is None

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args, quantizer: AttentionQuantizer | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Quantize and add new keys and values [batch, kv heads, T, head_dim]; return all there are, decoded.

        Gradients do not pass.
        """
        if (quantizer is not None) != (layer_idx in self.quantized):
            raise ValueError(f"PackedCache: made for another model, layer {layer_idx} is quantized in one of them only")
        if quantizer is None:
            return super().update(key, value, layer_idx, *args, **kwargs)
        (key_rows, key_layout), (value_rows, value_layout) = (
            encoded(quantizer.multiplied_key(key), quantizer.key, key.dtype),
            encoded(value, quantizer.value, value.dtype),
        )
        key_rows, value_rows = super().update(key_rows, value_rows, layer_idx, *args, **kwargs)
        return (
            decoded(key_rows, key_layout, quantizer.key, key.dtype),
            decoded(value_rows, value_layout, quantizer.value, value.dtype),
        )

    def early_initialization(self, *_: object, **__: object) -> None:
        """Nothing: how wide a row is, is known when the first one comes."""

    def reset(self) -> None:
        """Forget all tokens; what was allocated once stays allocated."""
        if self._grows:
            # in transformers 5.17 a growing layer that is reset keeps its length, filled with zeros
            for layer in self.layers:
                if isinstance(layer, DynamicLayer):
                    layer.keys = layer.values = None
                    layer.is_initialized = False
        super().reset()

    @property
    def nbytes(self) -> int:
        """Bytes that are held now, those included that a slice of a larger tensor keeps alive."""
        held = (getattr(layer, name, None) for layer in self.layers for name in ("keys", "values"))
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)


def encoded(x: Tensor, quantizer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, RowLayout | None]:
    """`x` [batch, heads, T, C] as rows of bytes [batch, heads, T, W] and how to read them.

    A quantizer that rounds nothing: the bytes of the numbers in `dtype`, and None.
    """
    if not isinstance(quantizer, Quantizer):
        return quantizer(x).to(dtype).detach().contiguous().view(torch.uint8), None
    codes = quantizer.encode(x)
    layout = RowLayout(quantizer.format, x.shape[-1], quantizer.group_size, codes.scale.dtype)
    return layout.rows(codes), layout


def decoded(rows: Tensor, layout: RowLayout | None, quantizer: nn.Module, dtype: torch.dtype) -> Tensor:
    """What `quantizer` makes of the vectors that became `rows`, [batch, heads, T, C] in `dtype`, to the bit."""
    if layout is None:
        return rows.contiguous().view(dtype)
    batch, heads, tokens, _ = rows.shape
    step = max(1, PART_ELEMENTS // (batch * heads * layout.channels))
    if tokens <= step:
        return quantizer.decode(layout.codes(rows)).to(dtype)
    x = torch.empty(batch, heads, tokens, layout.channels, dtype=dtype, device=rows.device)
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        x[:, :, part] = quantizer.decode(layout.codes(rows[:, :, part]))
    return x
