"""The linear that replaces nn.Linear in a decoder layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.quantizer import Quantizer


class QuantLinear(nn.Module):
    """y = Q_x(T(x Λ⁻¹)) · Q_w(T(W Λ))ᵀ + b with a transform shared by the group and one quantizer for each side.

    Made from a linear whose group's transform is known: the weight [O, C] is transformed once, here, and kept in at
    least float32 so that it can be quantized again and again (learned clipping) until `bake_` rounds it for good. With
    `baked` the linear's weight is taken as transformed and rounded already.
    """

    def __init__(
        self,
        linear: nn.Linear,
        transform: nn.Module,
        weight_quantizer: nn.Module | None,
        input_quantizer: nn.Module,
        baked: bool = False,
    ):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach() if baked else transform.transform_weight(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.transform = transform
        self.weight_quantizer = None if baked else weight_quantizer
        self.input_quantizer = input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., O], in the dtype of `x`; `x` is left as it is."""
        quantized = self.input_quantizer(self.transform(x)).to(x.dtype)
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return F.linear(quantized, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def bake_(self, dtype: torch.dtype) -> None:
        """Replace the weight by its quantized values in `dtype`; the weight quantizer is dropped."""
        if self.weight_quantizer is not None:
            if isinstance(self.weight_quantizer, Quantizer):
                self.weight.data = self.weight_quantizer.rounded(self.weight, dtype)
            else:
                self.weight.data = self.weight.to(dtype)  # 16 bits
            self.weight_quantizer = None
        if self.bias is not None:
            self.bias.data = self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Show the shape and whether the weight is final."""
        return f"{self.in_features}, {self.out_features}, baked={self.weight_quantizer is None}"
