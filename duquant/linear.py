"""The linear that replaces nn.Linear in a decoder layer, and what it shares with those that read the same input."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duquant.formats import Codes, IntegerFormat, PackedCodes, decode_weight, pack


class GroupInput(nn.Module):
    """Q_x(T(x Λ⁻¹) − z): the transform and the rounding of one activation, for all linears that read it.

    `shift` z [C] or None: what is the same for all tokens is not rounded; z Ŵᵀ is in the linears' biases.

    `readers`: how many linears read the same tensor one after the other; all but the first are given what it was given.
    While gradients are recorded each computes its own: their sum would be rounded in another order.
    """

    def __init__(self, transform: nn.Module, quantizer: nn.Module, readers: int = 1, shift: Tensor | None = None):
        super().__init__()
        self.register_buffer("shift", shift)
        self.transform, self.quantizer, self.readers = transform, quantizer, readers
        self._forget()

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., C] in the dtype of `x`, which is left as it is."""
        if torch.is_grad_enabled():
            return self._computed(x)
        if self._left and self._seen() is x and self._version == x._version:
            self._left -= 1
            result = self._result
            if not self._left:
                self._forget()
            return result
        result = self._computed(x)
        if self.readers > 1 and not x.is_inference():  # whether such a tensor was changed in place cannot be known
            self._seen, self._version, self._left, self._result = weakref.ref(x), x._version, self.readers - 1, result
        return result

    def _computed(self, x: Tensor) -> Tensor:
        y = self.transform(x)
        return self.quantizer(y if self.shift is None else y - self.shift).to(x.dtype)

    def _forget(self) -> None:
        self._seen, self._version, self._left, self._result = None, 0, 0, None

    def extra_repr(self) -> str:
        """Show how many linears share it."""
        return f"readers={self.readers}"


class QuantLinear(nn.Module):
    """y = x̂ · ŵᵀ + b with x̂ from the group's `GroupInput` and ŵ [O, C] held as packed codes with scale and zero.

    ŵ is decoded where it is needed and forgotten again (see `expanded`). `weight` may be a tensor instead of codes:
    one that is not quantized, or was decoded by whoever saved it.
    """

    def __init__(
        self, weight: Codes | PackedCodes | Tensor, form: IntegerFormat, bias: Tensor | None, group: GroupInput
    ):
        super().__init__()
        self.format, self.group = form, group
        weight = pack(weight, form) if isinstance(weight, Codes) else weight
        if isinstance(weight, PackedCodes):
            self.out_features, self.in_features = len(weight.values), weight.channels
            self.register_buffer("codes", weight.values)
            self.register_buffer("scale", weight.scale)
            self.register_buffer("zero", weight.zero)
        else:
            self.out_features, self.in_features = weight.shape
            self.codes = None
            self.register_buffer("plain", weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._keeps, self._kept = False, None

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., O], in the dtype of `x`; `x` is left as it is."""
        return F.linear(self.group(x), self.decoded(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """ŵ [O, C] in `dtype`."""
        if self.codes is None:
            return self.plain.to(dtype)
        if self._kept is not None and self._kept.dtype is dtype:
            return self._kept
        weight = decode_weight(self.packed_codes, self.format, dtype)
        if self._keeps:
            self._kept = weight
        return weight

    @property
    def weight(self) -> Tensor:
        """ŵ [O, C] in the dtype of its scale."""
        return self.decoded(self.plain.dtype if self.codes is None else self.scale.dtype)

    @property
    def packed_codes(self) -> PackedCodes | None:
        """The codes, if the weight is quantized."""
        return None if self.codes is None else PackedCodes(self.codes, self.scale, self.zero, self.in_features)

    def keep_decoded_(self, keep: bool) -> None:
        """From now on keep ŵ once it was decoded, or forget it."""
        self._keeps, self._kept = keep, None

    def extra_repr(self) -> str:
        """Show the shape and the format."""
        return f"{self.in_features}, {self.out_features}, {self.format if self.codes is not None else 'not quantized'}"


@contextmanager
def expanded(module: nn.Module) -> Iterator[None]:
    """Inside the block every `QuantLinear` in `module` decodes its weight once and keeps it: memory for speed."""
    linears = [each for each in module.modules() if isinstance(each, QuantLinear)]
    for linear in linears:
        linear.keep_decoded_(True)
    try:
        yield
    finally:
        for linear in linears:
            linear.keep_decoded_(False)
