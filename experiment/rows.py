"""The ways to quantize that are compared: compare.py's settings, its rows, and what every way is called."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

from evaluation.base import FULL
from evaluation.settings import EvaluationSettings
from experiment.options import CalibrationSettings, ModelSettings, StatisticsFiles, TrackSettings
from experiment.presets import PRESETS, VARIANTS, PresetSettings, preset_of, preset_quant
from quantize.bits import BLOCK, SEARCH, BitSettings
from quantize.refinements import ExtraSettings, HeadTransform, Rounding, RoundingSettings, TuningSettings
from quantize.rotation_settings import Transform
from quantize.settings import Probe, QuantSettings, SmoothMeasure, SmoothSettings, TrainingSettings, check_seed
from utils.errors import InputError
from utils.settings import Changes, option, part

RTN, SMOOTH = "rtn", "smooth"
FULL_TITLE = "full precision"
TRANSFORM_ROWS = (  # the shared settings with this transform
    *(Transform.HADAMARD, Transform.TWO_HADAMARD, Transform.ROTATION, Transform.PERMUTATION),
    *(Transform.ROTATION_PERMUTATION, Transform.PERMUTE_ROTATE, Transform.DUAL),
)
PLAIN_ROWS = (FULL, RTN, SMOOTH, *map(str, TRANSFORM_ROWS))
ROWS = (*PLAIN_ROWS, *PRESETS, *VARIANTS)  # the order of every table
GROUPS = {  # rows by one name
    "usual": (*(row for row in PLAIN_ROWS if row != Transform.PERMUTE_ROTATE), "best"),
    "ablation": (FULL, "paper", "best", *VARIANTS),
}

PARTS = {
    Transform.HADAMARD: "Hadamard rotation",
    Transform.TWO_HADAMARD: "two Hadamard rotations",
    Transform.ROTATION: "rotation",
    Transform.PERMUTATION: "permutation",
    Transform.ROTATION_PERMUTATION: "rotation + permutation",
    Transform.PERMUTE_ROTATE: "permutation upstream + rotation",
}


@dataclass(frozen=True)
class SharedQuantSettings(QuantSettings):
    """What the rows share: they smooth unless they are told not to, and `training` makes further rows."""

    smooth: SmoothSettings | None = part(
        SmoothSettings,
        switch="smooth",
        help="no smoothing before rotations and permutations",
        on=True,
        tag="smooth",
        basic=True,
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
        "which rows, by default usual:\n"
        f"  {', '.join(PLAIN_ROWS)}: full precision, round-to-nearest, smoothing alone, and the settings given with "
        "each transform\n"
        f"  {', '.join(PRESETS)}: that preset, whatever is given, but for bits, the block size and --search_rows\n"
        f"  {', '.join(VARIANTS)}: the preset best but for one part\n"
        "  usual: the first line but permute_rotate, and best\n"
        "  ablation: full, paper, best, and best but for each part",
        changes=Changes.NOTHING,
        basic="usual, ablation, or rows such as full, rtn, smooth, dual, best (default: usual)",
        choices=(*ROWS, *GROUPS),
        metavar="ROW",
    )
    seeds: tuple[int, ...] | None = option(
        None,
        "one or more, of the calibration samples drawn and of the random rotations; the table has mean ± sample "
        "standard deviation (default: --seed)",
        changes=Changes.NOTHING,
        basic="one or more: the table has mean ± deviation (default: --seed)",
    )
    output_dir: Path = option(
        Path("output"),
        "everything goes to a folder in here that is named after the settings",
        changes=Changes.NOTHING,
        basic=True,
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
        """The rows that are wanted, each once, without one of a group that cannot be.

        Raises InputError for one that was named and cannot be.
        """
        asked, smooths = self.comparison.rows or ("usual",), self.quant.smooth is not None
        if not smooths and SMOOTH in asked:
            raise InputError("--rows smooth is the row that only smooths: drop it or --no_smooth")
        names = dict.fromkeys(row for name in asked for row in GROUPS.get(name, (name,)))
        return tuple(row for row in names if smooths or row != SMOOTH)

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
        """What it is called in tables: by its preset, or by what is done."""
        if self.name in VARIANTS:
            return VARIANTS[self.name].title
        return f"preset {self.name}" if self.name in PRESETS else describe_method(self.quant)

    @property
    def full_title(self) -> str:
        """The same with the bit widths."""
        return self.title if self.quant.bits.untouched else f"{self.title} {self.bits}"

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

    `quant` has the quantizers and, if anything is to be smoothed, the smoothing. With `training` every quantized row
    that is not a preset is followed by the same one with learned weight clipping in place of `--swc`.
    """
    rows = []
    for name in (name for name in ROWS if name in names):
        config = row_config(name, quant)
        configs = {name: config}
        if training is not None and name in PLAIN_ROWS and name != FULL:
            configs[f"{name}_lwc"] = replace(config, training=training, clip=replace(config.clip, weight_ratio=None))
        for key, each in configs.items():
            if depends_on_seed(each):
                rows += [Row(key, replace(each, seed=seed), seed) for seed in seeds]
            else:
                rows.append(Row(key, replace(each, seed=seeds[0]), None))
    return tuple(rows)


def row_config(name: str, quant: QuantSettings) -> QuantSettings:
    """The settings of one row: a preset's, or those of `quant` but for what the row is about."""
    if name in VARIANTS:
        return preset_quant(PRESETS["best"] | VARIANTS[name].changes, quant)
    if name in PRESETS:
        return preset_quant(PRESETS[name], quant)
    if name == FULL:
        return QuantSettings(BitSettings(16, 16), transform=Transform.NONE, seed=quant.seed)
    if name == RTN:  # each weight and activation by itself: of all settings those of the quantizers
        plain = {"smooth": None, "rounding": RoundingSettings(), "extras": ExtraSettings(), "probe": Probe.MEAN}
        return replace(quant, transform=Transform.NONE, tuning=TuningSettings(), **plain)
    transform = Transform.NONE if name == SMOOTH else Transform(name)
    extras = quant.extras if transform.rotates else replace(quant.extras, head_transform=HeadTransform.HADAMARD)
    probe = Probe.MEAN if transform is Transform.NONE else quant.probe  # where nothing is searched
    return replace(quant, transform=transform, extras=extras, probe=probe)  # heads are balanced where they are rotated


def depends_on_seed(quant: QuantSettings) -> bool:
    """Whether calibration samples or random rotations enter: without any of these, rounding is all there is."""
    decided = quant.smooth or quant.needs_samples or quant.transform is not Transform.NONE
    return not quant.bits.untouched and bool(decided)


def method_name(quant: QuantSettings) -> str:
    """What these settings are called in a table: by the preset that goes beyond the paper, or by what is done."""
    preset = preset_of(quant)
    return f"preset {preset}" if preset and not quant.bits.untouched else describe_method(quant)


def describe_method(quant: QuantSettings) -> str:
    """What is done: smoothing and transform, what goes beyond the paper, and training."""
    if quant.bits.untouched:
        return FULL_TITLE
    beyond = refinements(quant)
    smoothing = "energy smoothing" if quant.smooth and quant.smooth.measure is SmoothMeasure.ENERGY else "smoothing"
    if quant.transform is Transform.DUAL:
        parts = ["DuQuant" if quant.smooth else "DuQuant without smoothing"]
        parts += [smoothing] if smoothing != "smoothing" else []
    elif quant.transform is Transform.NONE and not quant.smooth:
        parts = [] if "GPTQ" in beyond else ["round-to-nearest"]
    elif quant.transform is Transform.NONE:
        parts = [smoothing if beyond else f"{smoothing} only"]
    else:
        parts = [smoothing] if quant.smooth else []
        parts.append(PARTS[quant.transform])
    parts += [", ".join(beyond)] if beyond else []
    if quant.learns_transform:
        return f"{' + '.join(parts)}, trained"
    return " + ".join([*parts, *(["LWC"] if quant.training is not None else [])])


def refinements(quant: QuantSettings) -> list[str]:
    """Short names of what goes beyond the paper, smoothing aside."""
    extras, clip = quant.extras, quant.clip
    shifts = extras.channel_shift or extras.key_mean or extras.value_mean
    heads = extras.value_rotation or extras.head_transform is HeadTransform.BALANCED
    named = {
        "GPTQ": quant.rounding.rounding is Rounding.GPTQ,
        "searched clips": SEARCH in (clip.activation_ratio, clip.weight_ratio),
        "fitted blocks": clip.activation_ratio == BLOCK,
        "shifts": shifts,
        "heads": heads,
        "tuned": quant.tunes,
    }
    return [name for name, there in named.items() if there]


def full_title(quant: QuantSettings) -> str:
    """What these settings are called, with their bit widths: `DuQuant W4A4`."""
    return method_name(quant) if quant.bits.untouched else f"{method_name(quant)} {shown_bits(quant)}"


def shown_bits(quant: QuantSettings) -> str:
    """Bit widths for a table: `W4A4`, or a dash where nothing is quantized."""
    return "–" if quant.bits.untouched else quant.label.upper()
