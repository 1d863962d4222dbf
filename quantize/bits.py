"""Settings of what is rounded to what: bits, formats and ranges by role, and how ranges are clipped.

Each class checks itself and names the command-line flag in its error, as in `quantize.settings`.
"""

import argparse
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from utils.errors import InputError
from utils.settings import NONE, option

UNQUANTIZED_BITS = 16  # as in `duquant.scheme`, which is not imported for a flag: transformers loads for seconds
SEARCH = "search"  # in place of a clip ratio: it is searched on calibration data
BLOCK = "block"  # or every block of an activation has the best of a few
Ratio = float | str | None  # a clip ratio, SEARCH, BLOCK, or no clipping
BLOCK_BITS = 4  # of all formats of blocks
LARGEST_BLOCK_RATIO = 2.0  # of their clips: twice the scale that the range asks for


class SymmetricRange(StrEnum):
    """Which codes of b bits a symmetric range uses."""

    RESTRICTED = "restricted"  # as many on either side of 0: the peak is 2^(b−1) − 1 steps away
    FULL = "full"  # all of them: the peak is (2^b − 1)/2 steps away, the arithmetic of compressed-tensors


class Format(StrEnum):
    """Numbers that codes stand for, by the names in `duquant.formats`, which is not imported for a flag."""

    INT = "int"  # integers of any bits
    MXFP4 = "mxfp4"  # 4-bit floats, a power of two for every 32
    NVFP4 = "nvfp4"  # 4-bit floats, an 8-bit float for every 16
    MXINT4 = "mxint4"  # 4-bit integers, a power of two for every 32

    @property
    def calibrated(self) -> bool:
        """Whether an input in it has a number that samples decide."""
        return self is Format.NVFP4


def clip_ratio(text: str) -> Ratio:
    """What `--swc` says: a number, SEARCH, or `none`, which takes out what a preset has."""
    return _ratio(text, (SEARCH,))


def input_clip_ratio(text: str) -> Ratio:
    """What `--lac` says: what `--swc` can, or BLOCK."""
    return _ratio(text, (SEARCH, BLOCK))


def _ratio(text: str, words: tuple[str, ...]) -> Ratio:
    if text == NONE:
        return None
    try:
        return text if text in words else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {' or '.join(words)}") from None


def _check_ratio(flag: str, value: Ratio, words: tuple[str, ...] = ()) -> None:
    if isinstance(value, str):
        if value not in words:
            raise InputError(f"{flag} {value}: must be a number in (0, 1] or {' or '.join(words)}")
    elif value is not None and not 0 < value <= LARGEST_BLOCK_RATIO:
        raise InputError(f"{flag} {value:g}: the clip ratio must be in (0, 1]")


def _check_bits(flag: str, bits: int | None) -> None:
    if bits is not None and not 2 <= bits <= UNQUANTIZED_BITS:
        raise InputError(f"{flag} {bits}: bits must be between 2 and 16 (16 leaves the tensor unquantized)")


def _check_group(flag: str, size: int | None) -> None:
    if size is not None and size < 1:
        raise InputError(f"{flag} {size}: must be a positive number of channels")


@dataclass(frozen=True)
class BitSettings:
    """Bits and granularity by role. `query`, `key` and `value` are those of `activation` where they are None."""

    TITLE: ClassVar[str] = "method, quantization"

    weight: int = option(4, "bits of weights, 2 to 16; 16 leaves them alone", flag="wbits", tag="w", basic=True)
    activation: int = option(
        16, "bits of linears' inputs, and of q, k and v, 2 to 16", flag="abits", tag="a", basic=True
    )
    group_size: int | None = option(None, "weights per range (default: a whole output channel)", tag="g", basic=True)
    symmetric: bool = option(
        False, "symmetric weight quantization", flag=("symmetric", "weight_symmetric"), tag="symmetric"
    )
    query: int | None = option(None, "bits of queries (default: --abits)", flag="qbits", tag="q")
    key: int | None = option(None, "bits of keys (default: --abits)", flag="kbits", tag="k")
    value: int | None = option(None, "bits of values (default: --abits)", flag="vbits", tag="v")
    act_group_size: int | None = option(
        None, "channels of a linear's input per range (default: the whole token)", tag="ag"
    )
    act_symmetric: bool = option(False, "symmetric quantization of linears' inputs, q, k and v", tag="symmetric_act")
    symmetric_range: SymmetricRange = option(
        SymmetricRange.RESTRICTED,
        "codes of symmetric ranges: restricted, of 4 bits −7 … 7 in steps of peak/7; or full, −8 … 7 in steps of "
        "peak/7.5, as compressed-tensors and vLLM compute",
        tag="range_",
    )

    def __post_init__(self) -> None:
        for flag, bits in (("w", self.weight), ("a", self.activation), ("q", self.query)):
            _check_bits(f"--{flag}bits", bits)
        _check_bits("--kbits", self.key)
        _check_bits("--vbits", self.value)
        _check_group("--group_size", self.group_size)
        _check_group("--act_group_size", self.act_group_size)

    @property
    def full_range(self) -> bool:
        """Whether symmetric ranges use all codes."""
        return self.symmetric_range is SymmetricRange.FULL

    @property
    def attention(self) -> dict[str, int]:
        """Bits of q, k and v by role."""
        roles = {"query": self.query, "key": self.key, "value": self.value}
        return {role: self.activation if bits is None else bits for role, bits in roles.items()}

    @property
    def untouched(self) -> bool:
        """Whether nothing is quantized."""
        return min(self.weight, self.activation, *self.attention.values()) >= UNQUANTIZED_BITS


@dataclass(frozen=True)
class ClipSettings:
    """Clip ratios: `activation_ratio` for linear inputs, q and k, `weight_ratio` for weights; None: no clipping.

    `kv_ratio` is for k, in place of `activation_ratio`, and for v, which has none otherwise. SEARCH in place of a ratio
    means that calibration data decide: for every range of weights, for the inputs of every group, for q, k and v of
    every layer. BLOCK means that every block of an activation decides, when it is rounded.
    """

    TITLE: ClassVar[str] = "method, quantization"

    activation_ratio: Ratio = option(
        None,
        "clip ratio of linears' inputs, q and k, in (0, 1]; or search: found for each of them, and for v, on "
        "calibration data; or block: every block of a format, of v too, has the best of some (default: no clipping)",
        flag="lac",
        tag="lac",
        basic="clip ratio of linears' inputs, q and k, in (0, 1], or search",
        type=input_clip_ratio,
        metavar="RATIO|search|block",
    )
    weight_ratio: Ratio = option(
        None,
        "clip ratio of weights in (0, 1]; or search: both ends of every range on calibration data (default: no "
        "clipping)",
        flag="swc",
        tag="swc",
        basic="clip ratio of weights in (0, 1], or search",
        type=clip_ratio,
        metavar="RATIO|search",
    )
    kv_ratio: float | None = option(
        None, "clip ratio of k and v (default: --lac for k, no clipping for v)", flag="lac_kv", tag="lac_kv"
    )

    def __post_init__(self) -> None:
        _check_ratio("--lac", self.activation_ratio, (SEARCH, BLOCK))
        _check_ratio("--swc", self.weight_ratio, (SEARCH,))
        _check_ratio("--lac_kv", self.kv_ratio)


@dataclass(frozen=True)
class FormatSettings:
    """Number formats by role. Where `query`, `key` or `value` is None it is that of `activation`, if it has 4 bits."""

    TITLE: ClassVar[str] = "quantization"

    weight: Format = option(Format.INT, "number format of weights", flag="wformat", tag="w")
    activation: Format = option(
        Format.INT, "number format of linears' inputs, and of q, k and v if they have 4 bits", flag="aformat", tag="a"
    )
    query: Format | None = option(None, "number format of queries (default: --aformat)", flag="qformat", tag="q")
    key: Format | None = option(None, "number format of keys (default: --aformat)", flag="kformat", tag="k")
    value: Format | None = option(None, "number format of values (default: --aformat)", flag="vformat", tag="v")

    def of_head(self, role: str, bits: int) -> Format:
        """That of q, k or v of so many bits."""
        own = getattr(self, role)
        if own is None:
            return self.activation if bits == BLOCK_BITS else Format.INT
        return own


def check_format(flag: str, form: Format, bits: int, bits_flag: str, **fixed: object) -> None:
    """Raise InputError for a format of blocks with other bits, or with flags (by name) for what it fixes by itself."""
    if form is Format.INT:
        return
    if bits != BLOCK_BITS:
        raise InputError(f"--{flag} {form}: has {BLOCK_BITS} bits; give --{bits_flag} {BLOCK_BITS}, or drop the format")
    for name, value in fixed.items():
        if value:
            raise InputError(f"--{flag} {form}: has blocks and symmetric numbers of its own; drop --{name}")
