"""JSON lines that others read too (questions, answers, judgements): read with precise errors, appended safely."""

import json
import os
from pathlib import Path

from utils.errors import InputError
from utils.io import write_atomically


def read_rows(path: Path, label: str) -> list[tuple[int, dict]]:
    """The objects of a file, each with its line number; blank lines are skipped.

    `label` says in errors what the file was given as. Raises InputError, naming the line, for what is not an object.
    """
    return [(number, _parse(line, f"{label}: line {number}")) for number, line in _lines(path, label)]


def read_kept_rows(path: Path, label: str) -> list[dict]:
    """The objects of a file that `append_row` writes; none if there is no file.

    A last line that was cut off by an interruption is left out. Any other damage raises InputError: the file is not
    ours to mend.
    """
    if not path.exists():
        return []
    rows, lines = [], _lines(path, label)
    for position, (number, line) in enumerate(lines, start=1):
        try:
            rows.append(_parse(line, f"{label}: line {number}"))
        except InputError:
            if position < len(lines) or line.endswith(b"\n"):
                raise
    return rows


def append_row(path: Path, row: dict) -> None:
    """Add one line; it is on disk when this returns. The file must end with a whole line (see `write_rows`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write the whole file, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text("".join(map(_line, rows)), encoding="utf-8"))


def _line(row: dict) -> str:
    # ASCII: a judge may send half of a surrogate pair, which UTF-8 cannot hold
    return json.dumps(row, allow_nan=False) + "\n"


def _lines(path: Path, label: str) -> list[tuple[int, bytes]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{label}: cannot be read ({error.strerror})") from None
    # not splitlines: text may hold other separators, which end no line of JSON
    lines = (line + b"\n" for line in content.split(b"\n")[:-1])
    last = content.rpartition(b"\n")[2]
    return [(number, line) for number, line in enumerate([*lines, last], start=1) if line.strip()]


def _parse(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({str(error).partition(':')[0]}); one object per line is wanted") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: one JSON object per line is wanted, this is a {type(row).__name__}")
    return row
