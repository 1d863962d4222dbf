"""MT-Bench: the answers of a model to questions of several turns, in FastChat's format.

Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (2023). An answer line is
`{"question_id", "answer_id", "model_id", "choices": [{"index": 0, "turns": [...]}], "tstamp"}`; we add `settings`, a
digest of what the answer depends on, and `cut_prompts`, in how many turns the oldest text did not fit.
"""

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from evaluation.decoding import Request, choose_batch
from evaluation.generation import fit_prompt, generate_texts
from evaluation.mtbench.conversation import Format, Turn, prompt_tokens
from evaluation.mtbench.jsonl import append_row, read_kept_rows, read_rows, write_rows
from evaluation.mtbench.settings import Temperature
from utils.batching import share_batches
from utils.distributed import is_main, together
from utils.errors import InputError, Missing
from utils.log import progress

HUB_SPACE = "lmsys/mt-bench"
HUB_QUESTIONS = "data/mt_bench/question.jsonl"
HUB_REFERENCES = "data/mt_bench/reference_answer/gpt-4.jsonl"

logger = logging.getLogger(__name__)
QuestionId = int | str


@dataclass(frozen=True)
class Question:
    """One question: what the user says in each turn."""

    question_id: QuestionId
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated. `context`: the most tokens of prompt and answer together."""

    context: int
    max_new_tokens: int = 1024
    temperature: Temperature = Temperature.GREEDY
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise InputError(f"--max_new_tokens {self.max_new_tokens}: must be at least 1")


@dataclass(frozen=True)
class AnswerFile:
    """Where the answers of one model are kept. `identity` (what JSON can hold): the model's weights and quantization,
    and whatever else they depend on besides the settings, the format and the question.
    """

    path: Path
    model_id: str
    identity: object

    def read(self, questions: Sequence[Question], form: Format, settings: AnswerSettings) -> dict[QuestionId, dict]:
        """The answers that are there, by question. Raises InputError if one is not the answer that we would give."""
        label = f"MT-Bench answers {self.path}"
        expected = {question.question_id: self.digest(question, form, settings) for question in questions}
        kept = {_question_id(row, label): row for row in read_kept_rows(self.path, label)}
        for question_id, row in kept.items():
            origin = (row.get("settings"), row.get("model_id"))
            if question_id not in expected or origin != (expected[question_id], self.model_id):
                raise InputError(
                    f"{label}: the answer to question {question_id} is of another model, question or setting; "
                    "choose another --output_dir, or delete the file"
                )
        return kept

    def digest(self, question: Question, form: Format, settings: AnswerSettings) -> str:
        """16 hex digits of everything that the answer to a question depends on."""
        described = [self.identity, form.name, settings.context, settings.max_new_tokens, settings.temperature.value]
        described += [settings.seed, question.category, question.turns]
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fetch_from_hub(file: str, flag: str) -> Path:
    """The local path of a file of the benchmark's space on the hub: from the cache if it is there, else downloaded.

    Raises InputError, naming the flag that takes a local copy, if it cannot be had.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # HTTPError: of whatever the hub speaks with

    where = {"filename": file, "repo_type": "space"}
    try:
        return Path(hf_hub_download(HUB_SPACE, **where, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        # Without a network the download would retry for half a minute; this asks once.
        get_hf_file_metadata(hf_hub_url(HUB_SPACE, **where))
        return Path(hf_hub_download(HUB_SPACE, **where))
    except (HTTPError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise Missing(
            f"MT-Bench: {file} cannot be fetched from the hub ({reason}); give a local copy with {flag}"
        ) from None


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a file in FastChat's format. Raises InputError, naming the line, for what is not one."""
    questions: dict[QuestionId, Question] = {}
    for number, row in read_rows(path, f"--mtbench_questions {path}"):
        where = f"--mtbench_questions {path}: line {number}"
        question_id = _question_id(row, where)
        if question_id in questions:
            raise InputError(f"{where}: question_id {question_id} is there twice")
        category = row.get("category")
        if not isinstance(category, str) or not category.strip():
            raise InputError(f"{where}: 'category' must be a text")
        questions[question_id] = Question(question_id, category, _texts(row.get("turns"), f"{where}: 'turns'"))
        if not all(turn.strip() for turn in questions[question_id].turns):
            raise InputError(f"{where}: 'turns' has an empty text")
    if not questions:
        raise InputError(f"--mtbench_questions {path}: holds no question")
    return tuple(questions.values())


def read_references(path: Path) -> dict[QuestionId, tuple[str, ...]]:
    """Reference answers by question, from an answer file. Raises InputError, naming the line, for what is not one."""
    references = {}
    for number, row in read_rows(path, f"--mtbench_references {path}"):
        where = f"--mtbench_references {path}: line {number}"
        match row.get("choices"):
            case [{"turns": turns}, *_]:
                references[_question_id(row, where)] = _texts(turns, f"{where}: 'choices[0].turns'")
            case _:
                raise InputError(f"{where}: no 'choices[0].turns'; an answer file of FastChat is wanted")
    return references


def answer_questions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    form: Format,
    settings: AnswerSettings,
    file: AnswerFile,
    device: torch.device,
    batch_size: int | None = None,
) -> list[dict]:
    """The answers to all questions, in their order; those that `file` has already are taken from there.

    `model` is where it can run on inputs on `device`. A batch of `batch_size` questions (None: what fits) is on disk
    when it is finished; at the end the file is sorted by question. Every process must make the same call: questions
    are split among them, the main one writes. An answer depends on its question alone, but for the order of
    floating-point sums: neither on what is answered beside it, nor on what was resumed, nor on the number of processes.
    Raises InputError if the file has answers of something else.
    """
    answers = together(lambda: file.read(questions, form, settings))[0]
    if is_main() and answers:
        write_rows(file.path, list(answers.values()))  # ends with a whole line now
        logger.info("MT-Bench: %d of %d questions are answered in %s", len(answers), len(questions), file.path)
    missing = [question for question in questions if question.question_id not in answers]

    def answer(batch: Sequence[Question]) -> list[dict]:
        answered = answer_batch(model, tokenizer, batch, form, settings, device)
        return [_row(talk, file, form, settings) for talk in answered]

    length = max((_length(question, form, tokenizer, settings) for question in missing), default=0)
    rows = share_batches(choose_batch(batch_size, model, length, device), missing, answer)
    for question, row in zip(progress(missing, "MT-Bench", "question"), rows, strict=True):
        answers[question.question_id] = row
        if is_main():
            append_row(file.path, row)
    if is_main():
        write_rows(file.path, sorted(answers.values(), key=lambda row: _order(row["question_id"])))
    cut = sum(row["cut_prompts"] for row in answers.values())
    if cut:
        logger.warning("MT-Bench: %d prompts lost their oldest text, to fit %d tokens", cut, settings.context)
    return [answers[question.question_id] for question in questions]


@dataclass
class Conversation:
    """What was asked and answered so far, and how many prompts had to be cut; `generator` draws its tokens."""

    question: Question
    generator: torch.Generator
    turns: list[Turn] = field(default_factory=list)
    cut: int = 0

    @property
    def answers(self) -> list[str]:
        """The model's part, turn by turn."""
        return [answer for _, answer in self.turns]

    def request(self, form: Format, tokenizer: PreTrainedTokenizerBase, settings: AnswerSettings) -> Request:
        """What the next answer is to be written behind."""
        user = self.question.turns[len(self.turns)]
        whole = prompt_tokens(form, tokenizer, [*self.turns, (user, None)])
        prompt = fit_prompt(whole, settings.context, settings.max_new_tokens, tokenizer.bos_token_id)
        self.cut += len(prompt) < len(whole)
        room = min(settings.max_new_tokens, settings.context - len(prompt))
        return Request(prompt, room, settings.temperature.of(self.question.category), self.generator)


def answer_batch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    form: Format,
    settings: AnswerSettings,
    device: torch.device,
) -> list[Conversation]:
    """The conversations about the questions: one turn after the other, each of all conversations that have it."""
    seeds = [question_seed(settings.seed, question.question_id) for question in questions]
    talks = [
        Conversation(question, torch.Generator(device).manual_seed(seed))
        for question, seed in zip(questions, seeds, strict=True)
    ]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [talk for talk in talks if turn < len(talk.question.turns)]
        requests = [talk.request(form, tokenizer, settings) for talk in asked]
        texts = generate_texts(model, tokenizer, requests, form.stops, device)
        for talk, text in zip(asked, texts, strict=True):
            talk.turns.append((talk.question.turns[turn], text))
    return talks


def _row(talk: Conversation, file: AnswerFile, form: Format, settings: AnswerSettings) -> dict:
    """The line of an answer file."""
    return {
        "question_id": talk.question.question_id,
        "answer_id": uuid.uuid4().hex,
        "model_id": file.model_id,
        "choices": [{"index": 0, "turns": talk.answers}],
        "tstamp": time.time(),
        "settings": file.digest(talk.question, form, settings),
        "cut_prompts": talk.cut,
    }


def _length(question: Question, form: Format, tokenizer: PreTrainedTokenizerBase, settings: AnswerSettings) -> int:
    """The most tokens of its conversation that the model reads."""
    asked = prompt_tokens(form, tokenizer, [(" ".join(question.turns), None)])
    return min(settings.context, len(asked) + len(question.turns) * settings.max_new_tokens)


def question_seed(seed: int, question_id: QuestionId) -> int:
    """A seed of 63 bits for one question."""
    return int.from_bytes(hashlib.sha256(f"{seed} {question_id}".encode()).digest()[:8]) >> 1


def _order(question_id: QuestionId) -> tuple[bool, QuestionId]:
    return isinstance(question_id, str), question_id


def _question_id(row: dict, where: str) -> QuestionId:
    question_id = row.get("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, (int, str)) or question_id == "":
        raise InputError(f"{where}: 'question_id' must be a whole number or a text")
    return question_id


def _texts(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise InputError(f"{where} must be a list of texts")
    return tuple(value)
