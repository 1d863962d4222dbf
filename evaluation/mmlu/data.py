"""MMLU's questions from their original CSV layout, and the prompts the original evaluation makes of them.

DIR/test/<subject>_test.csv     question, A, B, C, D, answer; no header
DIR/dev/<subject>_dev.csv       the same, the examples shown before a question
"""

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.mmlu.subjects import CATEGORY_OF
from utils.errors import InputError, Missing

LETTERS = ("A", "B", "C", "D")
COLUMNS = 6
TEST_SUFFIX = "_test.csv"


@dataclass(frozen=True)
class Question:
    """A question, its four choices, and the letter of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Subject:
    """The questions of a subject and the examples that may be shown before each."""

    name: str
    examples: tuple[Question, ...]
    questions: tuple[Question, ...]

    @property
    def category(self) -> str | None:
        """One of the four categories; None for a subject that is not of the 57."""
        return CATEGORY_OF.get(self.name)


def read_mmlu(folder: Path, shots: int = 5) -> tuple[Subject, ...]:
    """The subjects below `folder`, by name, each with its first `shots` examples at least.

    Raises InputError, naming file and line, if anything there cannot be used. dev/ is not read for 0 shots.
    """
    if not folder.is_dir():
        raise Missing(f"--mmlu_data_dir {folder}: no such folder")
    files = sorted((folder / "test").glob(f"*{TEST_SUFFIX}"))
    if not files:
        raise Missing(f"--mmlu_data_dir {folder}: there is no test/<subject>{TEST_SUFFIX} in it")
    return tuple(_read_subject(folder, path, shots) for path in files)


def prompt(subject: Subject, question: Question, shots: int) -> str:
    """The text whose next word is the answer: a header, `shots` answered examples, the question."""
    header = f"The following are multiple choice questions (with answers) about {subject.name.replace('_', ' ')}.\n\n"
    examples = (f"{_asked(example)} {example.answer}\n\n" for example in subject.examples[:shots])
    return "".join((header, *examples, _asked(question)))


def digest(subjects: Sequence[Subject]) -> str:
    """Hex digest of everything the subjects hold."""
    return hashlib.sha256(repr(tuple(subjects)).encode()).hexdigest()


def _asked(question: Question) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.text}{choices}\nAnswer:"


def _read_subject(folder: Path, path: Path, shots: int) -> Subject:
    name = path.name.removesuffix(TEST_SUFFIX)
    questions = _read_questions(path)
    if not questions:
        raise InputError(f"{path}: holds no question")
    if shots == 0:
        return Subject(name, (), questions)
    dev = folder / "dev" / f"{name}_dev.csv"
    if not dev.is_file():
        raise Missing(f"{dev}: no such file; {shots}-shot prompts take their examples from it")
    examples = _read_questions(dev)
    if len(examples) < shots:
        raise InputError(f"{dev}: {shots}-shot prompts need {shots} examples, it has {len(examples)}")
    return Subject(name, examples, questions)


def _read_questions(path: Path) -> tuple[Question, ...]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from None
    return tuple(_question(row, f"{path}:{line}") for line, row in _rows(text, path))


def _rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV with the number of the line each begins on; blank lines are no rows."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path}:{line}: not a row of a CSV file ({error})") from None
        if row:
            yield line, row


def _question(row: list[str], where: str) -> Question:
    if len(row) != COLUMNS:
        raise InputError(f"{where}: {len(row)} columns; question, A, B, C, D, answer are wanted")
    text, *choices, answer = row
    if answer.strip() not in LETTERS:
        raise InputError(f"{where}: the answer is {answer!r}; it must be A, B, C or D")
    return Question(text, tuple(choices), answer.strip())
