"""What a run is where its command line leaves it open: the paper's preset, and perplexity.

Flags that decide what the quantized layers are stay what they say: beside one of them nothing of a preset is taken.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from evaluation.settings import entries
from quantize.settings import QuantSettings
from utils.setting_flags import destination
from utils.settings import Changes, defaults, options

PRESET = "paper"
LEFT_OPEN = {"seed", "block_size"}  # by every preset


@dataclass(frozen=True)
class Taken:
    """A setting that a run took by itself: name, value, its flag as one would give it, and why."""

    name: str
    value: Any
    flag: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.flag} is taken"


def method_flags() -> set[str]:
    """Where argparse keeps the values of the flags that decide what a preset says of the quantized model."""
    idle = {each.name for each in options(QuantSettings) if each.changes < Changes.MODEL}
    return {destination(name) for name in set(defaults(QuantSettings)) - idle - LEFT_OPEN}


def usual_method(flags: Any, given: Collection[str]) -> list[Taken]:
    """The preset of a run that neither names one (`--preset none` does) nor has a flag of the method."""
    if "preset" in given or method_flags() & set(given):
        return []
    return [Taken("preset", PRESET, f"--preset {PRESET}", "no flag decides the method")]


def usual_evaluation(flags: Any, given: Collection[str]) -> list[Taken]:
    """Perplexity, where no evaluation is asked for and `--no_eval_ppl` does not say that none is wanted."""
    asked = any(getattr(flags, entry.FLAG.removeprefix("--")) for entry in entries())
    if asked or "eval_ppl" in given:
        return []
    return [Taken("eval_ppl", True, "--eval_ppl", "no evaluation is asked for, and none is ruled out by --no_eval_ppl")]


def usual_run(flags: Any, given: Collection[str]) -> list[Taken]:
    """Both, of main.py."""
    return [*usual_method(flags, given), *usual_evaluation(flags, given)]
