"""MMLU: which of " A", " B", " C", " D" a model finds most probable after a question and a few answered examples."""

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from evaluation.journal import Journal
from evaluation.mmlu.choices import Prompt, cut_left, encode_prompts, ending_log_probabilities
from evaluation.mmlu.data import LETTERS, Subject, prompt
from evaluation.mmlu.subjects import CATEGORIES
from utils.distributed import is_main, share
from utils.io import write_atomically
from utils.log import progress
from utils.results import format_table

ENDINGS = tuple(f" {letter}" for letter in LETTERS)
AVERAGE = "average"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A question's letters, predicted and right, and the four letters' probabilities, which sum to one.

    Nothing is predicted ("", so it is wrong) where a model's probabilities are not numbers.
    """

    predicted: str
    right: str
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class SubjectScore:
    """What became of one subject: counts, and how many shots its prompts had (fewer where the context is short).

    `cut` counts the prompts with fewer shots than were asked for, `truncated` those of them whose question alone was
    too long and lost its beginning.
    """

    subject: str
    category: str | None
    questions: int
    correct: int
    accuracy: float
    average_shots: float
    cut: int
    truncated: int
    answers: tuple[Answer, ...] = field(repr=False)


@dataclass(frozen=True)
class MMLU:
    """Accuracies (0 to 1) at one number of shots: of questions overall and by category, and of every subject.

    `accuracy` weights subjects by their questions (as each category's does); `standard_error` is its, None for one
    question. `subject_mean` weights all subjects alike.
    """

    shots: int
    accuracy: float
    standard_error: float | None
    subject_mean: float
    categories: dict[str, float]
    questions: int
    average_shots: float
    cut: int
    truncated: int
    subjects: tuple[SubjectScore, ...]

    def figures(self) -> dict:
        """Everything but the single answers, as JSON has it."""
        return {**asdict(self), "subjects": [_without_answers(score) for score in self.subjects]}


def evaluate_mmlu(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    subjects: Sequence[Subject],
    shots: int,
    *,
    device: torch.device,
    context: int,
    batch_size: int | None = None,
    limit: int | None = None,
    journal: Journal | None = None,
) -> MMLU:
    """Answer the first `limit` (or all) questions of every subject with `shots` examples before each.

    `model` is on `device` and sees at most `context` tokens. Several processes share the subjects. A subject that is
    done is kept in `journal` under `mmlu:<shots>:<subject>`. Raises InputError if the tokenizer has no letters.
    """
    _log_unknown(subjects)

    def answer(subject: Subject) -> dict:
        return asdict(answer_subject(model, tokenizer, subject, shots, device, context, batch_size, limit))

    scores = {}
    if journal is not None:
        scores = {each.name: journal.get(_key(shots, each)) for each in subjects if _key(shots, each) in journal}
    todo = [subject for subject in subjects if subject.name not in scores]
    bar = progress(todo, f"MMLU {shots}-shot", unit="subject") if is_main() else todo
    for subject, score in zip(bar, share(todo, answer), strict=True):
        scores[subject.name] = score
        if journal is not None:
            journal.keep(_key(shots, subject), score)
    result = summarize(shots, [_score_from(scores[subject.name]) for subject in subjects])
    _log_result(result)
    return result


def answer_subject(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    subject: Subject,
    shots: int,
    device: torch.device,
    context: int,
    batch_size: int | None = None,
    limit: int | None = None,
) -> SubjectScore:
    """Answer one subject's questions (see `evaluate_mmlu`)."""
    right = [question.answer for question in subject.questions[:limit]]
    groups = fitting_prompts(tokenizer, subject, len(right), shots, context)
    log_probabilities = torch.empty(len(right), len(LETTERS))
    for group in groups:
        prompts = list(group.prompts.values())
        log_probabilities[list(group.prompts)] = ending_log_probabilities(model, prompts, device, batch_size)
    answers = _answers(log_probabilities, right)
    correct = sum(answer.predicted == answer.right for answer in answers)
    return SubjectScore(
        subject=subject.name,
        category=subject.category,
        questions=len(answers),
        correct=correct,
        accuracy=correct / len(answers),
        average_shots=sum(group.shots * len(group.prompts) for group in groups) / len(answers),
        cut=sum(len(group.prompts) for group in groups if group.shots < shots or group.truncated),
        truncated=sum(len(group.prompts) for group in groups if group.truncated),
        answers=answers,
    )


class PromptGroup(NamedTuple):
    """Prompts, by number of question, that begin alike: with as many shots, or none and a question cut to fit."""

    shots: int
    truncated: bool
    prompts: dict[int, Prompt]


def fitting_prompts(
    tokenizer: PreTrainedTokenizerBase, subject: Subject, questions: int, shots: int, context: int
) -> list[PromptGroup]:
    """The prompts of the first `questions` questions, none longer than `context`.

    One that is too long loses its last example, again until it fits. If none is left, it loses its beginning.
    """
    groups = []
    waiting = list(range(questions))
    for count in range(shots, -1, -1):
        texts = [prompt(subject, subject.questions[number], count) for number in waiting]
        encoded = dict(zip(waiting, encode_prompts(tokenizer, texts, ENDINGS), strict=True))
        waiting = [number for number in waiting if len(encoded[number]) > context]
        groups.append(PromptGroup(count, False, {n: each for n, each in encoded.items() if len(each) <= context}))
    groups.append(PromptGroup(0, True, {number: cut_left(encoded[number], context, tokenizer) for number in waiting}))
    return [group for group in groups if group.prompts]


def summarize(shots: int, scores: Sequence[SubjectScore]) -> MMLU:
    """The averages over subjects."""
    questions = sum(score.questions for score in scores)
    accuracy = _weighted(scores)
    categories = {name: [score for score in scores if score.category == name] for name in CATEGORIES}
    return MMLU(
        shots=shots,
        accuracy=accuracy,
        standard_error=(accuracy * (1 - accuracy) / (questions - 1)) ** 0.5 if questions > 1 else None,
        subject_mean=sum(score.accuracy for score in scores) / len(scores),
        categories={name: _weighted(members) for name, members in categories.items() if members},
        questions=questions,
        average_shots=sum(score.average_shots * score.questions for score in scores) / questions,
        cut=sum(score.cut for score in scores),
        truncated=sum(score.truncated for score in scores),
        subjects=tuple(scores),
    )


def mmlu_table(results: Sequence[MMLU]) -> str:
    """A Markdown table of per cent: categories and their average, a column for each number of shots."""
    header = ["MMLU", *(f"{result.shots}-shot" for result in results)]
    names = [name for name in CATEGORIES if name in results[0].categories]
    rows = [[name, *(f"{100 * result.categories[name]:.1f}" for result in results)] for name in names]
    return format_table(header, [*rows, [AVERAGE, *(f"{100 * result.accuracy:.1f}" for result in results)]])


def write_mmlu(results: Sequence[MMLU], folder: Path) -> None:
    """Write `mmlu.csv` and, for each result, every answer as `mmlu_answers_<shots>shot.csv` into `folder`.

    `mmlu.csv` has a line per subject, then the averages: subject `average`, category a category's name or `all`.
    """
    header = ["subject", "category", "questions", *(f"accuracy_{result.shots}shot" for result in results)]
    rows = [
        [scores[0].subject, scores[0].category or "", scores[0].questions, *(score.accuracy for score in scores)]
        for scores in zip(*(result.subjects for result in results), strict=True)
    ]
    for name, per_result in _averages(results).items():
        members = [score for score in results[0].subjects if name in ("all", score.category)]
        rows.append([AVERAGE, name, sum(score.questions for score in members), *per_result])
    _write_csv(folder / "mmlu.csv", header, rows)
    for result in results:
        header = ["subject", "index", "predicted", "right", *(f"p({letter})" for letter in LETTERS)]
        rows = [
            [score.subject, index, answer.predicted, answer.right, *answer.probabilities]
            for score in result.subjects
            for index, answer in enumerate(score.answers)
        ]
        _write_csv(folder / f"mmlu_answers_{result.shots}shot.csv", header, rows)


def _averages(results: Sequence[MMLU]) -> dict[str, list[float]]:
    categories = {name: [result.categories[name] for result in results] for name in results[0].categories}
    return {**categories, "all": [result.accuracy for result in results]}


def _answers(log_probabilities: Tensor, right: Sequence[str]) -> tuple[Answer, ...]:
    answers = []
    for letter, row in zip(right, log_probabilities.softmax(dim=-1), strict=True):
        predicted = LETTERS[row.argmax()] if row.isfinite().all() else ""
        answers.append(Answer(predicted, letter, tuple(row.tolist())))
    return tuple(answers)


def _weighted(scores: Sequence[SubjectScore]) -> float:
    return sum(score.correct for score in scores) / sum(score.questions for score in scores)


def _without_answers(score: SubjectScore) -> dict:
    return {name: value for name, value in asdict(score).items() if name != "answers"}


def _score_from(kept: dict) -> SubjectScore:
    """A score out of its `asdict`, which JSON may have been through."""
    answers = (Answer(**{**each, "probabilities": tuple(each["probabilities"])}) for each in kept["answers"])
    return SubjectScore(**{**kept, "answers": tuple(answers)})


def _key(shots: int, subject: Subject) -> str:
    return f"mmlu:{shots}:{subject.name}"


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))


def _log_unknown(subjects: Sequence[Subject]) -> None:
    unknown = [subject.name for subject in subjects if subject.category is None]
    if unknown:
        logger.info("MMLU: not of the 57 subjects, so only in the average: %s", ", ".join(unknown))


def _log_result(result: MMLU) -> None:
    logger.info("MMLU %d-shot: %.1f%% of %d questions", result.shots, 100 * result.accuracy, result.questions)
    lost = sum(not answer.predicted for score in result.subjects for answer in score.answers)
    if lost:
        logger.warning(
            "MMLU %d-shot: no answer to %d questions: their probabilities are not finite", result.shots, lost
        )
    if result.cut:
        logger.info(
            "MMLU %d-shot: %d prompts did not fit into the context; on average %.2f shots were used, and %d questions "
            "lost their beginning",
            *(result.shots, result.cut, result.average_shots, result.truncated),
        )
