"""Items of a task from JSON Lines files, checked line by line before anything that takes long begins.

The field names are those of the hub's datasets, since lm-eval's own prompts read them.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import InputError

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Field:
    """What a field must hold: in words, and as a test of (value, whole item), made after those of the fields before."""

    wanted: str
    fits: Callable[[object, dict], bool]


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _index(value: object, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def _labelled_choices(value: object, item: dict) -> bool:
    if not isinstance(value, dict) or not _strings(value.get("text")) or not _strings(value.get("label")):
        return False
    return 0 < len(value["text"]) == len(value["label"])


TEXT = Field("a string", lambda value, item: isinstance(value, str))
ZERO_OR_ONE = Field("0 or 1", lambda value, item: _index(value, 2))
ARC = {
    "question": TEXT,
    "choices": Field('{"text": [strings], "label": [as many strings]}', _labelled_choices),
    "answerKey": Field("one of choices.label", lambda value, item: value in item["choices"]["label"]),
}
# What lm-eval's prompts and targets read of every item. Tasks that are not listed are checked for uniformity only.
FIELDS: Mapping[str, Mapping[str, Field]] = {
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "boolq": {"passage": TEXT, "question": TEXT, "label": ZERO_OR_ONE},
    "hellaswag": {
        "activity_label": TEXT,
        "ctx_a": TEXT,
        "ctx_b": TEXT,
        "endings": Field("a list of strings", lambda value, item: _strings(value) and len(value) > 1),
        "label": Field(
            "the index of an ending, as a string",
            lambda value, item: value in map(str, range(len(item["endings"]))),
        ),
    },
    "piqa": {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": ZERO_OR_ONE},
    "stories_qa": {
        "prompt": TEXT,
        "choices": Field("a list of strings", lambda value, item: _strings(value) and len(value) > 1),
        "answer_index": Field("the index of a choice", lambda value, item: _index(value, len(item["choices"]))),
    },
    "winogrande": {
        "sentence": Field('a string with a gap "_"', lambda value, item: isinstance(value, str) and "_" in value),
        "option1": TEXT,
        "option2": TEXT,
        "answer": Field('"1" or "2"', lambda value, item: value in ("1", "2")),
    },
}


def read_items(task: str, path: Path) -> list[dict]:
    """The items of a task's JSON Lines file, in order; blank lines are passed over.

    Raises InputError, naming file and line, if a line is not a JSON object, lacks a field that the task needs or holds
    something else there, or has other fields or types than the first one.
    """
    items: list[dict] = []
    for number, line in _lines(path):
        item = _parsed(line, f"{path}:{number}")
        if task == "boolq" and "label" not in item and isinstance(item.get("answer"), bool):
            item["label"] = int(item["answer"])  # google/boolq says `answer`; lm-eval's task reads super_glue's `label`
        problem = _problem(item, FIELDS.get(task, {})) or _difference(item, items[0] if items else item)
        if problem:
            raise InputError(f"{path}:{number}: {problem} (items of {task})")
        items.append(item)
    if not items:
        raise InputError(f"{path}: holds no item of {task}")
    return items


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank. Only "\\n" ends one: JSON strings may hold the other line ends of Unicode."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _parsed(line: bytes, where: str) -> dict:
    try:
        item = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(item, dict):
        raise InputError(f"{where}: not a JSON object, {{...}}, but {_kind(item)}")
    return item


def _problem(item: dict, fields: Mapping[str, Field]) -> str | None:
    """What is wrong with the first field that does not hold what it must, or None."""
    for name, field in fields.items():
        if name not in item:
            return f"no field '{name}'; it must be {field.wanted}"
        if not field.fits(item[name], item):
            return f"field '{name}' must be {field.wanted}"
    return None


def _difference(item: dict, first: dict) -> str | None:
    """How the fields of an item differ from those of the file's first one, or None: lm-eval reads them as a table."""
    for name in first.keys() ^ item.keys():
        return f"field '{name}' is {'missing' if name in first else 'new'}; all lines must have the fields of the first"
    for name, value in item.items():
        kinds = _kind(value), _kind(first[name])
        if kinds[0] != kinds[1] and "null" not in kinds:
            return f"field '{name}' is {kinds[0]}, in the first line it is {kinds[1]}"
    return None


def _kind(value: object) -> str:
    """The JSON type of a value."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "null")


def load_dataset(task: str, files: Mapping[str, str], splits: tuple[str, ...]) -> "DatasetDict":
    """What lm-eval has of a task in place of the hub's dataset: the `files` by split, and the other `splits` empty.

    lm-eval looks at the split that examples are drawn from even if it draws none.
    """
    from datasets import Dataset, DatasetDict

    given = {split: Dataset.from_list(read_items(task, Path(path))) for split, path in files.items()}
    empty = next(iter(given.values())).select([])
    return DatasetDict({split: given.get(split, empty) for split in splits})
