"""One evaluation after the other, of every model of a run."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from evaluation.endpoint import JudgeError
from evaluation.generation import complete
from evaluation.journal import Journal
from evaluation.judge import judge_answers, score_table, summarize
from evaluation.mmlu import evaluate_mmlu, mmlu_table, write_mmlu
from evaluation.mtbench import AnswerFile, answer_questions
from evaluation.perplexity import Perplexity, final_hidden, score
from evaluation.task_scores import zero_shot_table
from experiment.evaluations import FULL, QUANTIZED, Evaluations
from experiment.measured import Measured
from experiment.session import Setup
from utils.batching import BatchSize
from utils.data import data_fingerprint
from utils.distributed import is_main, world_size
from utils.errors import InputError
from utils.placement import placed

logger = logging.getLogger(__name__)


@dataclass
class Evaluator:
    """Measures the models of one run; what they answered goes into `folder`.

    `teachers`: what the full-precision model, measured first, gave before its head, by dataset label. `travelled`: what
    the last layer gave, by row and label, for windows that went through the layers in another way before `measure`.
    """

    plan: Evaluations
    setup: Setup
    journal: Journal
    folder: Path
    model_id: str
    teachers: dict[str, Tensor] = field(default_factory=dict)
    travelled: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def require_own_answers(self, rows: Iterable[str]) -> None:
        """Raise InputError if there are answers to MT-Bench's questions that are not of these models."""
        asked = self.plan.conversations
        for row in rows if asked is not None else ():
            self.answer_file(row).read(asked.questions, asked.form, asked.settings)

    def for_comparison(self) -> "Evaluator":
        """The same, for what the full-precision model must be measured for anyway."""
        return replace(self, plan=self.plan.for_comparison())

    def measure(self, model: nn.Module, measured: Measured, row: str, title: str) -> None:
        """Run every evaluation on `model`; figures go into `measured`, and so does what ended one of them early."""
        for label in self.plan.windows:
            with self._attempt(measured, f"perplexity {label}", "perplexity"):
                measured.perplexity[label] = self._perplexity(model, row, label)
                logger.info("%s, %s: %s", title, label, measured.perplexity[label])
        asked: dict[str, tuple[object, Callable]] = {
            "zero-shot": (self.plan.tasks, self._zero_shot),
            "MMLU": (self.plan.subjects, self._mmlu),
            "MT-Bench": (self.plan.conversations, self._mt_bench),
            "prompts": (self.plan.prompts, self._complete),
        }
        if any(wanted for wanted, _ in asked.values()):
            with self._attempt(measured, "placing the model", "placing"), self._placed(model):
                for name, evaluate in ((name, evaluate) for name, (wanted, evaluate) in asked.items() if wanted):
                    with self._attempt(measured, name, name):
                        evaluate(model, measured, row, title)

    def travellers(self, row: str) -> dict[str, Tensor]:
        """Windows of tokens, by label, that have to go through the layers for the perplexities of `row`."""
        windows = self.plan.windows
        return {label: windows[label] for label in windows if self._key(row, label) not in self.journal} | {
            label: windows[label] for label in windows if self._is_teacher(row, label)
        }

    def batch_size(self, tokens: Tensor) -> BatchSize:
        """How many of the windows [N, T] go through a layer at once."""
        return BatchSize.choose(self.plan.batch_size, tokens.shape[1], self.setup.device)

    def _key(self, row: str, label: str) -> str:
        return f"{row}/perplexity/{label}/{data_fingerprint(self.plan.windows[label])}"

    def _is_teacher(self, row: str, label: str) -> bool:
        """Whether what `row` gives is still needed to compare the run's own model with."""
        return self.plan.divergence and row == FULL and self._key(QUANTIZED, label) not in self.journal

    def _perplexity(self, model: nn.Module, row: str, label: str) -> Perplexity:
        tokens, setup, key = self.plan.windows[label], self.setup, self._key(row, label)
        if key in self.journal and not self._is_teacher(row, label):
            return Perplexity(**self.journal.get(key))
        hidden = self.travelled.pop((row, label), None)
        if hidden is None:
            batch_size = self.batch_size(tokens)
            hidden = final_hidden(model, setup.spec, tokens, setup.device, f"{label} perplexity", batch_size)
        result = score(model, setup.spec, tokens, hidden, setup.device, self.teachers.get(label))
        if self._is_teacher(row, label):
            self.teachers[label] = hidden
        self.journal.keep(key, asdict(result))
        return result

    def _zero_shot(self, model: nn.Module, measured: Measured, row: str, title: str) -> None:
        from evaluation.zeroshot import evaluate_tasks

        plan, setup = self.plan, self.setup
        result = measured.zero_shot = evaluate_tasks(
            *(model, setup.tokenizer, plan.tasks),
            device=setup.device,
            batch_size=plan.batch_size,
            limit=plan.limit,
            journal=self.journal.under(row),
            log_samples=self.folder / "samples" / row if plan.log_samples else None,
        )
        measured.failures |= {f"task {task}": reason for task, reason in result.failed.items()}
        logger.info("%s\n%s", title, zero_shot_table(result))

    def _mmlu(self, model: nn.Module, measured: Measured, row: str, title: str) -> None:
        plan, setup = self.plan, self.setup
        for shots in plan.shots:
            result = evaluate_mmlu(
                *(model, setup.tokenizer, plan.subjects, shots),
                device=setup.device,
                context=plan.context,
                batch_size=plan.batch_size,
                limit=plan.limit,
                journal=self.journal.under(row),
            )
            measured.mmlu = (*measured.mmlu, result)
        if is_main():
            write_mmlu(measured.mmlu, self.folder / "mmlu" / row)
        logger.info("%s\n%s", title, mmlu_table(measured.mmlu))

    def _mt_bench(self, model: nn.Module, measured: Measured, row: str, title: str) -> None:
        asked, setup, file = self.plan.conversations, self.setup, self.answer_file(row)
        answers = answer_questions(
            model, setup.tokenizer, asked.questions, asked.form, asked.settings, file, setup.device
        )
        measured.mt_bench = {"format": asked.form.name, "answers": str(file.path), "questions": len(answers)}
        if asked.endpoint is None:
            return
        judge = re.sub(r"[^\w.-]", "_", asked.endpoint.model)
        path = self.folder / "mt_bench/model_judgment" / f"{judge}_{file.path.name}"
        judgements = judge_answers(asked.endpoint, asked.questions, answers, asked.references, path)
        if is_main():
            scores = summarize(judgements, asked.questions)
            measured.mt_bench |= {"judge": asked.endpoint.model, "judgements": str(path), "scores": scores}
            logger.info("%s\n%s", title, score_table(scores))

    def answer_file(self, row: str) -> AnswerFile:
        """Where the answers to MT-Bench's questions are, named as FastChat's own tools expect."""
        model_id = self.model_id if row == QUANTIZED else f"{self.model_id}_{row}"
        path = self.folder / "mt_bench/model_answer" / f"{model_id}.jsonl"
        return AnswerFile(path, model_id, [self.plan.identity["model"], row])

    def _complete(self, model: nn.Module, measured: Measured, row: str, title: str) -> None:
        setup, length = self.setup, self.plan.max_new_tokens
        for prompt in self.plan.prompts:
            measured.completions[prompt] = complete(model, setup.tokenizer, prompt, setup.device, length)

    def _placed(self, model: nn.Module):
        return placed(model, self.setup.device, self.plan.spread, self.plan.memory)

    @contextmanager
    def _attempt(self, measured: Measured, name: str, stage: str) -> Iterator[None]:
        """An evaluation that fails is recorded and does not end the others; with several processes it ends all."""
        try:
            with measured.timing(stage):
                yield
        except Exception as error:
            if world_size() > 1:
                raise
            if isinstance(error, (InputError, JudgeError)):
                logger.error("%s: %s", name, error)
            else:
                logger.exception("%s failed", name)
            measured.failures[name] = f"{type(error).__name__}: {error}"
