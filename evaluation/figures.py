"""What was measured of a model, by the heading of its column: the one place that reads results.json for tables."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from evaluation.base import Figure, Kind
from evaluation.settings import entries

QUANTIZE, EVALUATE = "quantize s", "evaluate s"


def figures_of(results: dict, compact: bool = False) -> dict[str, Figure]:
    """Heading → figure of all that `results` (`Measured.figures()`, or a file, perhaps an older one) holds.

    `compact`: of a task only the metric that it is published with, acc_norm where lm-eval has it and acc otherwise.
    """
    kinds = entries()
    figures = [figure for entry in kinds for figure in entry.figures(results) if figure.compact or not compact]
    seconds = results.get("seconds") or {}
    for heading, stages in ((QUANTIZE, ("quantize",)), (EVALUATE, [entry.STAGE for entry in kinds])):
        spent = [seconds[stage] for stage in stages if stage in seconds]
        if spent:
            figures.append(Figure(heading, sum(spent), Kind.SECONDS, decimals=1, lower_is_better=True))
    return {figure.heading: figure for figure in figures}


def headings(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """Every heading that one of `rows` has a value for: figures first, seconds last."""
    present = dict.fromkeys(heading for row in rows for heading in row)
    seconds = [heading for heading in (QUANTIZE, EVALUATE) if heading in present]
    return [heading for heading in present if heading not in seconds] + seconds


def show(figure: Figure | None) -> str:
    """A figure as the cell of its column."""
    return "–" if figure is None else f"{figure.value:.{figure.decimals}f}"


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and the sample standard deviation, which is there from two seeds on."""

    figure: Figure
    deviation: float | None = None

    @property
    def mean(self) -> float:
        """The mean alone."""
        return self.figure.value


@dataclass(frozen=True)
class TableRow:
    """One line of the table: the figures of a row over its seeds, by heading."""

    name: str
    title: str
    bits: str
    seeds: tuple[int, ...]
    values: dict[str, Spread]


def spread_of(figures: Sequence[Figure]) -> Spread:
    """Mean and sample standard deviation (n − 1) of one or more figures."""
    values = [figure.value for figure in figures]
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(figures[0])
    return Spread(
        replace(figures[0], value=mean),
        math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)),
    )
