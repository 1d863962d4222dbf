"""MMLU: its flags, and its results in tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from evaluation.base import Context, Entry, Evaluation, Figure, Kind
from utils.errors import InputError
from utils.flags import refuse_idle
from utils.settings import Changes, option

if TYPE_CHECKING:
    from evaluation.settings import EvaluationSettings


@dataclass(frozen=True)
class MMLUSettings(Entry):
    """Where the questions are, and how many examples stand before each."""

    TITLE: ClassVar[str] = "evaluation, MMLU"
    FLAG: ClassVar[str] = "--eval_mmlu"
    STAGE: ClassVar[str] = "MMLU"
    EMPTY: ClassVar[dict[str, object]] = {"mmlu": {}}

    eval_mmlu: bool = option(False, "answer MMLU's questions", changes=Changes.FIGURES)
    mmlu_data_dir: Path | None = option(
        None, "folder with dev/<subject>_dev.csv and test/<subject>_test.csv", changes=Changes.FIGURES
    )
    mmlu_shots: tuple[int, ...] = option(
        (0, 5), "examples before each question (default: 0 5)", changes=Changes.FIGURES
    )

    def __post_init__(self):
        if self.eval_mmlu and self.mmlu_data_dir is None:
            raise InputError("--eval_mmlu: say where its files are, with --mmlu_data_dir DIR")
        if min(self.mmlu_shots) < 0:
            raise InputError(f"--mmlu_shots {min(self.mmlu_shots)}: must be at least 0")
        refuse_idle("eval_mmlu", self.eval_mmlu, mmlu_data_dir=self.mmlu_data_dir)

    @property
    def asked(self) -> bool:
        """Whether its questions are to be answered."""
        return self.eval_mmlu

    def open(self, context: Context, common: "EvaluationSettings") -> Sequence[Evaluation]:
        """All numbers of shots as one evaluation."""
        from evaluation.mmlu.evaluation import MMLUQuestions

        return [MMLUQuestions(self, context, common)]

    @classmethod
    def figures(cls, results: dict) -> Iterator[Figure]:
        """The accuracy at every number of shots."""
        for key, result in (results.get("mmlu") or {}).items():
            label = f"MMLU {key.replace('_', '-')}"
            yield Figure(label, result["accuracy"], Kind.ACCURACY, label, result.get("standard_error"))
