"""What a comparison leaves: the table for people and for programs, the picture's figures, results.json."""

import csv
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.base import Figure, Kind
from evaluation.figures import figures_of, headings, show
from experiment.outcome import completions_text
from experiment.rows import Row
from utils.io import write_json, write_text
from utils.log import RESULT
from utils.results import format_table, plain

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A row's figures, as a file has them, and what ended it early."""

    row: Row
    figures: dict
    error: str | None = None


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


def table_rows(finished: Sequence[Finished]) -> list[TableRow]:
    """The lines of the table. A row that failed for a seed has what was measured before."""
    groups: dict[str, list[Finished]] = {}
    for each in finished:
        groups.setdefault(each.row.name, []).append(each)
    rows = []
    for name, group in groups.items():
        row, found = group[0].row, [figures_of(each.figures, compact=True) for each in group]
        values = {each: spread_of([one[each] for one in found if each in one]) for each in headings(found)}
        seeds = tuple(each.row.seed for each in group if each.row.seed is not None)
        rows.append(TableRow(name, row.title, row.bits, seeds, values))
    return rows


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


def show_spread(spread: Spread | None) -> str:
    """A cell of the table: `6.281 ± 0.012`. Seconds go without."""
    if spread is None or spread.deviation is None or spread.figure.kind is Kind.SECONDS:
        return show(spread and spread.figure)
    return f"{show(spread.figure)} ± {show(replace(spread.figure, value=spread.deviation))}"


def markdown_table(rows: Sequence[TableRow]) -> str:
    """The table as Markdown."""
    columns = headings(row.values for row in rows)
    cells = [[row.title, row.bits, *(show_spread(row.values.get(each)) for each in columns)] for row in rows]
    return format_table(["", "bits", *columns], cells)


def notes(finished: Sequence[Finished]) -> list[str]:
    """What one must know to read the table."""
    seeds = list(dict.fromkeys(each.row.seed for each in finished if each.row.seed is not None))
    lines = []
    if len(seeds) > 1:
        lines.append(
            f"Mean ± sample standard deviation over the seeds {', '.join(map(str, seeds))}; rows without ± depend on "
            "none."
        )
    lines += [f"Failed: {each.row.title} ({each.row.key}): {each.error}" for each in finished if each.error]
    return [" ".join(line.split()) for line in lines]


def csv_table(rows: Sequence[TableRow]) -> str:
    """The table as CSV in full precision, with a column for every deviation."""
    columns = headings(row.values for row in rows)
    spreading = {heading for row in rows for heading, spread in row.values.items() if spread.deviation is not None}
    names = [name for each in columns for name in ([each, f"{each} std"] if each in spreading else [each])]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["row", "title", "bits", "seeds", *names], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {"row": row.name, "title": row.title, "bits": row.bits, "seeds": " ".join(map(str, row.seeds))}
        for heading, spread in row.values.items():
            cells[heading] = spread.mean
            if spread.deviation is not None:
                cells[f"{heading} std"] = spread.deviation
        writer.writerow(cells)
    return text.getvalue()


def write_outputs(folder: Path, finished: Sequence[Finished], facts: dict, prompts: Sequence[str]) -> None:
    """Write everything into `folder` and show the table."""
    from experiment.picture import draw

    rows = table_rows(finished)
    parts = [markdown_table(rows), *notes(finished)]
    if prompts:
        completions = [(f"{each.row.title} ({each.row.key})", each.figures["completions"]) for each in finished]
        parts.append(completions_text(prompts, completions))
    write_text(folder / "table.md", "\n\n".join(parts) + "\n")
    write_text(folder / "table.csv", csv_table(rows))
    draw(rows, f"{facts['settings']['net']}, {rows[-1].bits}", folder)
    write_json(folder / "results.json", plain(facts | {"rows": [row_facts(each) for each in finished]}))
    logger.log(RESULT, "\n%s\n", "\n\n".join(parts))
    logger.info("results: %s", folder)


def row_facts(each: Finished) -> dict:
    """One row of results.json."""
    row = each.row
    named = {"row": row.name, "title": row.title, "bits": row.bits, "seed": row.seed}
    return {**named, **each.figures, "error": each.error}
