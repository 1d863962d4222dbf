"""Documents out of local files: text, JSON lines (packed or not), parquet, folders saved by datasets.

Every reader returns a list of texts and raises InputError, naming file and line or row, for what it cannot read.
pyarrow and datasets are imported only by the readers that need them.
"""

import gzip
import io
import json
import os
import textwrap
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from utils.errors import InputError
from utils.packages import advice

# What save_to_disk leaves in a folder: the first for one split, the second for several.
_FOLDER_MARKS = ("state.json", "dataset_dict.json")
# Arrow's names of the types that hold text.
_STRINGS = ("string", "large_string", "string_view")


def known_suffix(path: Path) -> str | None:
    """The suffix of a file name that has a reader, e.g. '.json.gz'; None if it has none."""
    name = path.name.lower()
    return next((suffix for suffix in _READERS if name.endswith(suffix)), None)


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder looks like one written by datasets' save_to_disk."""
    return any((path / mark).is_file() for mark in _FOLDER_MARKS)


def read_documents(path: Path, column: str, splits: tuple[str, ...]) -> list[str]:
    """The documents of a file with a known suffix, or of a saved dataset; not all of them are blank.

    They are taken from `column`, else from 'text', else from the only column of strings; of a folder with several
    splits from the first of `splits` that it has. Raises InputError.
    """
    try:
        documents = (
            _read_folder(path, column, splits) if os.path.isdir(path) else _READERS[known_suffix(path)](path, column)
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({in_short(error)})") from None
    if not any(document.strip() for document in documents):
        raise InputError(f"{path}: holds no text")
    return documents


def in_short(error: BaseException) -> str:
    """An exception as part of one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", width=140, placeholder=" …")


def _read_text(path: Path, column: str) -> list[str]:
    # Bytes, not text mode, which would rewrite line ends.
    return [_decode(path.read_bytes(), str(path))]


def _read_json_lines(path: Path, column: str) -> list[str]:
    documents: list[str] = []
    chosen = None
    with _open_binary(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            row = _json_object(line, f"{path}: line {number}")
            if chosen is None:
                strings = [key for key, value in row.items() if isinstance(value, str)]
                chosen = _choose_column(path, strings, list(row), column)
            if not isinstance(row.get(chosen), str):
                raise InputError(f"{path}: line {number}: no text in column {chosen!r}")
            documents.append(row[chosen])
    return documents


def _read_parquet(path: Path, column: str) -> list[str]:
    pyarrow = _import("pyarrow", path)
    parquet = _import("pyarrow.parquet", path)
    try:
        schema = parquet.read_schema(path)
        strings = [field.name for field in schema if str(field.type) in _STRINGS]
        chosen = _choose_column(path, strings, schema.names, column)
        documents = parquet.read_table(path, columns=[chosen]).column(chosen).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file ({in_short(error)})") from None
    return _without_gaps(path, documents, chosen)


def _read_folder(path: Path, column: str, splits: tuple[str, ...]) -> list[str]:
    datasets = _import("datasets", path)
    try:
        stored = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a readable folder of datasets' save_to_disk ({in_short(error)})") from None
    if isinstance(stored, datasets.DatasetDict):
        stored = stored[_choose_split(path, list(stored), splits)]
    strings = [
        name for name, kind in stored.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")
    ]
    chosen = _choose_column(path, strings, stored.column_names, column)
    return _without_gaps(path, list(stored[chosen]), chosen)


_READERS: dict[str, Callable[[Path, str], list[str]]] = {
    ".txt": _read_text,
    ".parquet": _read_parquet,
    # Packed as the hub's files of c4 (.json.gz) and pile (.jsonl.zst) are.
    **{kind + packing: _read_json_lines for kind in (".jsonl", ".json") for packing in ("", ".gz", ".zst")},
}


def _choose_column(path: Path, strings: list[str], columns: list[str], preferred: str) -> str:
    for name in (preferred, "text"):
        if name in strings:
            return name
    if len(strings) == 1:
        return strings[0]
    raise InputError(f"{path}: no column 'text' and not exactly one column of strings; it has {', '.join(columns)}")


def _choose_split(path: Path, stored: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in stored:
            return name
    if len(stored) == 1:
        return stored[0]
    raise InputError(f"{path}: none of the splits {', '.join(wanted)} is there; it has {', '.join(stored)}")


def _without_gaps(path: Path, documents: list[str | None], column: str) -> list[str]:
    if None in documents:
        raise InputError(f"{path}: row {documents.index(None) + 1}: no text in column {column!r}")
    return documents


def _json_object(line: bytes, where: str) -> dict:
    try:
        row = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}); one JSON object per line is wanted") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: one JSON object per line is wanted, this is a {type(row).__name__}")
    return row


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start})") from None


def _open_binary(path: Path) -> BinaryIO:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")
    if name.endswith(".zst"):
        return io.BufferedReader(_import("pyarrow", path).input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged or cut off ({in_short(error)})") from None


def _import(module: str, path: Path) -> ModuleType:
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise InputError(f"{path}: reading it needs the package {package} ({advice(package)})") from None
