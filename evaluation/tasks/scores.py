"""Scores of lm-eval's tasks: one task's, their mean, and the table that people read."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.results import format_table


@dataclass(frozen=True)
class TaskScore:
    """What was measured on one task or group. `group` is that whose member this task is, if it was asked for as such.

    `metrics` are fractions, "acc_stderr" beside "acc"; of a filter other than the default one "metric,filter". `cut` is
    how many requests lost their beginning because they were longer than the model's context (of the whole group).
    """

    task: str
    metrics: dict[str, float]
    items: int
    version: str | None
    num_fewshot: int | None
    seconds: float
    cut: int = 0
    group: str | None = None


@dataclass(frozen=True)
class Mean:
    """Mean over `tasks` of acc, and of acc_norm where a task has it (else acc)."""

    tasks: tuple[str, ...]
    acc: float
    acc_norm: float


@dataclass(frozen=True)
class ZeroShot:
    """Scores in the order the tasks were given, and by task what made it fail.

    `average` is over the six tasks the paper reports, and there only if all six are.
    """

    scores: tuple[TaskScore, ...]
    failed: dict[str, str]
    average: Mean | None
    limit: int | None
    seeds: dict[str, int]


def mean_of(scores: Sequence[TaskScore], tasks: Sequence[str]) -> Mean | None:
    """The mean over `tasks`; None if one of them has no accuracy."""
    by_task = {score.task: score.metrics for score in scores if score.group is None and "acc" in score.metrics}
    if not tasks or any(task not in by_task for task in tasks):
        return None
    metrics = [by_task[task] for task in tasks]
    norm = [values.get("acc_norm", values["acc"]) for values in metrics]
    return Mean(tuple(tasks), sum(values["acc"] for values in metrics) / len(metrics), sum(norm) / len(norm))


def zero_shot_table(result: ZeroShot) -> str:
    """A Markdown table: a row per task (a group's members below it), then the mean, then what failed."""
    plain_metrics = {name + suffix for name in ("acc", "acc_norm") for suffix in ("", "_stderr")}
    rows = []
    for score in result.scores:
        others = [name for name in score.metrics if name not in plain_metrics and "_stderr" not in name]
        cells = [_cell(score.metrics.get(name)) for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")]
        extra = ", ".join(f"{name} {score.metrics[name]:.4f}" for name in others)
        rows.append([f"– {score.task}" if score.group else score.task, *cells, str(score.items), extra])
    label, mean = "mean of the six", result.average
    if mean is None:
        tasks = [score.task for score in result.scores if score.group is None and "acc" in score.metrics]
        label, mean = f"mean of {', '.join(tasks)}", mean_of(result.scores, tasks) if len(tasks) > 1 else None
    if mean is not None:
        rows.append([label, _cell(mean.acc), "", _cell(mean.acc_norm), "", "", ""])
    rows += [[task, *["failed"], "", "", "", "", ""] for task in result.failed]
    header = ["task", "acc", "±", "acc_norm", "±", "items", "other"]
    width = len(header) if any(row[-1] for row in rows) else len(header) - 1
    return format_table(header[:width], [row[:width] for row in rows])


def summary(score: TaskScore, context: int) -> str:
    """One line for the log; `context` is how many tokens the model can read."""
    values = ", ".join(
        f"{name} {value:.4f}" + (f" ± {score.metrics[error]:.4f}" if (error := _stderr(name)) in score.metrics else "")
        for name, value in score.metrics.items()
        if "_stderr" not in name
    )
    text = f"{score.task}: {values} ({score.items} items, {score.seconds:.0f} s)"
    return text + (f"; {score.cut} requests were cut to the context of {context} tokens" if score.cut else "")


def _stderr(metric: str) -> str:
    """The key of a metric's standard error: "acc" → "acc_stderr", "em,strict" → "em_stderr,strict"."""
    name, comma, kind = metric.partition(",")
    return f"{name}_stderr{comma}{kind}"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
