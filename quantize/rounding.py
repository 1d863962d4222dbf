"""From a transformed weight to codes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duquant.formats import number_format
from duquant.linear import GroupInput, QuantLinear
from duquant.quantizer import Quantizer, make_quantizer
from duquant.scheme import TensorScheme
from quantize.training import LearnedClip


class OpenLinear(nn.Module):
    """y = x̂ · Q_w(T(W Λ))ᵀ + b with the transformed weight [O, C] in at least float32, rounded anew in every call.

    What stands in a layer until its weight is rounded for good: straight-through rounding lets a clip be trained.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scheme: TensorScheme, group: GroupInput, learned: bool):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme, self.group = scheme, group
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        clip = LearnedClip(_ranges(weight, scheme.group_size)).to(weight.device) if learned else None
        self.quantizer = make_quantizer(scheme, clip)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., O], in the dtype of `x`; `x` is left as it is."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self.group(x), self.quantizer(self.weight).to(x.dtype), bias)

    @property
    def clip(self) -> LearnedClip | None:
        """The clip that is trained, if there is one."""
        clip = getattr(self.quantizer, "clip", None)
        return clip if isinstance(clip, LearnedClip) else None

    def rounded(self, dtype: torch.dtype) -> QuantLinear:
        """The linear with the nearest codes under the clip as it is now; `dtype` is that of what is not rounded."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        weight = self.weight.detach()
        encoded = self.quantizer.encode(weight) if isinstance(self.quantizer, Quantizer) else weight.to(dtype)
        return QuantLinear(encoded, number_format(self.scheme), bias, self.group)

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{self.in_features}, {self.out_features}"


def _ranges(weight: Tensor, group_size: int | None) -> tuple[int, ...]:
    """The shape of a weight's ranges: [O, 1], or [O, C/g, 1]."""
    rows, channels = weight.shape
    return (rows, 1) if group_size in (None, channels) else (rows, channels // group_size, 1)
