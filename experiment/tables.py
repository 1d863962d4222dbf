"""Tables: of a comparison's rows, for people and for programs, and of finished runs side by side."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.base import Kind
from evaluation.figures import Spread, TableRow, figures_of, headings, show, spread_of
from experiment.options import RunSettings
from experiment.results import completions_text
from experiment.rows import Row
from utils.errors import InputError
from utils.results import flatten, format_table
from utils.settings import Changes, defaults, options

COMPARED = ("settings", "versions", "device", "dtype", "processes", "data")
# what a run from before there was a setting did, where that is not what the default does now
BEFORE = {"settings.add_bos": False}


@dataclass(frozen=True)
class Finished:
    """A row's figures, as a file has them, and what ended it early."""

    row: Row
    figures: dict
    error: str | None = None


def table_rows(finished: Sequence[Finished]) -> list[TableRow]:
    """The lines of the table. A row that failed for a seed has what was measured before."""
    groups: dict[str, list[Finished]] = {}
    for each in finished:
        groups.setdefault(each.row.name, []).append(each)
    rows = []
    for name, group in groups.items():
        row, by_seed = group[0].row, [figures_of(each.figures, compact=True) for each in group]
        values = {each: spread_of([one[each] for one in by_seed if each in one]) for each in headings(by_seed)}
        seeds = tuple(each.row.seed for each in group if each.row.seed is not None)
        rows.append(TableRow(name, row.title, row.bits, seeds, values))
    return rows


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
    checks = [check for each in finished for check in each.figures.get("bos_check", {}).values()]
    lines += [f"Warning: {check['warning']}." for check in checks if check["warning"]]
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


def comparison_text(finished: Sequence[Finished], prompts: Sequence[str]) -> str:
    """Table, notes and completions, as Markdown."""
    parts = [markdown_table(table_rows(finished)), *notes(finished)]
    if prompts:
        completions = [(f"{each.row.title} ({each.row.key})", each.figures["completions"]) for each in finished]
        parts.append(completions_text(prompts, completions))
    return "\n\n".join(parts)


def row_facts(each: Finished) -> dict:
    """One row of results.json."""
    row = each.row
    named = {"row": row.name, "title": row.title, "bits": row.bits, "seed": row.seed}
    return {**named, **each.figures, "error": each.error}


def side_by_side(folders: Sequence[Path]) -> str:
    """The runs in `folders` as Markdown: a column per run. Raises InputError for a folder that holds no run."""
    if len(folders) < 2:
        raise InputError(f"{folders[0]}: give two or more runs to put side by side")
    runs = {str(folder): read_run(folder) for folder in folders}
    if len(runs) < len(folders):
        raise InputError("the same folder is named twice; give different runs")
    return "\n\n".join([legend(runs), figures_table(runs), differences_table(runs)]) + "\n"


def read_run(folder: Path) -> dict:
    """The results.json of a run of main.py, as `read_results`. Raises InputError for a comparison too."""
    results = read_results(folder)
    if "rows" in results:
        raise InputError(f"{folder}: is a comparison with a table of its own; name runs of main.py")
    return results


def read_results(folder: Path) -> dict:
    """The results.json of a run or a comparison; one that has none yet is `{"error": …}`.

    Raises InputError for a folder that holds neither, and for an unfinished comparison.
    """
    path = folder / "results.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a run's folder, such as output/<net>_w4a4")
    if not path.exists():
        if (folder / "rows").is_dir():
            raise InputError(f"{folder}: is an unfinished comparison, not a run; start it again to finish it")
        if not (folder / "log.txt").exists():
            raise InputError(f"{folder}: no run there (neither results.json nor log.txt)")
        return {"error": "no results.json: it was killed, or still goes on"}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(results, dict) or "settings" not in results:
        raise InputError(f"{path}: is not what main.py or compare.py writes")
    return results


def legend(runs: dict[str, dict]) -> str:
    """The runs by number, and which of them are half-finished."""
    lines = []
    for number, (folder, results) in enumerate(runs.items(), start=1):
        error = results.get("error")
        unfinished = f" (unfinished: {' '.join(error.split())})" if error else ""
        lines.append(f"{number}. {folder}{unfinished}")
    return "\n".join(lines)


def figures_table(runs: dict[str, dict]) -> str:
    """A line per figure, a column per run."""
    columns = [figures_of(results) for results in runs.values()]
    marks = [" (unfinished)" if results.get("error") else "" for results in runs.values()]
    header = ["", *(f"run {number}{mark}" for number, mark in enumerate(marks, start=1))]
    rows = [[heading, *(show(column.get(heading)) for column in columns)] for heading in headings(columns)]
    return format_table(header, rows) if rows else "No figures."


def without_effect() -> set[str]:
    """The names of settings that change no figure."""
    return {each.name for each in options(RunSettings) if each.changes is Changes.NOTHING} | {"quiet"}


def differences_table(runs: dict[str, dict]) -> str:
    """A line per setting, version, device and data that is not the same in all runs that say so."""
    found = [flatten({key: results[key] for key in COMPARED if key in results}) for results in runs.values()]
    # a run from before there was a setting did what the default does now, if nothing else is said
    usual = {f"settings.{name}": value for name, value in defaults(RunSettings).items()} | BEFORE
    said = [usual | facts if facts else facts for facts in found]
    known, where = [facts for facts in said if facts], without_effect()
    keys = [key for key in dict.fromkeys(key for facts in known for key in facts) if key.split(".")[-1] not in where]
    different = [key for key in keys if any(facts.get(key) != known[0].get(key) for facts in known)]
    if not different:
        return "No setting differs." if len(known) == len(runs) else "No setting differs among the runs that have any."
    rows = [[setting_name(key), *(cell(facts, key) for facts in said)] for key in different]
    return "What differs:\n\n" + format_table(["", *(f"run {number + 1}" for number in range(len(runs)))], rows)


def setting_name(key: str) -> str:
    """`settings.lac` as the flag it was."""
    head, _, name = key.partition(".")
    return f"--{name}" if head == "settings" else key.replace(".", " ")


def cell(facts: dict, key: str) -> str:
    """One value, on one line."""
    if key not in facts:
        return "?"
    value = facts[key]
    shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(shown.split()).replace("|", "\\|") or "–"
