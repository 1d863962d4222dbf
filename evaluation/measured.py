"""What was measured of one model, as it is found."""

import copy
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

from evaluation.settings import entries


def nothing() -> dict:
    """The part of results.json that evaluations fill, where they found nothing."""
    return copy.deepcopy({key: value for entry in entries() for key, value in entry.EMPTY.items()})


@dataclass
class Measured:
    """What evaluations found, as results.json has it, wall seconds by stage, figures per layer.

    `failures`: by evaluation, what ended it.
    """

    results: dict = field(default_factory=nothing)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)

    def add(self, results: dict) -> None:
        """Add what an evaluation found; dicts of the same name become one."""
        _merge_(self.results, results)

    def add_layer(self, figures: dict) -> None:
        """Note what the next layer gave: a run that ends early has the figures of what it did."""
        self.layers.append(figures)

    @contextmanager
    def timing(self, stage: str):
        """Add the wall time of the block to `seconds[stage]`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def figures(self) -> dict:
        """What results.json says of it; `layers` stands apart there."""
        return {**self.results, "failures": self.failures, "seconds": dict(self.seconds)}


def _merge_(whole: dict, more: dict) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict):
            _merge_(whole[key], value)
        else:
            whole[key] = value
