"""What a `--calib_dataset` or `--test_dataset` argument means, and where its text is.

An argument is the name of a corpus on the hub, `name=path` (that corpus's protocol on a local copy) or the path of a
local file or folder.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from utils import documents
from utils.errors import InputError, Missing


class Split(Enum):
    """What the text is for; the value is the name of the tensor in a file of tokens."""

    CALIBRATION = "calibration"
    TEST = "test"

    @property
    def flag(self) -> str:
        """The command line's flag that chooses this text."""
        return "--calib_dataset" if self is Split.CALIBRATION else "--test_dataset"

    @property
    def stored_splits(self) -> tuple[str, ...]:
        """The splits of a saved dataset that will do, best first."""
        return ("train", "validation") if self is Split.CALIBRATION else ("test", "validation")


@dataclass(frozen=True)
class Corpus:
    """A corpus on the hub: one file per split. `by_document`: its protocols draw documents, one text will not do."""

    repo: str
    calibration_file: str
    test_file: str | None
    column: str = "text"
    revision: str = "main"
    by_document: bool = False

    def file(self, split: Split) -> str | None:
        """Path in the repository of the split's file; None if the corpus does not serve for it."""
        return self.calibration_file if split is Split.CALIBRATION else self.test_file


_C4 = Corpus(
    "allenai/c4",
    "en/c4-train.00000-of-01024.json.gz",
    "en/c4-validation.00000-of-00008.json.gz",
    by_document=True,
)

CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/train-00000-of-00001.parquet",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet",
    ),
    # The main branch holds only a script, which no current library runs; this branch is the hub's own conversion.
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        "penn_treebank/train/0000.parquet",
        "penn_treebank/test/0000.parquet",
        column="sentence",
        revision="refs/convert/parquet",
    ),
    "c4": _C4,
    "c4-new": _C4,
    "pile": Corpus("mit-han-lab/pile-val-backup", "val.jsonl.zst", None, by_document=True),
}
MIX = "mix"
MIX_PARTS = ("wikitext2", "ptb", "c4")
TOKEN_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Dataset:
    """A parsed argument: its label, the corpus whose protocol holds (None: plain text), the local copy (None: hub)."""

    label: str
    corpus: str | None
    path: Path | None

    @property
    def is_tokens(self) -> bool:
        """Whether the file holds tokens already."""
        return self.path is not None and self.path.name.lower().endswith(TOKEN_SUFFIX)


def parse_dataset(dataset: str) -> Dataset:
    """Split an argument into its parts; asks the disk only whether the whole of an `a=b` is a path.

    Raises InputError for `name=path` with a name that has no local form, or without a path.
    """
    if dataset in CORPORA or dataset == MIX:
        return Dataset(dataset, dataset, None)
    name, equals, copy = dataset.partition("=")
    if not equals or "/" in name or os.path.exists(dataset):
        path = Path(dataset).expanduser()
        return Dataset(_stem(path), None, path)
    if name == MIX:
        raise InputError(f"{dataset}: mix has no local copy; give one corpus as {' or '.join(MIX_PARTS)}=PATH")
    if name not in CORPORA:
        raise InputError(f"{dataset}: unknown dataset {name!r} before '='; known are {', '.join(CORPORA)}")
    if not copy:
        raise InputError(f"{dataset}: no path after '='; for the corpus on the hub write {name}")
    return Dataset(name, name, Path(copy).expanduser())


def check_usable(dataset: Dataset, split: Split) -> None:
    """Raise InputError if the dataset does not serve for this split, is not there or is of no known kind."""
    if split is Split.TEST and (dataset.corpus == MIX or (dataset.corpus and not CORPORA[dataset.corpus].test_file)):
        choices = ", ".join(name for name, corpus in CORPORA.items() if corpus.test_file)
        raise InputError(f"{dataset.label}: is for calibration only; choose {choices} or a local file for {split.flag}")
    if dataset.path is not None:
        _check_local(dataset, split)


def identity(dataset: Dataset, split: Split) -> str:
    """What the text is, for a cache key: the hub's file, or a hash of the local content. Fetches nothing."""
    if dataset.path is None:
        corpus = CORPORA[dataset.corpus]
        return f"{dataset.corpus} {corpus.repo}@{corpus.revision}:{corpus.file(split)} {corpus.column}"
    kind = "folder" if os.path.isdir(dataset.path) else documents.known_suffix(dataset.path)
    try:
        return f"{dataset.corpus or 'text'} {kind} sha256:{_content_hash(dataset.path)}"
    except OSError as error:
        raise InputError(f"{dataset.path}: cannot be read ({documents.in_short(error)})") from None


def read_documents(dataset: Dataset, split: Split) -> list[str]:
    """The documents of a split, fetched if need be; not all blank. Raises InputError for what cannot be had or read."""
    column = CORPORA[dataset.corpus].column if dataset.corpus else "text"
    return documents.read_documents(dataset.path or _fetch(dataset.corpus, split), column, split.stored_splits)


def _fetch(name: str, split: Split) -> Path:
    """The local path of a corpus's file: from the hub's cache if it is there, else downloaded into it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # HTTPError: of whatever the hub speaks with

    corpus = CORPORA[name]
    where = {"filename": corpus.file(split), "repo_type": "dataset", "revision": corpus.revision}
    try:
        return Path(hf_hub_download(corpus.repo, **where, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        # Without a network the download would retry for half a minute; this asks once.
        get_hf_file_metadata(hf_hub_url(corpus.repo, **where))
        return Path(hf_hub_download(corpus.repo, **where))
    except (HTTPError, OSError, RuntimeError) as error:
        raise Missing(
            f"{name}: cannot be fetched from the hub ({documents.in_short(error)}); give a local copy with "
            f"{split.flag} {name}=PATH ({_kinds(corpus.by_document)})"
        ) from None


def _check_local(dataset: Dataset, split: Split) -> None:
    path = dataset.path
    if not os.path.exists(path):
        if dataset.corpus is None and len(path.parts) == 1 and not path.suffix:
            raise InputError(
                f"{path}: no such dataset; known are {', '.join([*CORPORA, MIX])}; "
                "the path of a local file or folder is possible too, as it is or as name=path"
            )
        raise Missing(f"{path}: no such file or folder (given to {split.flag})")
    by_document = dataset.corpus is not None and CORPORA[dataset.corpus].by_document
    if os.path.isdir(path):
        # Before it is hashed: a wrong folder can be a whole disk.
        if not documents.is_saved_dataset(path):
            raise InputError(f"{path}: not a folder saved by datasets' save_to_disk; give {_kinds(by_document)}")
    elif not dataset.is_tokens and documents.known_suffix(path) is None:
        raise InputError(f"{path}: unknown kind of file; give {_kinds(by_document)}, or tokens as {TOKEN_SUFFIX}")
    elif by_document and path.suffix.lower() == ".txt":
        raise InputError(
            f"{dataset.label}={path}: {dataset.label} draws documents and a .txt is one text; "
            f"give {_kinds(by_document)}, or the .txt without '{dataset.label}='"
        )


def _kinds(by_document: bool) -> str:
    """The kinds of local copies in words."""
    files = ".jsonl or .parquet" if by_document else ".txt, .jsonl or .parquet"
    return f"a {files} file or a folder saved by datasets"


def _stem(path: Path) -> str:
    name = path.name if path.name not in ("", "..") else path.resolve().name
    if os.path.isdir(path):
        return name
    suffix = documents.known_suffix(path) or path.suffix
    return name[: len(name) - len(suffix)]


def _content_hash(path: Path) -> str:
    """sha256 of a file, or of the names and contents of all files of a folder in the order of their names."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(json.dumps([(name, _content_hash(file)) for name, file in files]).encode()).hexdigest()
