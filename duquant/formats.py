"""Number formats: a range gives parameters, parameters give codes, codes give numbers back.

    parameters = form.parameters(low, high)   # once per range
    codes = form.encode(x, parameters)        # whole tensors, or column by column with fixed parameters
    x_hat = form.decode(codes)

Integers of any bits, and 4-bit formats whose short blocks of channels have scales of 8 bits. A format is one class here
and one line in FORMATS; `duquant.packing` puts codes and scales at rest.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from duquant.elements import E2M1, Int4, power_below, straight_through_round

SCALE_LIMITS = (1e-5, 1e4)
ZERO_LIMITS = (-1e4, 1e4)
E4M3_LARGEST, E4M3_LEAST = 448.0, 2.0**-9  # positive numbers of float8_e4m3fn
LEAST_BASE = 2.0**-100  # of tensors of zeros: products with it are no subnormal numbers


class Parameters(NamedTuple):
    """What decodes a range: scale and zero point, of one shape that broadcasts against what is encoded."""

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Codes:
    """A quantized tensor: integers, and the scale and zero point (floats that broadcast) that decode them.

    `values` [..., C], or [..., C/g, g] where every group of g channels has a range of its own. `base` [1]: of a format
    that `has_base`, what its scales at rest are multiplied with; it is in `scale` already.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor
    base: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes as they are held now."""
        return sum(each.nbytes for each in self.tensors().values())

    def to(self, device: torch.device) -> "Codes":
        """The same on `device`."""
        return Codes(**{name: each.to(device) for name, each in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Its parts by name."""
        parts = {"values": self.values, "scale": self.scale, "zero": self.zero, "base": self.base}
        return {name: each for name, each in parts.items() if each is not None}


@dataclass(frozen=True)
class IntegerFormat:
    """Uniform integers q in [0, 2^bits − 1] that stand for x̂ = (q − zero) · scale.

    Asymmetric: scale = (hi − lo)/(2^bits − 1), zero = round(−lo/scale).
    Symmetric: scale = max(|lo|, |hi|)/(2^(bits−1) − 1), zero = 2^(bits−1) − 1: as many codes on either side.
    Symmetric over the `full_range`: scale = max(|lo|, |hi|)/((2^bits − 1)/2), however small, zero = 2^(bits−1). It is
    the arithmetic of compressed-tensors (and so of vLLM), whose integers are ours less the zero point.
    """

    bits: int
    symmetric: bool = False
    full_range: bool = False
    block: ClassVar[int | None] = None
    has_base: ClassVar[bool] = False

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 2 ** (self.bits - 1) - (not self.full_range)

    @property
    def kind(self) -> int:
        """0 asymmetric, 1 symmetric, 2 symmetric over the full range: what kernels are told."""
        return self.symmetric + (self.symmetric and self.full_range)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest integers of torch that hold every code."""
        return torch.uint8 if self.bits <= 8 else torch.int16

    @property
    def per_byte(self) -> int:
        """How many codes a byte holds whole; 0 if it holds none."""
        return 8 // self.bits

    def parameters(self, low: Tensor, high: Tensor, base: Tensor | None = None) -> Parameters:
        """Scale and zero point for values between `low` and `high` (same shapes out as in); there is no `base`."""
        if self.symmetric:
            scale = torch.maximum(low.abs(), high.abs()) / (self.largest / 2 if self.full_range else self.middle)
            scale = scale.clamp(0 if self.full_range else SCALE_LIMITS[0], SCALE_LIMITS[1])
            if self.full_range:  # any divisor serves a range of zeros
                scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
            return Parameters(scale, torch.full_like(scale, self.middle))
        scale = ((high - low) / self.largest).clamp(*SCALE_LIMITS)
        return Parameters(scale, (-low / scale).clamp(*ZERO_LIMITS).round())

    def rounded(self, x: Tensor, parameters: Parameters) -> Tensor:
        """The codes of `x` as floats. Differentiable in `x` and in the parameters (straight-through)."""
        steps, zero = x / parameters.scale, parameters.zero
        if steps.requires_grad or zero.requires_grad:
            return (straight_through_round(steps) + zero).clamp(0, self.largest)
        return steps.round_().add_(zero).clamp_(0, self.largest)  # fresh memory for each costs several times as much

    def encode(self, x: Tensor, parameters: Parameters) -> Codes:
        """The codes of `x` under parameters that broadcast against it."""
        return Codes(self.rounded(x, parameters).to(self.dtype), *parameters)

    def decode(self, codes: Codes) -> Tensor:
        """x̂ in the dtype of the scale, shaped as the codes."""
        return (codes.values.to(codes.scale.dtype) - codes.zero) * codes.scale

    def fake(self, x: Tensor, parameters: Parameters) -> Tensor:
        """decode(encode(x)) without integers between them: the same numbers, and differentiable."""
        codes, (scale, zero) = self.rounded(x, parameters), parameters
        return (codes - zero) * scale if codes.requires_grad else codes.sub_(zero).mul_(scale)


class BlockFormat:
    """x̂ = e · s: elements e of 4 bits, and for every `block` of channels a scale s that has 8 bits at rest.

    There is no zero point: that of its codes is 0. A clip ratio r takes r · max|x| in place of max|x|. `choices`: the
    ratios among which `fitted` chooses.
    """

    name: ClassVar[str]
    choices: ClassVar[tuple[float, ...]]
    block: ClassVar[int]
    elements: ClassVar[type[E2M1] | type[Int4]]
    has_base: ClassVar[bool] = False
    bits: ClassVar[int] = 4
    symmetric: ClassVar[bool] = True
    middle: ClassVar[int] = 0
    largest: ClassVar[int] = 15
    dtype: ClassVar[torch.dtype] = torch.uint8
    per_byte: ClassVar[int] = 2

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def scale(self, peak: Tensor, base: Tensor | None) -> Tensor:
        """The scale of blocks whose largest magnitude is `peak` [..., C/block, 1], in its dtype; never zero."""
        raise NotImplementedError

    def base_for(self, peak: Tensor, base: Tensor | None) -> Tensor | None:
        """What the scales of vectors with such blocks are multiplied with: `base`, or where there is none their own."""
        return base

    def stored(self, scale: Tensor, base: Tensor | None) -> Tensor:
        """The bits of such scales, uint8."""
        raise NotImplementedError

    def restored(self, bits: Tensor, base: Tensor | None) -> Tensor:
        """The inverse of `stored`, float32."""
        raise NotImplementedError

    def parameters(self, low: Tensor, high: Tensor, base: Tensor | None = None) -> Parameters:
        """The scale for blocks between `low` and `high` [..., C/block, 1]. Straight-through in these."""
        peak = torch.maximum(low.abs(), high.abs())
        scale = self.scale(peak.detach(), base)
        if peak.requires_grad and torch.is_grad_enabled():
            smooth = peak / self.elements.largest
            scale = scale + (smooth - smooth.detach())
        return Parameters(scale, torch.zeros_like(scale))

    def fitted(self, x: Tensor, low: Tensor, high: Tensor, base: Tensor | None = None) -> Parameters:
        """`parameters` for each of the `choices` times the range, of which a block of `x` has those that round it best.

        By squared error. Neither the choice nor a base of the vector's own is differentiated.
        """
        peak = torch.maximum(low.abs(), high.abs())
        base = self.base_for(max(self.choices) * peak.detach(), base)
        scale, least = None, None
        for ratio in self.choices:
            each = self.parameters(ratio * low, ratio * high, base)
            with torch.no_grad():
                error = (self.fake(x, each) - x).square_().sum(dim=-1, keepdim=True)
            better = None if least is None else error < least
            scale = each.scale if better is None else torch.where(better, each.scale, scale)
            least = error if better is None else torch.minimum(error, least)
        return Parameters(scale, torch.zeros_like(scale))

    def encode(self, x: Tensor, parameters: Parameters) -> Codes:
        """The bit patterns of `x` under parameters that broadcast against it."""
        return Codes(self.elements.pattern(self.elements.nearest(x / parameters.scale)), *parameters)

    def decode(self, codes: Codes) -> Tensor:
        """x̂ in the dtype of the scale, shaped as the codes."""
        return self.elements.number(codes.values, codes.scale.dtype) * codes.scale

    def fake(self, x: Tensor, parameters: Parameters) -> Tensor:
        """decode(encode(x)) without codes between them: the same numbers, and differentiable."""
        return self.elements.nearest(x / parameters.scale) * parameters.scale


class PowerScales(BlockFormat):
    """Blocks of 32 with a power of two for scale (E8M0): 2^(⌊log₂ max|x|⌋ − 2), for elements that reach 4 and more.

    Magnitudes above the largest element are cut off to it. The rule that cuts off none, the least power of two that is
    at least max|x|/6, is this one with a clip ratio of 4/3. Source: OCP MX 1.0.
    """

    block = 32

    def scale(self, peak: Tensor, base: Tensor | None) -> Tensor:
        """The power of two."""
        exponent = torch.frexp(peak).exponent - 1 - self.elements.exponent  # peak = m · 2^e with m in [½, 1)
        exponent = torch.where(peak > 0, exponent, -126).clamp(-126, 127)
        return torch.ldexp(torch.ones_like(peak), exponent)

    def stored(self, scale: Tensor, base: Tensor | None) -> Tensor:
        """The exponent plus 127."""
        return (torch.frexp(scale).exponent + 126).to(torch.uint8)

    def restored(self, bits: Tensor, base: Tensor | None) -> Tensor:
        """The power of two."""
        return torch.ldexp(torch.ones(bits.shape, device=bits.device), bits.int() - 127)


class MxFp4(PowerScales):
    """MXFP4: E2M1 elements. Source: OCP MX 1.0."""

    name = "mxfp4"
    elements = E2M1
    choices = (1.0, 2.0)  # the largest magnitude is between 4 and 8, or between 2 and 4


class MxInt4(PowerScales):
    """MXINT4: integers −8 … 7 with the scales of MXFP4, to compare with."""

    name = "mxint4"
    elements = Int4
    choices = (1.0, 0.5)  # between 4 and 8, or more


class NvFp4(BlockFormat):
    """NVFP4: E2M1 elements in blocks of 16 with scales E4M3(max|x| / 6 / base) · base, `base` a float32 number.

    Of a weight, and of a linear's input where it was calibrated, the base is max|tensor| / (448 · 6), for which the
    largest scale is the largest number of E4M3, rounded up to a power of two: that takes one of its 17 octaves and
    makes all products exact, in bfloat16 too. Where none is given every vector has its own, which is not rounded: then
    the scale of its largest block is exact.
    """

    name = "nvfp4"
    block = 16
    choices = (1.0, 15 / 16, 1.5)  # the largest magnitude is 6, cut off to 6, or 4, about which numbers lie closer
    elements = E2M1
    has_base = True

    def base_of(self, peak: Tensor) -> Tensor:
        """The base of tensors whose largest magnitude is `peak`, in its shape."""
        least = self._least_base(peak)
        below = power_below(least)
        return torch.where(below < least, 2 * below, below)

    def _least_base(self, peak: Tensor) -> Tensor:
        return (peak / (E4M3_LARGEST * self.elements.largest)).clamp(min=LEAST_BASE)

    def base_for(self, peak: Tensor, base: Tensor | None) -> Tensor:
        """The base, or the least that the vectors' largest blocks can have."""
        return self._least_base(peak.amax(dim=-2, keepdim=True)) if base is None else base.to(peak.dtype)

    def scale(self, peak: Tensor, base: Tensor | None) -> Tensor:
        """The number of E4M3 times the base."""
        base = self.base_for(peak, base)
        scale = (peak / self.elements.largest / base).clamp(E4M3_LEAST, E4M3_LARGEST)
        return scale.float().to(torch.float8_e4m3fn).to(peak.dtype) * base

    def stored(self, scale: Tensor, base: Tensor | None) -> Tensor:
        """The bits of the number of E4M3. Raises ValueError without a base."""
        if base is None:
            raise ValueError("scales of NVFP4 are kept with the base of their tensor, and this one has none")
        return (scale / base).float().to(torch.float8_e4m3fn).view(torch.uint8)

    def restored(self, bits: Tensor, base: Tensor | None) -> Tensor:
        """The number of E4M3 times the base."""
        return bits.view(torch.float8_e4m3fn).float() * base.float()


Format = IntegerFormat | BlockFormat
BLOCK_FORMATS: dict[str, type[BlockFormat]] = {each.name: each for each in (MxFp4, NvFp4, MxInt4)}
INTEGERS = "int"
FORMATS = (INTEGERS, *BLOCK_FORMATS)
