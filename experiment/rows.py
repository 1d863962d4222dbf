"""The ways to quantize that are compared: compare.py's settings, its rows, and what every way is called."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

from evaluation.base import FULL
from evaluation.settings import EvaluationSettings
from experiment.options import CalibrationSettings, ModelSettings, StatisticsFiles, TrackSettings
from experiment.presets import ABLATION, BEST, PRESETS, PresetSettings
from quantize.refinements import HeadTransform, Rounding
from quantize.settings import BitSettings, QuantSettings, SmoothSettings, TrainingSettings, Transform, check_seed
from utils.errors import InputError
from utils.settings import Changes, from_flat, option, part

RTN, SMOOTH = "rtn", "smooth"
FULL_TITLE = "full precision"
PLAIN = (FULL, RTN, SMOOTH, *map(str, (Transform.HADAMARD, Transform.ROTATION, Transform.PERMUTATION)))
PLAIN += tuple(map(str, (Transform.ROTATION_PERMUTATION, Transform.DUAL)))
WHOLE = {**PRESETS, **{name: BEST | changes for name, changes in ABLATION.items()}}  # rows with settings of their own
GROUPS = {"ablation": (FULL, "paper", "best", *ABLATION)}  # rows by one name
ROWS = (*PLAIN, str(Transform.TWO_HADAMARD), *WHOLE)  # the order of every table

PARTS = {
    Transform.HADAMARD: "Hadamard rotation",
    Transform.TWO_HADAMARD: "two Hadamard rotations",
    Transform.ROTATION: "rotation",
    Transform.PERMUTATION: "permutation",
    Transform.ROTATION_PERMUTATION: "rotation + permutation",
}


@dataclass(frozen=True)
class SharedQuantSettings(QuantSettings):
    """What the rows share: they smooth unless they are told not to, and `training` makes further rows."""

    smooth: SmoothSettings | None = part(
        SmoothSettings, switch="smooth", help="no smoothing before rotations and permutations", on=True, tag="smooth"
    )

    def __post_init__(self) -> None:
        check_seed("--seed", self.seed)
        if self.bits.untouched:
            bits = f"--wbits {self.bits.weight} --abits {self.bits.activation}"
            raise InputError(f"{bits}: nothing is quantized, so every row is the same")

    @property
    def untrained(self) -> QuantSettings:
        """The same without training: a row's settings."""
        values = {field.name: getattr(self, field.name) for field in fields(QuantSettings)}
        return QuantSettings(**values | {"training": None})


@dataclass(frozen=True)
class ComparisonSettings:
    """Which rows, and where their table goes."""

    TITLE: ClassVar[str] = "comparison"

    rows: tuple[str, ...] | None = option(
        None,
        "which rows (default: from full to dual); full is the full-precision model; presets, and best with one part "
        "done otherwise, take bits and seeds from the other flags and nothing else; ablation: full, paper and all of "
        "the latter",
        changes=Changes.NOTHING,
        choices=(*ROWS, *GROUPS),
    )
    seeds: tuple[int, ...] | None = option(
        None,
        "one or more, of the calibration samples drawn and of the random rotations; the table has mean ± sample "
        "standard deviation (default: --seed)",
        changes=Changes.NOTHING,
    )
    output_dir: Path = option(
        Path("output"),
        "everything goes to a folder in here that is named after the settings",
        changes=Changes.NOTHING,
    )

    def __post_init__(self) -> None:
        for seed in self.seeds or ():
            check_seed("--seeds", seed)


@dataclass(frozen=True)
class CompareSettings:
    """Everything that compare.py is told when it compares ways to quantize a model."""

    model: ModelSettings = part(ModelSettings)
    comparison: ComparisonSettings = part(ComparisonSettings)
    track: TrackSettings = part(TrackSettings)
    calibration: CalibrationSettings = part(CalibrationSettings)
    preset: PresetSettings = part(PresetSettings)
    quant: SharedQuantSettings = part(SharedQuantSettings)
    statistics: StatisticsFiles = part(StatisticsFiles)
    evaluation: EvaluationSettings = part(EvaluationSettings)

    @property
    def row_names(self) -> tuple[str, ...]:
        """The rows that are wanted, by default all plain ones. Raises InputError for one that cannot be."""
        rows, smooths = self.comparison.rows, self.quant.smooth is not None
        if not smooths and SMOOTH in (rows or ()):
            raise InputError("--rows smooth is the row that only smooths: drop it or --no_smooth")
        if rows:
            return tuple(each for row in rows for each in GROUPS.get(row, (row,)))
        return tuple(row for row in PLAIN if smooths or row != SMOOTH)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, each once."""
        return tuple(dict.fromkeys(self.comparison.seeds or (self.quant.seed,)))


@dataclass(frozen=True)
class Row:
    """One model to measure. `seed` is None where none of its figures can depend on one."""

    name: str
    quant: QuantSettings
    seed: int | None

    @property
    def title(self) -> str:
        """What it is called in tables."""
        return self.name if self.name in WHOLE else method_name(self.quant)

    @property
    def full_title(self) -> str:
        """The same with the bit widths."""
        return f"{self.name} {self.bits}" if self.name in WHOLE else full_title(self.quant)

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
    followed by the same one with learned weight clipping in place of `--swc`, but for those that have settings of their
    own.
    """
    rows = []
    for name in (name for name in ROWS if name in names):
        config = row_config(name, quant)
        configs = {name: config}
        if training is not None and name != FULL and name not in WHOLE:
            configs[f"{name}_lwc"] = replace(config, training=training, clip=replace(config.clip, weight_ratio=None))
        for key, each in configs.items():
            if depends_on_seed(each):
                rows += [Row(key, replace(each, seed=seed), seed) for seed in seeds]
            else:
                rows.append(Row(key, replace(each, seed=seeds[0]), None))
    return tuple(rows)


def row_config(name: str, quant: QuantSettings) -> QuantSettings:
    """The settings of one row: those of `quant` but for what the row is about, or its own at the bits of `quant`."""
    if name in WHOLE:
        return replace(from_flat(QuantSettings, WHOLE[name]), bits=quant.bits)
    transform = Transform.NONE if name in (FULL, RTN, SMOOTH) else Transform(name)
    extras = quant.extras if transform.rotates else replace(quant.extras, head_transform=HeadTransform.HADAMARD)
    quant = replace(quant, transform=transform, extras=extras)  # heads are balanced where they are rotated
    if name == FULL:
        return replace(quant, bits=BitSettings(16, 16), smooth=None)
    return replace(quant, smooth=None) if name == RTN else quant


def depends_on_seed(quant: QuantSettings) -> bool:
    """Whether calibration samples or random rotations enter: without any of these, rounding is all there is."""
    decided = quant.smooth or quant.needs_samples or quant.transform is not Transform.NONE
    return not quant.bits.untouched and bool(decided)


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
    if quant.rounding.rounding is Rounding.GPTQ:
        name = f"{name} + GPTQ"
    if quant.learns_transform:
        return f"{name}, trained"
    return f"{name} + LWC" if quant.training is not None else name


def full_title(quant: QuantSettings) -> str:
    """What these settings are called, with their bit widths: `DuQuant W4A4`."""
    return method_name(quant) if quant.bits.untouched else f"{method_name(quant)} {shown_bits(quant)}"


def shown_bits(quant: QuantSettings) -> str:
    """Bit widths for a table: `W4A4`, or a dash where nothing is quantized."""
    return "–" if quant.bits.untouched else quant.label.upper()
