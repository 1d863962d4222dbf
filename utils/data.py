"""Calibration and test tokens of a dataset argument, and their cache."""

import hashlib
import json
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from utils import windows
from utils.corpora import MIX, MIX_PARTS, Dataset, Split, check_usable, identity, parse_dataset, read_documents
from utils.errors import InputError, Missing
from utils.io import read_tensors, write_tensors
from utils.windows import Bos, Recipe

logger = logging.getLogger(__name__)

# Part of every cache key; raised when the same description comes to mean other tokens.
FORMAT_VERSION = 1

_INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64)


def calibration_tokens(
    dataset: str,
    tokenizer,
    *,
    nsamples: int | None,
    seqlen: int | None,
    seed: int,
    cache_dir: Path,
    vocab_size: int | None = None,
    bos: Bos | None = None,
) -> Tensor:
    """Token ids [nsamples, seqlen], int64, drawn from a corpus's training text or a local file.

    A file of tokens (`.safetensors`, tensor `calibration`) gives its first nsamples rows and seqlen columns, None
    meaning all; for everything else both are required. Windows of text begin with `bos` if that says so; a file's are
    never changed: it says token by token what is to be read. Raises InputError for a dataset that is unknown, missing,
    unreadable or too short, for ids outside the vocabulary (of vocab_size, or of the tokenizer for a token file), and
    for a file's windows that do not begin with a `bos` that is strict.
    """
    if dataset == MIX:
        shared = {"seqlen": seqlen, "seed": seed, "cache_dir": cache_dir, "vocab_size": vocab_size, "bos": bos}
        return _mixed_tokens(tokenizer, nsamples=nsamples, **shared)
    parsed = parse_dataset(dataset)
    check_usable(parsed, Split.CALIBRATION)
    if parsed.is_tokens:
        tokens = _read_token_file(parsed.path, Split.CALIBRATION, nsamples, seqlen, bos)
        vocab_size = vocab_size or _vocabulary_size(tokenizer)
    else:
        recipe = windows.calibration_recipe(parsed.corpus, nsamples, seqlen, seed).beginning_with(bos)
        tokens = _cached_tokens(parsed, Split.CALIBRATION, tokenizer, recipe, cache_dir)
    _check_vocabulary(tokens, vocab_size, dataset)
    return tokens


def test_tokens(
    dataset: str,
    tokenizer,
    *,
    seqlen: int | None,
    cache_dir: Path,
    vocab_size: int | None = None,  # noqa: PT028 - tokens for a test, no test for pytest
    bos: Bos | None = None,  # noqa: PT028
) -> Tensor:
    """Token ids [windows, seqlen], int64, of a corpus's test text or a local file, cut as its protocol says.

    A file of tokens (`.safetensors`, tensor `test`) gives its first seqlen columns, None meaning all; for everything
    else seqlen is required. For `bos` see `calibration_tokens`. Raises InputError as that, and for a corpus without a
    test protocol.
    """
    parsed = parse_dataset(dataset)
    check_usable(parsed, Split.TEST)
    if parsed.is_tokens:
        tokens = _read_token_file(parsed.path, Split.TEST, None, seqlen, bos)
        vocab_size = vocab_size or _vocabulary_size(tokenizer)
    else:
        recipe = windows.test_recipe(parsed.corpus, seqlen).beginning_with(bos)
        tokens = _cached_tokens(parsed, Split.TEST, tokenizer, recipe, cache_dir)
    _check_vocabulary(tokens, vocab_size, dataset)
    return tokens


def dataset_label(dataset: str) -> str:
    """The name of a corpus, or the stem of a local file or folder, which need not exist yet.

    Raises InputError for `name=path` with a name that has no local form.
    """
    return parse_dataset(dataset).label


def is_token_file(dataset: str) -> bool:
    """Whether the argument is a file of tokens, which brings its own number and length of windows."""
    return parse_dataset(dataset).is_tokens


def data_fingerprint(tokens: Tensor) -> str:
    """Short sha256 of shape and ids (as int64), 16 hex digits."""
    ids = tokens.detach().to("cpu", torch.int64).contiguous()
    return hashlib.sha256(str(tuple(ids.shape)).encode() + ids.numpy().astype("<i8").tobytes()).hexdigest()[:16]


def tokenizer_digest(tokenizer) -> str:
    """sha256 of what decides how a tokenizer (of transformers, fast or not) tokenises; tokenises nothing."""
    facts: dict[str, object] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "flags": {
            name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "split_special_tokens")
        },
    }
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Every call sets these two anew, so keeping them would change the digest with the first call.
        facts["backend"] = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}
    else:
        facts["vocabulary"] = sorted(tokenizer.get_vocab().items())
        # Merges and scores are not in the vocabulary, only in the files that the tokenizer was made of.
        files = [getattr(tokenizer, name, None) for name in sorted(getattr(tokenizer, "vocab_files_names", {}))]
        facts["files"] = [
            hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file and os.path.isfile(file)
        ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _mixed_tokens(tokenizer, *, nsamples: int, **options) -> Tensor:
    """Equal shares of the mix's corpora, the remainder from the first; [nsamples, seqlen]."""
    share = nsamples // len(MIX_PARTS)
    if share == 0:
        raise InputError(f"mix: --nsamples {nsamples} is less than one window of each of {', '.join(MIX_PARTS)}")
    shares = dict.fromkeys(MIX_PARTS, share)
    shares[MIX_PARTS[0]] += nsamples % len(MIX_PARTS)
    try:
        return torch.cat([calibration_tokens(part, tokenizer, nsamples=n, **options) for part, n in shares.items()])
    except InputError as error:
        raise type(error)(f"mix: {error}") from None


def _cached_tokens(dataset: Dataset, split: Split, tokenizer, recipe: Recipe, cache_dir: Path) -> Tensor:
    """Tokens from the cache, or cut now and stored there; [windows, seqlen]."""
    description = {
        "format": str(FORMAT_VERSION),
        "tokenizer": tokenizer_digest(tokenizer),
        "dataset": identity(dataset, split),
        "split": split.value,
        "recipe": repr(recipe),
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    path = Path(cache_dir) / f"tokens_{key}.safetensors"
    tokens = _read_cache(path, description)
    if tokens is None:
        tokens = _cut_windows(dataset, read_documents(dataset, split), tokenizer, recipe)
        _write_cache(path, tokens, description)
    return tokens


def _cut_windows(dataset: Dataset, documents: list[str], tokenizer, recipe: Recipe) -> Tensor:
    def tokenize(text: str) -> Tensor:
        # verbose=False: a text longer than the model's context is what is wanted here, no reason for a warning.
        return torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)

    try:
        return recipe.windows(documents, tokenize)
    except InputError as error:
        raise type(error)(f"{dataset.path or dataset.label}: {error}") from None


def _read_cache(path: Path, description: dict[str, str]) -> Tensor | None:
    """The tokens stored under a description; None if there are none or the file is damaged."""
    # Not path.exists(), which raises where the folder may not be looked into.
    if not os.path.exists(path):
        return None
    try:
        tensors, metadata = read_tensors(path)
    except InputError as error:
        logger.warning("%s; making the tokens again", error)
        return None
    tokens = tensors.get("tokens")
    if tokens is None or metadata != _metadata(tokens, description):
        logger.warning("%s: not what was stored there; making the tokens again", path)
        return None
    return tokens


def _write_cache(path: Path, tokens: Tensor, description: dict[str, str]) -> None:
    try:
        write_tensors(path, {"tokens": tokens}, _metadata(tokens, description))
    except OSError as error:
        logger.warning("%s: tokens cannot be cached (%s)", path.parent, error)


def _metadata(tokens: Tensor, description: dict[str, str]) -> dict[str, str]:
    return {**description, "fingerprint": data_fingerprint(tokens)}


def _read_token_file(path: Path, split: Split, nsamples: int | None, seqlen: int | None, bos: Bos | None) -> Tensor:
    """The first rows and columns of the split's tensor.

    Raises InputError if it is missing, misshapen or too small, or if a row does not begin with a `bos` that is strict.
    """
    tensors, _ = read_tensors(path)
    if split.value not in tensors:
        raise InputError(f"{path}: no tensor {split.value!r} (wanted by {split.flag}); it has {', '.join(tensors)}")
    tokens = tensors[split.value]
    if tokens.dtype not in _INTEGERS or tokens.ndim != 2 or tokens.numel() == 0:
        kind = f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}"
        raise InputError(f"{path}: tensor {split.value!r} must be integers [windows, seqlen], not {kind}")
    rows, columns = tokens.shape
    if nsamples is not None and nsamples > rows:
        raise Missing(f"{path}: --nsamples {nsamples}, but tensor {split.value!r} has only {rows} rows")
    if seqlen is not None and seqlen > columns:
        raise Missing(f"{path}: --seqlen {seqlen}, but tensor {split.value!r} has only {columns} columns")
    without = 0 if bos is None or not bos.strict else int((tokens[:nsamples, 0].to(torch.int64) != bos.token).sum())
    if without:
        raise InputError(
            f"{path}: {without} rows of tensor {split.value!r} do not begin with BOS ({bos.token}), and token files "
            "are taken as they are; make it with BOS, or leave out --add_bos always"
        )
    return tokens[:nsamples, :seqlen].to(torch.int64).contiguous()


def _vocabulary_size(tokenizer) -> int:
    # Not len(tokenizer): ids may have gaps.
    return max(tokenizer.get_vocab().values()) + 1


def _check_vocabulary(tokens: Tensor, vocab_size: int | None, dataset: str) -> None:
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        vocabulary = "any vocabulary" if vocab_size is None else f"the vocabulary of {vocab_size}"
        raise InputError(
            f"{dataset}: token id {low if low < 0 else high} is outside {vocabulary}; "
            "the tokens are not of this model's tokenizer"
        )
