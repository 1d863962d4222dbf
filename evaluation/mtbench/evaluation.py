"""MT-Bench as an evaluation of a run: answers, and grades if there is a judge."""

import re
from collections.abc import Iterator
from dataclasses import asdict

from torch import nn

from evaluation.base import QUANTIZED, Candidate, Context, Evaluation, Finding, digest
from evaluation.mtbench.answers import (
    HUB_QUESTIONS,
    HUB_REFERENCES,
    AnswerFile,
    AnswerSettings,
    answer_questions,
    fetch_from_hub,
    read_questions,
    read_references,
)
from evaluation.mtbench.conversation import pick_format
from evaluation.mtbench.endpoint import open_endpoint
from evaluation.mtbench.judge import judge_answers, score_table, summarize
from evaluation.mtbench.settings import MTBenchSettings
from evaluation.settings import EvaluationSettings
from utils.distributed import is_main


class MTBench(Evaluation):
    """The questions, how they are put and answered, and who grades the answers (None: nobody)."""

    def __init__(self, settings: MTBenchSettings, context: Context, common: EvaluationSettings):
        super().__init__(settings.STAGE, settings)
        self.context, self.batch_size = context, common.eval_batch_size
        self.endpoint = None
        if settings.judge.judge_base_url is not None:
            judge = settings.judge
            self.endpoint = open_endpoint(judge.judge_base_url, judge.judge_model, judge.judge_api_key_env)
            if is_main():
                self.endpoint.check()
        questions = settings.mtbench_questions or fetch_from_hub(HUB_QUESTIONS, "--mtbench_questions")
        references = settings.mtbench_references
        if references is None and self.endpoint is not None and settings.mtbench_questions is None:
            references = fetch_from_hub(HUB_REFERENCES, "--mtbench_references")
        self.questions = read_questions(questions)[: common.limit]
        self.references = read_references(references) if references is not None else {}
        self.form = pick_format(context.tokenizer, context.model, settings.chat_format)
        length, temperature = common.text.max_new_tokens or 1024, settings.mtbench_temperature
        self.settings = AnswerSettings(context.longest, length, temperature, context.seed)

    def identity(self) -> dict[str, object]:
        """Questions, how they are put and answered, and the judge with its references."""
        references = digest(sorted((str(question), texts) for question, texts in self.references.items()))
        return {
            "questions": digest([asdict(question) for question in self.questions]),
            "format": self.form.name,
            "settings": asdict(self.settings),
            "judge": self.endpoint and {"model": self.endpoint.model, "references": references},
        }

    def check(self, candidate: Candidate) -> None:
        """The answers that are there already must be this candidate's."""
        self._answers(candidate).read(self.questions, self.form, self.settings)

    def for_comparison(self, shown: bool) -> bool:
        """Nobody compares conversations."""
        return False

    def run(self, model: nn.Module, candidate: Candidate) -> Iterator[Finding]:
        """Where the answers are, and then the grades."""
        file, context = self._answers(candidate), self.context
        answers = answer_questions(
            *(model, context.tokenizer, self.questions, self.form, self.settings, file, context.device),
            batch_size=self.batch_size,
        )
        answered = {"format": self.form.name, "answers": str(file.path), "questions": len(answers)}
        yield Finding({"mt_bench": answered})
        if self.endpoint is None:
            return
        judge = re.sub(r"[^\w.-]", "_", self.endpoint.model)
        path = candidate.folder / "mt_bench/model_judgment" / f"{judge}_{file.path.name}"
        judgements = judge_answers(self.endpoint, self.questions, answers, self.references, path)
        if is_main():
            scores = summarize(judgements, self.questions)
            graded = {"judge": self.endpoint.model, "judgements": str(path), "scores": scores}
            yield Finding({"mt_bench": graded}, score_table(scores))

    def _answers(self, candidate: Candidate) -> AnswerFile:
        """Where the candidate's answers are, named as FastChat's own tools expect."""
        own = candidate.row == QUANTIZED
        model_id = candidate.model_id if own else f"{candidate.model_id}_{candidate.row}"
        path = candidate.folder / "mt_bench/model_answer" / f"{model_id}.jsonl"
        return AnswerFile(path, model_id, [candidate.identity, candidate.row])
