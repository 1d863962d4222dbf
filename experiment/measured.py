"""The figures of one way to run the model."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from evaluation.mmlu import MMLU
from evaluation.perplexity import Perplexity
from evaluation.task_scores import ZeroShot


@dataclass
class Measured:
    """Perplexity by dataset label, scores, completions of the prompts, wall seconds by stage, figures per layer.

    `failures`: by evaluation, what ended it. `watch`: told the number and the figures of every layer when it is done.
    """

    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    zero_shot: ZeroShot | None = None
    mmlu: tuple[MMLU, ...] = ()
    mt_bench: dict | None = None
    completions: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)
    watch: Callable[[int, dict], None] | None = None

    def add_layer(self, index: int, figures: dict) -> None:
        """Note what layer `index`, the next one, gave: a run that ends early has the figures of what it did."""
        self.layers.append(figures)
        if self.watch is not None:
            self.watch(index, figures)

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
        return {
            "perplexity": {label: result.perplexity for label, result in self.perplexity.items()},
            "perplexity_details": {label: asdict(result) for label, result in self.perplexity.items()},
            "zero_shot": self.zero_shot and asdict(self.zero_shot),
            "mmlu": {f"{result.shots}_shot": result.figures() for result in self.mmlu},
            "mt_bench": self.mt_bench,
            "completions": self.completions,
            "failures": self.failures,
            "seconds": dict(self.seconds),
        }
