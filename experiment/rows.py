"""The ways to quantize that are compared, as changes of one setting: what each does before it rounds, and its name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantize.settings import BitSettings, QuantSettings, TrainingSettings, Transform

FULL, RTN, SMOOTH = "full", "rtn", "smooth"
FULL_TITLE = "full precision"
ROWS = (FULL, RTN, SMOOTH, *map(str, (Transform.HADAMARD, Transform.ROTATION, Transform.PERMUTATION)))
ROWS += tuple(map(str, (Transform.ROTATION_PERMUTATION, Transform.DUAL)))  # the order of every table

PARTS = {
    Transform.HADAMARD: "Hadamard rotation",
    Transform.ROTATION: "rotation",
    Transform.PERMUTATION: "permutation",
    Transform.ROTATION_PERMUTATION: "rotation + permutation",
}


@dataclass(frozen=True)
class Row:
    """One model to measure. `seed` is None where none of its figures can depend on one."""

    name: str
    quant: QuantSettings
    seed: int | None

    @property
    def title(self) -> str:
        """What it is called in tables."""
        return method_name(self.quant)

    @property
    def full_title(self) -> str:
        """The same with the bit widths."""
        return full_title(self.quant)

    @property
    def key(self) -> str:
        """What it is called in files: `dual_seed2`."""
        return self.name if self.seed is None else f"{self.name}_seed{self.seed}"

    @property
    def bits(self) -> str:
        """Its bit widths in tables."""
        return shown_bits(self.quant)


def plan_rows(
    names: Sequence[str], quant: QuantSettings, training: TrainingSettings | None, seeds: Sequence[int]
) -> tuple[Row, ...]:
    """The rows called `names`, in the order of the table, each with every seed that matters to it.

    `quant` has the quantizers and, if anything is to be smoothed, the smoothing. With `training` every quantized row is
    followed by the same one with learned weight clipping in place of `--swc`.
    """
    rows = []
    for name in (name for name in ROWS if name in names):
        config = row_config(name, quant)
        configs = {name: config}
        if training is not None and name != FULL:
            configs[f"{name}_lwc"] = replace(config, training=training, clip=replace(config.clip, weight_ratio=None))
        for key, each in configs.items():
            if depends_on_seed(each):
                rows += [Row(key, replace(each, seed=seed), seed) for seed in seeds]
            else:
                rows.append(Row(key, replace(each, seed=seeds[0]), None))
    return tuple(rows)


def row_config(name: str, quant: QuantSettings) -> QuantSettings:
    """The settings of one row: those of `quant` but for what the row is about."""
    if name == FULL:
        return replace(quant, bits=BitSettings(16, 16), transform=Transform.NONE, smooth=None)
    if name == RTN:
        return replace(quant, transform=Transform.NONE, smooth=None)
    return replace(quant, transform=Transform.NONE if name == SMOOTH else Transform(name))


def depends_on_seed(quant: QuantSettings) -> bool:
    """Whether calibration samples or random rotations enter: without any of these, rounding is all there is."""
    return not quant.bits.untouched and bool(quant.smooth or quant.training or quant.transform is not Transform.NONE)


def method_name(quant: QuantSettings) -> str:
    """What these settings are called in a table."""
    if quant.bits.untouched:
        return FULL_TITLE
    if quant.transform is Transform.NONE:
        name = "smoothing only" if quant.smooth else "round-to-nearest"
    elif quant.transform is Transform.DUAL:
        name = "DuQuant" if quant.smooth else "DuQuant without smoothing"
    else:
        name = f"smoothing + {PARTS[quant.transform]}" if quant.smooth else PARTS[quant.transform]
    return f"{name} + LWC" if quant.training is not None else name


def full_title(quant: QuantSettings) -> str:
    """What these settings are called, with their bit widths: `DuQuant W4A4`."""
    return method_name(quant) if quant.bits.untouched else f"{method_name(quant)} {shown_bits(quant)}"


def shown_bits(quant: QuantSettings) -> str:
    """Bit widths for a table: `W4A4`, or a dash where nothing is quantized."""
    return "–" if quant.bits.untouched else quant.label.upper()
