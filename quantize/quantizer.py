"""Quantizers: granularity (vector or group) → range → clip → format."""

import torch
from torch import Tensor, nn

from quantize.clipping import NoClip
from quantize.config import UNQUANTIZED_BITS
from quantize.formats import Codes, IntegerFormat
from utils.batching import row_parts


class Quantizer(nn.Module):
    """Quantizes the vectors along the last axis, each with its own range, computed in at least float32.

    The last axis of a weight [O, C] makes that one range per output channel; of a linear's input [..., T, C] per
    token; of q, k or v [batch, heads, T, head_dim] per token and head. `group_size` cuts the last axis into groups
    with a range each. The range is that of the present tensor, so activations are quantized dynamically.
    """

    def __init__(self, number_format: IntegerFormat, clip: nn.Module | None = None, group_size: int | None = None):
        super().__init__()
        self.format = number_format
        self.clip = clip if clip is not None else NoClip()
        self.group_size = group_size

    def quantize(self, x: Tensor) -> Codes:
        """Codes of `x` [..., C], shaped [..., C] or [..., C/g, g]; scale and zero end in 1 and broadcast."""
        x, low, high = self._ranges(x)
        return self.format.quantize(x, low, high)

    def _ranges(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x` as its vectors, in at least float32, and the clipped range of each."""
        if self.group_size is not None:
            x = x.unflatten(-1, (-1, self.group_size))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x, *self.clip(*torch.aminmax(x, dim=-1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization: dequantize(quantize(x)), same shape and dtype as `x`."""
        return self.quantize(x).dequantize().view(x.shape).to(x.dtype)

    @torch.no_grad()
    def rounded(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """What `forward` gives for a weight [O, C], in `dtype`, some rows at a time: no other large tensors."""
        x, low, high = self._ranges(weight)
        result = torch.empty(x.shape, dtype=dtype, device=x.device)
        for part in row_parts(x):
            result[part] = self.format.quantize(x[part], low[part], high[part]).dequantize().to(weight.dtype)
        return result.view(weight.shape)

    def extra_repr(self) -> str:
        """Show the format and the granularity."""
        return f"{self.format}, group_size={self.group_size}"


def make_quantizer(bits: int, symmetric: bool, clip: nn.Module, group_size: int | None = None) -> nn.Module:
    """A quantizer, or the identity for 16 bits."""
    if bits >= UNQUANTIZED_BITS:
        return nn.Identity()
    return Quantizer(IntegerFormat(bits, symmetric), clip, group_size)
