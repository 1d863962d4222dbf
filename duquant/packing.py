"""Codes at rest: as many in a byte as fit whole, and scales in the type of their format."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duquant.formats import BlockFormat, Codes, Format
from duquant.tensors import row_parts


@dataclass(frozen=True)
class PackedCodes:
    """The codes of a weight [O, C], with n = 8 // bits of them in a byte; C is `channels`.

    `values` [O, ⌈C/n⌉]: code i of a row is in byte i // n, the first in its lowest bits; the last byte is filled with
    zeros. Codes of more than 8 bits stay [O, C]. `scale` and `zero` [O, 1], or [O, C/g, 1] for groups of g channels;
    scales of a format of blocks are the bits that it stores, uint8, beside the `base` [1] if it has one, and zero is
    None.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None
    channels: int
    base: Tensor | None = None

    def to(self, device: torch.device) -> "PackedCodes":
        """The same on `device`."""
        moved = {name: each.to(device) for name, each in self._parts().items()}
        return PackedCodes(**{"zero": None, **moved}, channels=self.channels)

    def tensors(self) -> dict[str, Tensor]:
        """Its parts by name; the number of channels too is a tensor [1]."""
        return {**self._parts(), "channels": torch.tensor([self.channels], device=self.values.device)}

    def _parts(self) -> dict[str, Tensor]:
        parts = {"values": self.values, "scale": self.scale, "zero": self.zero, "base": self.base}
        return {name: each for name, each in parts.items() if each is not None}

    def rows(self, part: slice) -> "PackedCodes":
        """Some rows of it."""
        zero = None if self.zero is None else self.zero[part]
        return PackedCodes(self.values[part], self.scale[part], zero, self.channels, self.base)


def pack_last(values: Tensor, form: Format) -> Tensor:
    """Codes [..., C] with as many in a byte as fit whole: [..., ⌈C/n⌉], laid out as `PackedCodes` says."""
    number = form.per_byte
    if number < 2:
        return values.contiguous()
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % number)).unflatten(-1, (-1, number))
    packed = values[..., 0].clone()
    for index in range(1, number):
        packed |= values[..., index] << index * form.bits
    return packed


def unpack_last(packed: Tensor, channels: int, form: Format) -> Tensor:
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


def pack(codes: Codes, form: Format) -> PackedCodes:
    """Codes of a weight, [O, C] or [O, C/g, g], at rest. Raises ValueError for those of a base that is not given."""
    values, scale, zero = codes.values.flatten(1), codes.scale, codes.zero
    if isinstance(form, BlockFormat):
        scale, zero = form.stored(scale, codes.base), None
    return PackedCodes(pack_last(values, form), scale, zero, values.shape[1], codes.base)


def unpack(packed: PackedCodes, form: Format) -> Codes:
    """The inverse of `pack`."""
    values, scale, zero = unpack_last(packed.values, packed.channels, form), packed.scale, packed.zero
    if scale.dim() == 3:
        values = values.unflatten(1, (scale.shape[1], -1))
    if isinstance(form, BlockFormat):
        scale = form.restored(scale, packed.base)
        zero = torch.zeros_like(scale)
    return Codes(values, scale, zero, packed.base)


def packed_width(channels: int, form: Format) -> int:
    """The second dimension of the packed codes of a weight with so many channels."""
    return -(-channels // max(1, form.per_byte))


def code_sums(packed: PackedCodes, form: Format) -> Tensor:
    """The sums of the codes of every range of a weight: int32 [O], or [O, C/g] for groups of g channels."""
    parts = [unpack(packed.rows(part), form).values for part in row_parts(packed.values)]
    # float32 is exact below 2^24, and a CPU adds it ten times faster than bytes
    return torch.cat([part.float().sum(dim=-1).to(torch.int32) for part in parts])


def decode_weight(packed: PackedCodes, form: Format, dtype: torch.dtype) -> Tensor:
    """The weight [O, C] in `dtype`, decoded in float32 or more some rows at a time: no other large tensors."""
    weight = torch.empty(len(packed.values), packed.channels, dtype=dtype, device=packed.values.device)
    for part in row_parts(weight):
        weight[part] = form.decode(unpack(packed.rows(part), form)).flatten(1)
    return weight
