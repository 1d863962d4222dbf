"""Quantizers: granularity (vector or group) → range → clip → format."""

import torch
from torch import Tensor, nn

from duquant.formats import Codes, Format, Parameters
from duquant.scheme import BY_BLOCK, SEARCHED, TensorScheme, number_format
from duquant.tensors import extremes, row_parts, widen


class NoClip(nn.Module):
    """The range as it is. A clip is called with the minimum and maximum of every vector and returns another pair."""

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return (low, high) unchanged."""
        return low, high


class FittedClip(nn.Module):
    """For a format of blocks: of its `choices` the ratio that rounds a block best, which `BlockFormat.fitted` finds."""

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return (low, high) unchanged: what the choices multiply."""
        return low, high


class RatioClip(nn.Module):
    """Both ends multiplied by one fixed ratio in (0, 1]."""

    def __init__(self, ratio: float):
        super().__init__()
        self.ratio = ratio

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return (ratio·low, ratio·high)."""
        return self.ratio * low, self.ratio * high

    def extra_repr(self) -> str:
        """Show the ratio."""
        return f"ratio={self.ratio}"


class FoundClip(nn.Module):
    """The ends multiplied by ratios (low, high), [2], that were searched or trained for this tensor."""

    def __init__(self, ratios: Tensor):
        super().__init__()
        self.register_buffer("ratios", ratios)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return (ratios[0]·low, ratios[1]·high)."""
        return self.ratios[0] * low, self.ratios[1] * high


def fixed_clip(ratio: float | str | None) -> nn.Module:
    """The clip of a fixed ratio: `NoClip` when it is None, `FittedClip` for BY_BLOCK."""
    if ratio == BY_BLOCK:
        return FittedClip()
    return NoClip() if ratio is None else RatioClip(ratio)


class Quantizer(nn.Module):
    """Quantizes the vectors along the last axis, each with its own range, computed in at least float32.

    The last axis of a weight [O, C] makes that one range per output channel; of a linear's input [..., T, C] per
    token; of q, k or v [batch, heads, T, head_dim] per token and head. `group_size` cuts the last axis into groups
    with a range each. The range is that of the present tensor, so activations are quantized dynamically. `base` [1]:
    of a format that has one, the same for all tensors.
    """

    def __init__(
        self,
        form: Format,
        clip: nn.Module | None = None,
        group_size: int | None = None,
        base: Tensor | None = None,
    ):
        super().__init__()
        self.format = form
        self.register_buffer("base", base)
        self.clip = clip if clip is not None else NoClip()
        self.group_size = group_size

    def vectors(self, x: Tensor) -> Tensor:
        """`x` [..., C] in at least float32, and as [..., C/g, g] where groups have ranges of their own."""
        return widen(x if self.group_size is None else x.unflatten(-1, (-1, self.group_size)))

    def parameters(self, vectors: Tensor) -> Parameters:
        """Scale and zero point of the clipped range of every vector: [..., 1]."""
        low, high = self.clip(*ends(vectors))
        if isinstance(self.clip, FittedClip):
            return self.format.fitted(vectors, low, high, self.base)
        return self.format.parameters(low, high, self.base)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Fake quantization: decode(encode(x)), in the shape of `x`, rounded once to `dtype` or to that of `x`."""
        dtype, result = dtype or x.dtype, None
        if x.device.type == "cuda":
            from duquant.ops.fused import fake_quantize  # which itself needs quantizers

            result = fake_quantize(x, self, dtype)
        return self.computed(x, dtype) if result is None else result

    def computed(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`forward` by torch's operations, which can be differentiated."""
        vectors = self.vectors(x)
        return self.format.fake(vectors, self.parameters(vectors)).view(x.shape).to(dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """The codes of `x` [rows, ..., C], some rows at a time: the integers are the only other large tensor."""
        vectors = self.vectors(x)
        scale, zero = self.parameters(vectors)
        values = torch.empty(vectors.shape, dtype=self.format.dtype, device=x.device)
        for part in row_parts(vectors):
            values[part] = self.format.encode(vectors[part], Parameters(scale[part], zero[part])).values
        return Codes(values, scale, zero, self.base)

    def decode(self, codes: Codes) -> Tensor:
        """x̂ [..., C] of the codes of x, in the dtype of their scale: rounded to the dtype of x, it is `forward(x)`."""
        values = self.format.decode(codes)
        return values if self.group_size is None else values.flatten(-2)

    def extra_repr(self) -> str:
        """Show the format and the granularity."""
        return f"{self.format}, group_size={self.group_size}"


def ends(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum along the last axis, which stays: [..., C] → [..., 1] each."""
    low, high = extremes(vectors, dim=-1)
    return low[..., None], high[..., None]


class CenteredQuantizer(Quantizer):
    """Q(x − c) + c with a constant `mean` c that broadcasts against x: what all vectors share is not rounded."""

    def __init__(self, form: Format, clip: nn.Module | None, group_size: int | None, mean: Tensor):
        super().__init__(form, clip, group_size)
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Fake quantization, in the shape of `x`, rounded to `dtype` or to that of `x`."""
        wide = widen(x)
        return (super().forward(wide - self.mean) + self.mean).to(dtype or x.dtype)

    def encode(self, x: Tensor) -> Codes:
        """The codes of x − c."""
        return super().encode(widen(x) - self.mean)

    def decode(self, codes: Codes) -> Tensor:
        """x̂ [..., C], c included, in the dtype of the scale."""
        return super().decode(codes) + self.mean


def quantized(quantizer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Q(x) in `dtype`; `quantizer` may be anything that takes and gives a tensor, such as the identity."""
    return quantizer(x, dtype) if isinstance(quantizer, Quantizer) else quantizer(x).to(dtype)


def make_quantizer(
    scheme: TensorScheme, clip: nn.Module | None = None, mean: Tensor | None = None, base: Tensor | None = None
) -> nn.Module:
    """The quantizer of a tensor, with its own clip unless another is given; the identity for 16 bits.

    A `mean` is left out of the rounding, where there is no `base`. Raises ValueError if the clip is to be
    searched and none is given.
    """
    if not scheme.quantized:
        return nn.Identity()
    if clip is None and scheme.clip == SEARCHED:
        raise ValueError("the clip of this tensor is to be searched, and was not")
    how = (number_format(scheme), clip or fixed_clip(scheme.clip), scheme.group_size)
    return Quantizer(*how, base) if mean is None else CenteredQuantizer(*how, mean)
