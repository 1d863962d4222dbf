"""The linear that replaces nn.Linear in a decoder layer, and what it shares with those that read the same input."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duquant.formats import Codes, Format, IntegerFormat
from duquant.ops import kernel_for
from duquant.ops.base import Kernel, RowCodes
from duquant.ops.fused import rotate_and_round
from duquant.packing import PackedCodes, code_sums, decode_weight, pack
from duquant.quantizer import Quantizer, quantized
from duquant.transform import DualTransform


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
        return self._once(x, None, self._computed)

    def encoded(self, x: Tensor, kernel: Kernel) -> RowCodes:
        """The codes that `forward` rounds to, for a product of `kernel`: [..., C] → those of [T, C]."""

        def encode(x: Tensor) -> RowCodes:
            return kernel.encode(x.flatten(0, -2), self.transform, self.shift, self.quantizer)

        return self._once(x, kernel, encode)

    def _once(self, x: Tensor, kernel: Kernel | None, compute: Callable[[Tensor], Any]) -> Any:
        # a compiler finds what is computed twice by itself
        if (torch.is_grad_enabled() and self._differentiated(x)) or torch.compiler.is_compiling():
            return compute(x)
        if self._left and self._kernel is kernel and self._seen() is x and self._unchanged(x):
            self._left -= 1
            result = self._result
            if not self._left:
                self._forget()
            return result
        result = compute(x)
        if self.readers > 1 and (not x.is_inference() or x.device.type == "cpu"):  # a GPU would be waited for
            self._mark = x.clone() if x.is_inference() else x._version
            self._seen, self._left, self._result, self._kernel = weakref.ref(x), self.readers - 1, result, kernel
        return result

    def _unchanged(self, x: Tensor) -> bool:
        """Whether `x` is what it was when it was seen: inference tensors do not count what is done to them in place."""
        return torch.equal(self._mark, x) if x.is_inference() else self._mark == x._version

    def _differentiated(self, x: Tensor) -> bool:
        return x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def _computed(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda" and type(self.transform) is DualTransform and type(self.quantizer) is Quantizer:
            parts = self.transform
            rounded = rotate_and_round(x, self.quantizer, parts.rotations, parts.permutations, parts.scale, self.shift)
            if rounded is not None:
                return rounded
        y = self.transform(x)
        return quantized(self.quantizer, y if self.shift is None else y - self.shift, x.dtype)

    def _forget(self) -> None:
        self._seen, self._mark, self._left, self._result, self._kernel = None, None, 0, None, None

    def extra_repr(self) -> str:
        """Show how many linears share it."""
        return f"readers={self.readers}"


class QuantLinear(nn.Module):
    """y = x̂ · ŵᵀ + b with x̂ from the group's `GroupInput` and ŵ [O, C] held as packed codes with scale and zero.

    What is multiplied is ŵ as floats, or the codes of both (see `compute_`); either is made of the packed codes where
    it is needed and forgotten again, or kept. `weight` may be a tensor instead of codes: one that is not quantized, or
    was decoded by whoever saved it.
    """

    def __init__(self, weight: Codes | PackedCodes | Tensor, form: Format, bias: Tensor | None, group: GroupInput):
        super().__init__()
        self.format, self.group = form, group
        weight = pack(weight, form) if isinstance(weight, Codes) else weight
        if isinstance(weight, PackedCodes):
            self.out_features, self.in_features = len(weight.values), weight.channels
            self.register_buffer("codes", weight.values)
            self.register_buffer("scale", weight.scale)
            self.register_buffer("zero", weight.zero)
            self.register_buffer("base", weight.base)
            self.plain = None
        else:
            self.out_features, self.in_features = weight.shape
            self.codes = self.scale = self.zero = self.base = None
            self.register_buffer("plain", weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.integers, self.keeps, self._kept, self._sums = False, False, None, None
        self._kernel: tuple[str, Kernel | None] = ("", None)  # what multiplies codes on a type of device

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., O], in the dtype of `x`; `x` is left as it is."""
        kernel = self.kernel(x)
        if kernel is None:
            return F.linear(self.group(x), self.decoded(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        multiply = self._multiply if kernel.traceable else self._multiply_untraced
        return multiply(x, kernel).view(*x.shape[:-1], self.out_features)

    def _multiply(self, x: Tensor, kernel: Kernel) -> Tensor:
        return kernel.linear(self.group.encoded(x, kernel), self._prepared(kernel), self.bias, x.dtype)

    @torch.compiler.disable
    def _multiply_untraced(self, x: Tensor, kernel: Kernel) -> Tensor:
        return self._multiply(x, kernel)

    def compute_(self, integers: bool, keep: bool) -> None:
        """From now on multiply codes where a kernel serves them, or decoded weights; `keep` what is made for that."""
        self._restore_()
        self.integers, self.keeps = integers, keep
        if integers:
            self._choose_(
                (self.scale if self.plain is None else self.plain).device.type
            )  # tried and announced now, not in the midst of a forward pass

    def kernel(self, x: Tensor) -> Kernel | None:
        """What multiplies the codes of `x`; None where the decoded weight is multiplied."""
        if not self.integers or not x.numel() or x.requires_grad:
            return None
        device, kernel = self._kernel
        if device != x.device.type:
            self._choose_(x.device.type)
            kernel = self._kernel[1]
        return kernel

    @torch.compiler.disable
    def _choose_(self, device: str) -> None:
        quantizer, kernel = self.group.quantizer, None
        by_row = isinstance(quantizer, Quantizer) and not quantizer.group_size
        if by_row and self.plain is None and self.scale.dim() == 2 and isinstance(self.format, IntegerFormat):
            kernel = kernel_for(device)
        served = kernel is not None and kernel.serves(quantizer.format, self.format)
        self._kernel = device, kernel if served else None

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """ŵ [O, C] in `dtype`."""
        if self.plain is not None:
            return self.plain.to(dtype)
        key = (dtype, self.scale.device)
        if self._kept is None or self._kept[0] != key:
            self._restore_()
            weight = decode_weight(self.packed_codes, self.format, dtype)
            if not self.keeps:
                return weight
            self._kept = key, weight
        return self._kept[1]

    def _prepared(self, kernel: Kernel) -> Any:
        """What `kernel` reads of the codes. Where it keeps that and can tell the codes from it, they are let go."""
        # written over in place it is another weight; inference tensors do not say
        version = 0 if kernel.traceable or self.scale.is_inference() else self.scale._version
        key = (kernel, self.scale.device, version)
        if self._kept is None or self._kept[0] != key:
            self._restore_()
            if self._sums is None or self._sums.device != self.scale.device:
                self._sums = code_sums(self.packed_codes, self.format)
            prepared = kernel.prepare(self.packed_codes, self._sums, self.format, self.keeps)
            if not self.keeps and kernel.traceable:  # nothing is kept in the midst of what a compiler traces
                return prepared
            self._kept = key, prepared
            if self.keeps and kernel.recovers:
                self.codes = None
        return self._kept[1]

    def _restore_(self) -> None:
        """Hold the packed codes, and nothing that was made of them."""
        if self.plain is None and self.codes is None:
            (kernel, *_), prepared = self._kept
            self.codes = kernel.packed(prepared, self.format)
        self._kept = None

    def _apply(self, *args: Any, **kwargs: Any) -> "QuantLinear":
        self._restore_()  # to(device), half(): what was made for the old place is made again
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        self._restore_()  # oneDNN's tensors cannot be copied by `deepcopy`
        return self.__dict__

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore_()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore_()
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """ŵ [O, C] in the dtype of its scale, or in float32 where that is bits."""
        dtype = (self.scale if self.plain is None else self.plain).dtype
        return self.decoded(dtype if dtype.is_floating_point else torch.float32)

    @property
    def kept_bytes(self) -> int:
        """Bytes of what was made of the codes and is kept, none of which is a buffer."""
        made = self._kept[1] if self._kept is not None else ()
        tensors = [each for each in (made if isinstance(made, tuple) else (made,)) if isinstance(each, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def packed_codes(self) -> PackedCodes | None:
        """The codes, if the weight is quantized."""
        if self.plain is not None:
            return None
        if self.codes is None:
            self._restore_()
        return PackedCodes(self.codes, self.scale, self.zero, self.in_features, self.base)

    def extra_repr(self) -> str:
        """Show the shape and the format."""
        return f"{self.in_features}, {self.out_features}, {self.format if self.plain is None else 'not quantized'}"


def linears_of(module: nn.Module) -> list[QuantLinear]:
    """All quantized linears in `module`."""
    return [each for each in module.modules() if isinstance(each, QuantLinear)]


@contextmanager
def expanded(module: nn.Module, integers: bool | None = None, keep: bool = True) -> Iterator[None]:
    """Inside the block every `QuantLinear` in `module` keeps what it makes of its codes: memory for speed.

    `integers`: multiply codes there, or decoded weights; None: as before. Without `keep` no more is kept than before.
    """
    before = [(linear, linear.integers, linear.keeps) for linear in linears_of(module)]
    for linear, own, keeps in before:
        how = (own if integers is None else integers, keep or keeps)
        if how != (own, keeps):
            linear.compute_(*how)
    try:
        yield
    finally:
        for linear, *own in before:
            if own != [linear.integers, linear.keeps]:
                linear.compute_(*own)
