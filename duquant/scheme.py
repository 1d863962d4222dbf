"""What is rounded to what: a scheme for every role a tensor has in a decoder layer."""

from dataclasses import asdict, dataclass, fields

from duquant.formats import BLOCK_FORMATS, FORMATS, INTEGERS, Format, IntegerFormat

SEARCHED = "search"  # the clip that is not one number: every range has its own, searched when the model was made
BY_BLOCK = "block"  # or of blocks: the one among the format's that rounds each of them best, found when it is rounded
UNQUANTIZED_BITS = 16  # this many bits or more: the tensor is left as it is


@dataclass(frozen=True)
class TensorScheme:
    """How one kind of tensor is quantized.

    `format`: one of `duquant.formats.FORMATS`. `bits`: 16 leaves the tensor alone. `group_size`: channels that share a
    range; None: all of a vector's; formats of blocks have 4 bits, their own block and no zero point. `clip`: factor on
    both ends of the range; None: none; SEARCHED: factors of their own, which are kept beside the codes; BY_BLOCK: of a
    format of blocks, see `BlockFormat.fitted`. `full_range`: of symmetric integers, see `IntegerFormat`.

    Raises ValueError for what cannot be.
    """

    format: str = "int"
    bits: int = 4
    symmetric: bool = False
    group_size: int | None = None
    clip: float | str | None = None
    full_range: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is not known; known are {', '.join(FORMATS)}")
        for name, kinds in (
            ("bits", int),
            ("symmetric", bool),
            ("group_size", int | None),
            ("clip", float | int | None),
            ("full_range", bool),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds) and not (name == "clip" and value in (SEARCHED, BY_BLOCK)):
                raise ValueError(f"{name} is {value!r}")
        if not 2 <= self.bits <= UNQUANTIZED_BITS:
            raise ValueError(f"{self.bits} bits: must be between 2 and {UNQUANTIZED_BITS}")
        form = BLOCK_FORMATS.get(self.format)
        if form is not None and (self.bits, self.group_size, self.symmetric) != (form.bits, form.block, form.symmetric):
            raise ValueError(f"{self.format} has {form.bits} bits, blocks of {form.block} and no zero point")
        if form is None and self.quantized and self.clip == BY_BLOCK:
            raise ValueError(f"{self.format} has no blocks whose clip could be chosen")

    @property
    def quantized(self) -> bool:
        """Whether anything is rounded."""
        return self.bits < UNQUANTIZED_BITS

    @property
    def kind_of_range(self) -> str:
        """How ranges lie about zero, in words."""
        if not self.symmetric:
            return "asymmetric"
        return "symmetric, all codes" if self.full_range else "symmetric"


def make_scheme(
    form: str,
    bits: int,
    symmetric: bool,
    group_size: int | None,
    clip: float | str | None = None,
    full_range: bool = False,
) -> TensorScheme:
    """The scheme of a tensor: a format of blocks says by itself what `symmetric` and `group_size` say of integers."""
    blocks = BLOCK_FORMATS.get(form)
    if blocks is not None:
        return TensorScheme(str(form), bits, blocks.symmetric, blocks.block, clip)
    return TensorScheme(str(form), bits, symmetric, group_size, clip, symmetric and full_range)


def number_format(scheme: TensorScheme) -> Format:
    """The format of a tensor's codes."""
    if scheme.format == INTEGERS:
        return IntegerFormat(scheme.bits, scheme.symmetric, scheme.full_range)
    return BLOCK_FORMATS[scheme.format]()


@dataclass(frozen=True)
class Scheme:
    """The schemes by role: weights, inputs of linears, and q, k (both after RoPE) and v in attention.

    `rotate_heads`: q and k are multiplied by a Hadamard matrix of the head before they are rounded.
    """

    weight: TensorScheme = TensorScheme()
    input: TensorScheme = TensorScheme()
    query: TensorScheme = TensorScheme()
    key: TensorScheme = TensorScheme()
    value: TensorScheme = TensorScheme()
    rotate_heads: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool if field.name == "rotate_heads" else TensorScheme):
                raise ValueError(f"{field.name} is {value!r}")

    @property
    def turns_heads(self) -> bool:
        """Whether q and k are multiplied by anything: where neither is rounded it would change nothing."""
        return self.rotate_heads and (self.query.quantized or self.key.quantized)

    @property
    def roles(self) -> dict[str, TensorScheme]:
        """Role → its scheme."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: scheme for name, scheme in values.items() if isinstance(scheme, TensorScheme)}

    def to_dict(self) -> dict:
        """Plain values, as JSON has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Scheme":
        """The inverse of `to_dict`. Raises TypeError or ValueError for what `to_dict` does not write."""
        return cls(**{name: TensorScheme(**each) if isinstance(each, dict) else each for name, each in values.items()})
