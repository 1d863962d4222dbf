"""Presets: settings that go together, by one name. Every flag that is given beside `--preset` wins over what it says.

Names are those of flags, switches included (`True` and `False`), values are those of JSON. A preset says nothing of
where a run finds and leaves things, or of what it measures; nor of the block size, whose default makes way for another
where a model's widths ask for it, as one that is named does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from quantize.settings import QuantSettings
from utils.setting_flags import from_flat
from utils.settings import Changes, option

W4A4 = {"wbits": 4, "abits": 4}
SEARCH = {"max_rotation_step": 256, "permutation_times": 1}

PAPER = {**W4A4, "smooth": True, "alpha": 0.6, "lac": 0.9, "swc": 0.8, **SEARCH}
PAPER_LWC = {**W4A4, "smooth": True, "alpha": 0.5, "lac": 0.9, "lwc": True, "epochs": 20, **SEARCH}
ENERGY = {"smooth": True, "alpha": 0.5, "smooth_measure": "energy"}
BY_SAMPLES = {"lac": "search", "swc": "search", "rounding": "gptq", "gptq_target": 0.5}
EXACT = {"channel_shift": True, "key_mean": True, "value_rotation": True, "head_transform": "balanced"}
BEST = {**W4A4, **ENERGY, "transform": "two_hadamard", **BY_SAMPLES, **EXACT}
TRAINING = {"train": "transform", "epochs": 8, "scale_lr": 0.02, "clip_lr": 0.05}  # what `best_trained` has beside BEST

PRESETS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "paper_lwc": PAPER_LWC,
    "best": BEST,
    "best_trained": {**BEST, **TRAINING},
}
ABOUT = {  # a line each, for --help
    "paper": "W4A4 as in the paper",
    "paper_lwc": "W4A4 as in the paper, clipping trained",
    "best": "W4A4, the best known without training",
    "best_trained": "W4A4, the best known with training",
}
BEYOND_PAPER = ("best", "best_trained")  # the presets whose method has no name of its own


@dataclass(frozen=True)
class Variant:
    """The preset `best` but for one part: what that buys. `title` is what tables call it."""

    title: str
    changes: Mapping[str, Any]


VARIANTS = {  # where a part is left out that has a value, it has the paper's
    "best_hadamard": Variant("best, one Hadamard rotation", {"transform": "hadamard"}),
    "best_dual": Variant("best, rotations of DuQuant", {"transform": "dual"}),
    "best_without_gptq": Variant("best without GPTQ", {"rounding": "nearest"}),
    "best_without_target": Variant("best without full-precision target", {"gptq_target": 0.0}),
    "best_without_swc": Variant(f"best, weights clipped to {PAPER['swc']}", {"swc": PAPER["swc"]}),
    "best_without_lac": Variant(f"best, activations clipped to {PAPER['lac']}", {"lac": PAPER["lac"]}),
    "best_without_energy": Variant("best, peaks smoothed", {"smooth_measure": "peak", "alpha": PAPER["alpha"]}),
    "best_without_shift": Variant("best without channel shift", {"channel_shift": False}),
    "best_without_key_mean": Variant("best without key mean", {"key_mean": False}),
    "best_without_value_rotation": Variant("best without value rotation", {"value_rotation": False}),
    "best_without_balanced": Variant("best without balanced heads", {"head_transform": "hadamard"}),
    "best_with_value_mean": Variant("best with value mean", {"value_mean": True}),
}


def preset_quant(values: Mapping[str, Any], shared: QuantSettings) -> QuantSettings:
    """The method that a preset's `values` say, at the bits, formats, seed, block size and searched rows of `shared`."""
    quant, given = from_flat(QuantSettings, values), shared.rotation
    rotation = replace(quant.rotation, block_size=given.block_size, rows=given.rows)
    return replace(quant, bits=shared.bits, formats=shared.formats, seed=shared.seed, rotation=rotation)


def preset_of(quant: QuantSettings) -> str | None:
    """Which of BEYOND_PAPER these settings are, at whatever bits, seed, block size and searched rows; else None."""
    return next((name for name in BEYOND_PAPER if preset_quant(PRESETS[name], quant) == quant), None)


@dataclass(frozen=True)
class PresetSettings:
    """By which name the settings were given. It changes nothing: they are what they are, however they were given."""

    TITLE: ClassVar[str] = "method, preset"

    preset: str | None = option(
        None,
        "settings by one name; flags beside it win, in whatever order:\n"
        + "".join(f"  {name}: {about}\n" for name, about in ABOUT.items())
        + "--no_<flag>, or <flag> none, takes out what it has",
        changes=Changes.NOTHING,
        basic=f"{', '.join(PRESETS)}; flags beside it win",
        choices=list(PRESETS),
    )
