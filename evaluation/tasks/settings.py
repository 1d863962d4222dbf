"""lm-eval's tasks: their flags, and their results in tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from evaluation.base import Context, Entry, Evaluation, Figure, Kind
from utils.flags import NAME_LIST, refuse_idle
from utils.settings import Changes, option

if TYPE_CHECKING:
    from evaluation.settings import EvaluationSettings

ACCURACIES = ("acc_norm", "acc", "exact_match")  # a task is published with the first of these that it has


@dataclass(frozen=True)
class TaskSettings(Entry):
    """Which tasks, with how many examples, and where their items are."""

    TITLE: ClassVar[str] = "evaluation, lm-eval tasks"
    FLAG: ClassVar[str] = "--tasks"
    STAGE: ClassVar[str] = "zero-shot"
    EMPTY: ClassVar[dict[str, object]] = {"zero_shot": None}

    tasks: tuple[str, ...] = option(
        (),
        "lm-eval tasks, groups or tags: arc_easy,arc_challenge,hellaswag,winogrande,boolq,piqa are the paper's; "
        "stories_qa is about the bundled model's stories",
        changes=Changes.FIGURES,
        basic="lm-eval tasks, groups or tags, such as arc_easy,hellaswag,piqa",
        **NAME_LIST,
    )
    num_fewshot: int | None = option(
        None, "examples in the prompt (default: what the task says, mostly 0)", changes=Changes.FIGURES
    )
    task_data_dir: Path | None = option(
        None,
        "read DIR/<task>/<split>.jsonl, with the hub's field names, instead of the hub's datasets",
        changes=Changes.FIGURES,
    )
    log_samples: bool = option(
        False, "keep every item's prompt, answers and score in samples/", changes=Changes.NOTHING
    )

    def __post_init__(self):
        given = {"num_fewshot": self.num_fewshot, "task_data_dir": self.task_data_dir, "log_samples": self.log_samples}
        refuse_idle("tasks", self.tasks, **given)

    @property
    def asked(self) -> bool:
        """Whether there are tasks."""
        return bool(self.tasks)

    def open(self, context: Context, common: "EvaluationSettings") -> Sequence[Evaluation]:
        """All tasks as one evaluation."""
        from evaluation.tasks.evaluation import Tasks

        return [Tasks(self, context, common)]

    @classmethod
    def figures(cls, results: dict) -> Iterator[Figure]:
        """Every metric of every task that was asked for by name, and the mean of the paper's six."""
        zero_shot = results.get("zero_shot") or {}
        for score in zero_shot.get("scores") or ():
            if score.get("group") is None:
                yield from task_figures(score["task"], score["metrics"])
        if zero_shot.get("average") is not None:
            yield Figure("mean of six acc_norm", zero_shot["average"]["acc_norm"])


def task_figures(task: str, metrics: dict[str, float]) -> Iterator[Figure]:
    """The figures of one task; compact is the one that it is published with."""
    names = [name for name in metrics if "_stderr" not in name]
    published = next((name for name in (*ACCURACIES, *names) if name in metrics), None)
    for name in names:
        kind = Kind.ACCURACY if name in ACCURACIES else Kind.OTHER
        error = metrics.get(f"{name}_stderr")
        yield Figure(f"{task} {name}", metrics[name], kind, task, error, compact=name == published)
