"""Finished runs of main.py beside each other: their figures, and every setting in which they differ."""

import json
from collections.abc import Sequence
from pathlib import Path

from evaluation.figures import figures_of, headings, show
from utils.errors import InputError
from utils.results import flatten, format_table

WHERE = ("output_dir", "cache_dir", "save_dir", "resume", "save_model", "net", "eval_batch_size")
WHERE += ("quiet", "track")  # none of them changes a figure
COMPARED = ("settings", "versions", "device", "dtype", "processes", "data")


def side_by_side(folders: Sequence[Path]) -> str:
    """The runs in `folders` as Markdown: a column per run. Raises InputError for a folder that holds no run."""
    if len(folders) < 2:
        raise InputError(f"{folders[0]}: give two or more runs to put side by side")
    runs = {str(folder): read_run(folder) for folder in folders}
    if len(runs) < len(folders):
        raise InputError("the same folder is named twice; give different runs")
    return "\n\n".join([legend(runs), figures_table(runs), differences_table(runs)]) + "\n"


def read_run(folder: Path) -> dict:
    """The results.json of a run; one that has none yet is `{"error": …}`.

    Raises InputError for a folder that was not left by main.py.
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
        raise InputError(f"{path}: is not what main.py writes")
    if "rows" in results:
        raise InputError(f"{folder}: is a comparison with a table of its own; name runs of main.py")
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


def differences_table(runs: dict[str, dict]) -> str:
    """A line per setting, version, device and data that is not the same in all runs that say so."""
    said = [flatten({key: results[key] for key in COMPARED if key in results}) for results in runs.values()]
    known = [facts for facts in said if facts]
    keys = [key for key in dict.fromkeys(key for facts in known for key in facts) if key.split(".")[-1] not in WHERE]
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
