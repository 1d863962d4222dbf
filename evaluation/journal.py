"""What an unfinished evaluation has found so far, so that the same one, started again, goes on behind it."""

import hashlib
import json
import os
from pathlib import Path

from utils.distributed import is_main
from utils.io import write_atomically


class Journal:
    """Finished parts of an evaluation, each a JSON value under a key, one line of a file each.

    A line is on disk when `keep` returns. The first line says what is evaluated (`identity`); a file of something else,
    or a last line that was cut off, is not believed. Of several processes all read and the main one writes.
    """

    def __init__(self, path: Path, identity: object):
        self.path = path
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self._found: dict[str, object] = {}
        lines = _read(path)
        self._writing = False
        if lines[:1] == [{"identity": self._identity}]:
            self._found = {line["key"]: line["value"] for line in lines[1:]}

    def __contains__(self, key: str) -> bool:
        return key in self._found

    @property
    def parts(self) -> int:
        """How many values are kept."""
        return len(self._found)

    def under(self, heading: str) -> "Section":
        """The part of this journal whose keys begin with `heading`."""
        return Section(self, heading)

    def get(self, key: str) -> object | None:
        """The value kept under `key`, or None."""
        return self._found.get(key)

    def keep(self, key: str, value: object) -> None:
        """Keep `value` (what JSON can hold) under `key`."""
        self._found[key] = value
        if not is_main():
            return
        if not self._writing:  # the whole file once, so that nothing is appended to a line that was cut off
            lines = [{"identity": self._identity}, *({"key": k, "value": v} for k, v in self._found.items())]
            write_atomically(self.path, lambda path: path.write_text("".join(map(_line, lines)), encoding="utf-8"))
            self._writing = True
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line({"key": key, "value": value}))
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Remove the file: the evaluation is finished, and its results are where they belong."""
        if is_main():
            self.path.unlink(missing_ok=True)


class Section:
    """A journal's entries under one heading, as a journal of their own."""

    def __init__(self, journal: Journal, heading: str):
        self._journal, self._heading = journal, heading

    def __contains__(self, key: str) -> bool:
        return f"{self._heading}/{key}" in self._journal

    def get(self, key: str) -> object | None:
        """The value kept under `key`, or None."""
        return self._journal.get(f"{self._heading}/{key}")

    def keep(self, key: str, value: object) -> None:
        """Keep `value` under `key`."""
        self._journal.keep(f"{self._heading}/{key}", value)


def _line(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _read(path: Path) -> list[dict]:
    """The complete lines of a journal; empty if there is none."""
    lines = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines
