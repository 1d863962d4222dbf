"""Number formats: a range gives parameters, parameters give codes, codes give numbers back.

    parameters = form.parameters(low, high)   # once per range
    codes = form.encode(x, parameters)        # whole tensors, or column by column with fixed parameters
    x_hat = form.decode(codes)
    packed = pack(codes, form)                # a weight at rest: as many codes in a byte as fit whole

An integer format now; others plug in beside it with the same four functions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from duquant.scheme import TensorScheme
from duquant.tensors import row_parts

SCALE_LIMITS = (1e-5, 1e4)
ZERO_LIMITS = (-1e4, 1e4)


class _StraightThroughRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def straight_through_round(x: Tensor) -> Tensor:
    """Round to nearest (ties to even); the gradient passes as if rounding were the identity."""
    return _StraightThroughRound.apply(x) if torch.is_grad_enabled() and x.requires_grad else x.round()


class Parameters(NamedTuple):
    """What decodes a range: scale and zero point, of one shape that broadcasts against what is encoded."""

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Codes:
    """A quantized tensor: integers, and the scale and zero point (floats that broadcast) that decode them.

    `values` [..., C], or [..., C/g, g] where every group of g channels has a range of its own.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes as they are held now."""
        return self.values.nbytes + self.scale.nbytes + self.zero.nbytes

    def to(self, device: torch.device) -> "Codes":
        """The same on `device`."""
        return Codes(self.values.to(device), self.scale.to(device), self.zero.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Its parts by name."""
        return {"values": self.values, "scale": self.scale, "zero": self.zero}


@dataclass(frozen=True)
class PackedCodes:
    """The codes of a weight [O, C], with n = 8 // bits of them in a byte; C is `channels`.

    `values` [O, ⌈C/n⌉]: code i of a row is in byte i // n, the first in its lowest bits; the last byte is filled with
    zeros. Codes of more than 8 bits stay [O, C]. `scale` and `zero` [O, 1], or [O, C/g, 1] for groups of g channels.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor
    channels: int

    def to(self, device: torch.device) -> "PackedCodes":
        """The same on `device`."""
        return PackedCodes(self.values.to(device), self.scale.to(device), self.zero.to(device), self.channels)

    def tensors(self) -> dict[str, Tensor]:
        """Its parts by name; the number of channels too is a tensor [1]."""
        parts = {"values": self.values, "scale": self.scale, "zero": self.zero}
        return {**parts, "channels": torch.tensor([self.channels], device=self.values.device)}

    def rows(self, part: slice) -> "PackedCodes":
        """Some rows of it."""
        return PackedCodes(self.values[part], self.scale[part], self.zero[part], self.channels)


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

    def parameters(self, low: Tensor, high: Tensor) -> Parameters:
        """Scale and zero point for values between `low` and `high` (same shapes out as in)."""
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
        return (straight_through_round(x / parameters.scale) + parameters.zero).clamp(0, self.largest)

    def encode(self, x: Tensor, parameters: Parameters) -> Codes:
        """The codes of `x` under parameters that broadcast against it."""
        return Codes(self.rounded(x, parameters).to(self.dtype), *parameters)

    def decode(self, codes: Codes) -> Tensor:
        """x̂ in the dtype of the scale, shaped as the codes."""
        return (codes.values.to(codes.scale.dtype) - codes.zero) * codes.scale

    def fake(self, x: Tensor, parameters: Parameters) -> Tensor:
        """decode(encode(x)) without integers between them: the same numbers, and differentiable."""
        return (self.rounded(x, parameters) - parameters.zero) * parameters.scale


def number_format(scheme: TensorScheme) -> IntegerFormat:
    """The format of a tensor's codes."""
    return IntegerFormat(scheme.bits, scheme.symmetric, scheme.full_range)


def pack_last(values: Tensor, form: IntegerFormat) -> Tensor:
    """Codes [..., C] with as many in a byte as fit whole: [..., ⌈C/n⌉], laid out as `PackedCodes` says."""
    number = form.per_byte
    if number < 2:
        return values.contiguous()
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % number)).unflatten(-1, (-1, number))
    packed = values[..., 0].clone()
    for index in range(1, number):
        packed |= values[..., index] << index * form.bits
    return packed


def unpack_last(packed: Tensor, channels: int, form: IntegerFormat) -> Tensor:
    """The inverse of `pack_last` for vectors of so many channels: [..., ⌈C/n⌉] → [..., C].

    Code i of a byte is moved from bit i · bits to bit 8i of an integer as wide as the codes are many, whose bytes (the
    lowest first, as on every machine that torch is built for) then are the codes.
    """
    number = form.per_byte
    if number < 2:
        return packed
    wide, mask = {2: (torch.int16, 0x0101), 4: (torch.int32, 0x01010101)}[number]
    values = torch.empty(packed.shape, dtype=wide, device=packed.device)
    for part in row_parts(values) if packed.numel() else ():
        own = packed[part].to(wide)
        spread = own.clone()
        for index in range(1, number):
            spread |= own << index * (8 - form.bits)
        torch.bitwise_and(spread, mask * form.largest, out=values[part])
    return values.view(torch.uint8)[..., :channels]


def pack(codes: Codes, form: IntegerFormat) -> PackedCodes:
    """Codes of a weight, [O, C] or [O, C/g, g], at rest."""
    values = codes.values.flatten(1)
    return PackedCodes(pack_last(values, form), codes.scale, codes.zero, values.shape[1])


def unpack(packed: PackedCodes, form: IntegerFormat) -> Codes:
    """The inverse of `pack`."""
    values = unpack_last(packed.values, packed.channels, form)
    if packed.scale.dim() == 3:
        values = values.unflatten(1, (packed.scale.shape[1], -1))
    return Codes(values, packed.scale, packed.zero)


def packed_width(channels: int, form: IntegerFormat) -> int:
    """The second dimension of the packed codes of a weight with so many channels."""
    return -(-channels // max(1, form.per_byte))


def code_sums(packed: PackedCodes, form: IntegerFormat) -> Tensor:
    """The sums of the codes of every range of a weight: int32 [O], or [O, C/g] for groups of g channels."""
    parts = [unpack(packed.rows(part), form).values for part in row_parts(packed.values)]
    # float32 is exact below 2^24, and a CPU adds it ten times faster than bytes
    return torch.cat([part.float().sum(dim=-1).to(torch.int32) for part in parts])


def decode_weight(packed: PackedCodes, form: IntegerFormat, dtype: torch.dtype) -> Tensor:
    """The weight [O, C] in `dtype`, decoded in float32 or more some rows at a time: no other large tensors."""
    weight = torch.empty(len(packed.values), packed.channels, dtype=dtype, device=packed.values.device)
    for part in row_parts(weight):
        weight[part] = form.decode(unpack(packed.rows(part), form)).flatten(1)
    return weight
