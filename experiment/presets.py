"""Presets: settings that go together, by one name. Every flag that is given beside `--preset` wins over what it says.

Names are those of flags, switches included (`True` and `False`), values are those of JSON. A preset says nothing of
where a run finds and leaves things, or of what it measures; nor of the block size, whose default makes way for another
where a model's widths ask for it, as one that is named does not.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from utils.settings import Changes, option

W4A4 = {"wbits": 4, "abits": 4}
SEARCH = {"max_rotation_step": 256, "permutation_times": 1}

PAPER = {**W4A4, "smooth": True, "alpha": 0.6, "lac": 0.9, "swc": 0.8, **SEARCH}
PAPER_LWC = {**W4A4, "smooth": True, "alpha": 0.5, "lac": 0.9, "lwc": True, "epochs": 20, **SEARCH}

BEST = {
    **W4A4,
    "smooth": True,
    "alpha": 0.5,
    "smooth_measure": "energy",
    "lac": "search",
    "swc": "search",
    "rounding": "gptq",
    "gptq_target": 0.5,
    "channel_shift": True,
    "key_mean": True,
    "value_rotation": True,
    "head_transform": "balanced",
    "transform": "two_hadamard",
}
BEST_TRAINED = {**BEST, "train": "transform", "epochs": 4}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "paper_lwc": PAPER_LWC,
    "best": BEST,
    "best_trained": BEST_TRAINED,
}
ABLATION: dict[str, dict[str, Any]] = {  # `best` with one thing done otherwise: what each part buys
    "best_without_gptq": {"rounding": "nearest", "gptq_target": 0.0},
    "best_without_target": {"gptq_target": 0.0},
    "best_without_swc": {"swc": 0.9},
    "best_without_lac": {"lac": 0.9},
    "best_without_shift": {"channel_shift": False},
    "best_without_key_mean": {"key_mean": False},
    "best_without_value_rotation": {"value_rotation": False},
    "best_without_balance": {"head_transform": "hadamard"},
    "best_without_energy": {"smooth_measure": "peak", "alpha": 0.6},
    "best_with_value_mean": {"value_mean": True},
    "best_hadamard": {"transform": "hadamard"},
    "best_dual": {"transform": "dual"},
}
ABOUT = {  # a line each, for --help
    "paper": "W4A4 as in the paper",
    "paper_lwc": "W4A4 as in the paper, clipping trained",
    "best": "W4A4, the best known without training",
    "best_trained": "W4A4, the best known with training",
}


@dataclass(frozen=True)
class PresetSettings:
    """By which name the settings were given. It changes nothing: they are what they are, however they were given."""

    TITLE: ClassVar[str] = "preset"

    preset: str | None = option(
        None,
        "settings by one name; flags beside it win, in whatever order:\n"
        + "".join(f"  {name}: {about}\n" for name, about in ABOUT.items())
        + "--no_<flag>, or <flag> none, takes out what it has",
        changes=Changes.NOTHING,
        choices=list(PRESETS),
    )
