"""MMLU as an evaluation of a run."""

from collections.abc import Iterator

from torch import nn

from evaluation.base import Candidate, Context, Evaluation, Finding
from evaluation.mmlu.answers import ENDINGS, evaluate_mmlu, mmlu_table, write_mmlu
from evaluation.mmlu.choices import encode_prompts
from evaluation.mmlu.data import digest, read_mmlu
from evaluation.mmlu.settings import MMLUSettings
from evaluation.settings import EvaluationSettings
from utils.distributed import is_main


class MMLUQuestions(Evaluation):
    """The questions of all subjects, with every number of examples before them."""

    def __init__(self, settings: MMLUSettings, context: Context, common: EvaluationSettings):
        super().__init__(settings.STAGE, settings)
        self.shots = tuple(dict.fromkeys(settings.mmlu_shots))
        self.subjects = read_mmlu(settings.mmlu_data_dir, max(self.shots))
        self.context, self.limit, self.batch_size = context, common.limit, common.eval_batch_size
        encode_prompts(context.tokenizer, ["Answer:"], ENDINGS)  # that its letters can be told apart

    def identity(self) -> dict[str, object]:
        """Questions and examples."""
        return {"questions": digest(self.subjects), "shots": self.shots, "limit": self.limit}

    def run(self, model: nn.Module, candidate: Candidate) -> Iterator[Finding]:
        """Accuracies at each number of shots; at the end all answers as files."""
        results = []
        for shots in self.shots:
            result = evaluate_mmlu(
                *(model, self.context.tokenizer, self.subjects, shots),
                device=self.context.device,
                context=self.context.longest,
                batch_size=self.batch_size,
                limit=self.limit,
                journal=candidate.journal,
            )
            results.append(result)
            yield Finding({"mmlu": {f"{shots}_shot": result.figures()}})
        if is_main():
            write_mmlu(results, candidate.folder / "mmlu" / candidate.row)
        yield Finding(text=mmlu_table(results))
