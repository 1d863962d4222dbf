"""Figures by the heading of their column, from what results.json says of a model."""

import math
from collections.abc import Iterable, Sequence

SECONDS = ("quantize s", "evaluate s")
EVALUATIONS = ("perplexity", "zero-shot", "MMLU", "MT-Bench", "prompts")  # stages that count as evaluating


def figure_values(figures: dict, metrics: Sequence[str] | None = ("acc",)) -> dict[str, float]:
    """Heading → value of everything in `figures` (`Measured.figures()`, or those read from a file).

    A task has one for each of `metrics` (None: for all). What was not finite is NaN.
    """
    values: dict[str, float] = {}
    for label, found in (figures.get("perplexity_details") or {}).items():
        values[f"{label} ppl"] = math.nan if found["perplexity"] is None else found["perplexity"]
        if found.get("divergence") is not None:
            values[f"{label} KL"] = found["divergence"]
    values |= _task_values(figures.get("zero_shot") or {}, metrics)
    for result in (figures.get("mmlu") or {}).values():
        values[f"MMLU {result['shots']}-shot"] = result["accuracy"]
    score = ((figures.get("mt_bench") or {}).get("scores") or {}).get("average")
    if score is not None:
        values["MT-Bench"] = score
    seconds = figures.get("seconds") or {}
    for heading, stages in zip(SECONDS, (("quantize",), EVALUATIONS), strict=True):
        spent = [seconds[stage] for stage in stages if stage in seconds]
        if spent:
            values[heading] = sum(spent)
    return values


def _task_values(zero_shot: dict, metrics: Sequence[str] | None) -> dict[str, float]:
    values = {}
    asked = [score for score in zero_shot.get("scores", ()) if score["group"] is None]
    for score in asked:
        chosen = metrics or [name for name in score["metrics"] if "_stderr" not in name]
        values |= {f"{score['task']} {name}": score["metrics"][name] for name in chosen if name in score["metrics"]}
    if zero_shot.get("average") is not None:
        values["mean of six acc_norm"] = zero_shot["average"]["acc_norm"]
    return values


def headings(rows: Iterable[dict[str, float]]) -> list[str]:
    """Every heading that one of `rows` has a value for: figures first, seconds last."""
    found = list(dict.fromkeys(heading for row in rows for heading in row))
    return [heading for heading in found if heading not in SECONDS] + [each for each in SECONDS if each in found]


def show(heading: str, value: float | None) -> str:
    """`value` as the cell of that column."""
    if value is None:
        return "–"
    return f"{value:.{1 if heading in SECONDS else 2 if heading == 'MT-Bench' else 3}f}"


def flatten(value: dict, prefix: str = "") -> dict[str, object]:
    """A dict of dicts as one, its keys joined by dots."""
    flat: dict[str, object] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat |= flatten(item, f"{name}.") if isinstance(item, dict) and item else {name: item}
    return flat
