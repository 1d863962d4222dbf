"""MT-Bench: its flags, its judge's, and its results in tables."""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from evaluation.base import Context, Entry, Evaluation, Figure
from utils.flags import refuse_idle
from utils.settings import Changes, option, part

if TYPE_CHECKING:
    from evaluation.settings import EvaluationSettings

TEMPLATE = "template"
CHAT_FORMATS = (TEMPLATE, "vicuna", "llama-2", "mistral", "plain")
# The benchmark's, by category; a category it does not have is sampled like prose.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7


class Temperature(enum.StrEnum):
    """How the next token is chosen: the likeliest, or drawn at the benchmark's temperature of the category."""

    GREEDY = "greedy"
    CATEGORY = "category"

    def of(self, category: str) -> float:
        """The temperature for a category; 0 is greedy."""
        return 0.0 if self is Temperature.GREEDY else TEMPERATURES.get(category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class JudgeSettings:
    """Who grades the answers. Where the judge is and its key change no grade."""

    judge_base_url: str | None = option(
        None, "OpenAI-compatible endpoint that grades, like https://host/v1", changes=Changes.NOTHING
    )
    # a judge may come later, or another one: the answers, which take hours, must be in the same folder then, where the
    # grades of every judge have a file of their own
    judge_model: str | None = option(None, "the model to ask there", changes=Changes.GRADES)
    judge_api_key_env: str | None = option(
        None, "environment variable with the key (default: none is sent)", changes=Changes.NOTHING
    )

    def __post_init__(self):
        given = {"judge_model": self.judge_model, "judge_api_key_env": self.judge_api_key_env}
        refuse_idle("judge_base_url", self.judge_base_url, **given)


@dataclass(frozen=True)
class MTBenchSettings(Entry):
    """Which questions, how they are put, and how they are answered."""

    FLAG: ClassVar[str] = "--eval_mtbench"
    STAGE: ClassVar[str] = "MT-Bench"
    EMPTY: ClassVar[dict[str, object]] = {"mt_bench": None}

    eval_mtbench: bool = option(False, "answer MT-Bench's questions", changes=Changes.FIGURES)
    mtbench_questions: Path | None = option(
        None, "a file like question.jsonl (default: the hub's)", changes=Changes.FIGURES
    )
    mtbench_references: Path | None = option(
        None, "reference answers for the judge (default: the hub's for its questions)", changes=Changes.GRADES
    )
    mtbench_temperature: Temperature = option(
        Temperature.GREEDY,
        "the likeliest token, or drawn at the benchmark's temperature of the category",
        changes=Changes.FIGURES,
    )
    chat_format: str | None = option(
        None,
        "how turns are written (default: the tokenizer's chat template, else by the model's name)",
        changes=Changes.FIGURES,
        choices=CHAT_FORMATS,
    )
    judge: JudgeSettings = part(JudgeSettings)

    def __post_init__(self):
        given = {"mtbench_questions": self.mtbench_questions, "mtbench_references": self.mtbench_references}
        given |= {"chat_format": self.chat_format, "judge_base_url": self.judge.judge_base_url}
        refuse_idle("eval_mtbench", self.eval_mtbench, **given)

    @property
    def asked(self) -> bool:
        """Whether its questions are to be answered."""
        return self.eval_mtbench

    def open(self, context: Context, common: "EvaluationSettings") -> Sequence[Evaluation]:
        """Answers and, if there is a judge, grades."""
        from evaluation.mtbench.evaluation import MTBench

        return [MTBench(self, context, common)]

    @classmethod
    def figures(cls, results: dict) -> Iterator[Figure]:
        """The mean grade."""
        score = ((results.get("mt_bench") or {}).get("scores") or {}).get("average")
        if score is not None:
            yield Figure("MT-Bench", score, decimals=2)
