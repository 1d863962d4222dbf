"""lm-eval's tasks as an evaluation of a run."""

from collections.abc import Iterator
from dataclasses import asdict

from torch import nn

from evaluation.base import Candidate, Context, Evaluation, Finding
from evaluation.settings import EvaluationSettings
from evaluation.tasks.plan import check_tasks
from evaluation.tasks.scores import zero_shot_table
from evaluation.tasks.settings import TaskSettings
from evaluation.tasks.zeroshot import evaluate_tasks


class Tasks(Evaluation):
    """All tasks that were asked for; one that fails does not end the others."""

    def __init__(self, settings: TaskSettings, context: Context, common: EvaluationSettings):
        super().__init__(settings.STAGE, settings)
        self.plan = check_tasks(settings.tasks, settings.task_data_dir, settings.num_fewshot)
        self.context, self.limit, self.batch_size = context, common.limit, common.eval_batch_size
        self.log_samples = settings.log_samples

    def identity(self) -> dict[str, object]:
        """Tasks, examples and items, and which lm-eval asks them."""
        return {**self.plan.identity, "limit": self.limit}

    def run(self, model: nn.Module, candidate: Candidate) -> Iterator[Finding]:
        """Scores of all tasks, and what ended those that failed."""
        result = evaluate_tasks(
            *(model, self.context.tokenizer, self.plan),
            device=self.context.device,
            batch_size=self.batch_size,
            limit=self.limit,
            journal=candidate.journal,
            log_samples=candidate.folder / "samples" / candidate.row if self.log_samples else None,
        )
        failures = {f"task {task}": reason for task, reason in result.failed.items()}
        yield Finding({"zero_shot": asdict(result)}, zero_shot_table(result), failures)
