"""What an evaluation is: an `Entry` for the command line and for tables, and the `Evaluation` that it opens.

To add one, write a module with both and name its entry in `evaluation.settings.EvaluationSettings`. Entries import no
torch, so that scripts answer `--help`, and results are read, at once.
"""

import enum
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from evaluation.journal import Section
    from evaluation.settings import EvaluationSettings
    from quantize.spec import DecoderSpec
    from utils.memory import Allocate
    from utils.windows import Bos

FULL, QUANTIZED = "full", "quantized"  # rows: the full-precision model, main.py's own; others are compare.py's


class EvaluationError(RuntimeError):
    """Ends an evaluation; the message says in one line why, so that nobody needs a traceback."""


class Kind(enum.StrEnum):
    """What a figure measures."""

    PERPLEXITY = "perplexity"
    ACCURACY = "accuracy"
    SECONDS = "seconds"
    OTHER = "other"


@dataclass(frozen=True)
class Figure:
    """One number that was measured of a model, as tables have it.

    `heading`: of its column. `label`: the dataset or task alone. `error`: standard error, if it has one. `compact`:
    whether a table with little room shows it. A value that is not finite is NaN.
    """

    heading: str
    value: float
    kind: Kind = Kind.OTHER
    label: str = ""
    error: float | None = None
    compact: bool = True
    decimals: int = 3
    lower_is_better: bool = False


@dataclass(frozen=True)
class Context:
    """What an evaluation may know of a run: its model without the weights, and where that computes.

    `model`: as it was named to the run. `longest`: the most tokens it can read. `seqlen`: tokens per test window; of a
    token file's windows it is `given_seqlen`, None meaning their own length. `bos`: the tokenizer's, if it has one.
    """

    model: str
    config: "PretrainedConfig"
    spec: "DecoderSpec"
    tokenizer: "PreTrainedTokenizerBase"
    device: "torch.device"
    longest: int
    seqlen: int
    given_seqlen: int | None
    seed: int
    cache_dir: Path
    bos: "Bos | None" = None


class Passenger(Protocol):
    """What goes through a model's decoder layers, one after the other."""

    def visit(self, index: int, layer: "nn.Module") -> None:
        """Layer `index` is on the device."""


@dataclass(frozen=True)
class Candidate:
    """A model that is measured by one evaluation, which keeps what is done in `journal`.

    `row`: its name in files; `title`: in the log. `folder`: of the whole run. `model_id`: what signs its answers.
    `identity`, which JSON can hold: what decides its weights and its rounding. `student`: the journal of the run's own
    model for the same evaluation. `walked`: the evaluation's passenger, if it went through the layers already. `full`:
    nothing of it is quantized.
    """

    row: str
    title: str
    folder: Path
    model_id: str
    identity: object
    journal: "Section"
    student: "Section"
    walked: Passenger | None = None
    full: bool = False


@dataclass(frozen=True)
class Finding:
    """A part of what an evaluation found: what it adds to results.json, and what the log says of it.

    `failures`: by name, what ended a part of it although the rest went on. `shown`: the text is all that a user gets to
    see of it, so a quiet console shows it too.
    """

    results: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    shown: bool = False


class Evaluation(ABC):
    """One evaluation, its data read and checked: the constructor raises InputError for what is wrong with them.

    `name`: by which failures are told, and under which the journal keeps it. `windows`: number and length of the token
    windows that go through the layers for it, if it has such a passenger. `variants`: of the run's own model, how many
    versions go through all layers, and how many are the quantized one up to a layer of their own. `teaches`: whether
    the full-precision model must be measured first, because others are compared with what it gives. `advises`: it has
    no figure of its own, so what was measured without it is whole.
    """

    windows: tuple[int, int] | None = None
    variants: tuple[int, int] = (1, 0)
    teaches: bool = False
    advises: bool = False

    def __init__(self, name: str, entry: "Entry"):
        self.name, self.entry = name, entry

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """What its figures depend on beside the model, as JSON has it: contents, and never where a file lies."""

    @abstractmethod
    def run(self, model: "nn.Module", candidate: Candidate) -> Iterator[Finding]:
        """Measure `model`, and tell what is found as soon as it is.

        If the entry NEEDS_WHOLE_MODEL, it is placed where it can run. Every process makes the same call.
        """

    def check(self, candidate: Candidate) -> None:  # noqa: B027 - most have nothing to check
        """Raise InputError if what is in the run's folder already is of another model. No weights are loaded yet."""

    def for_comparison(self, shown: bool) -> bool:
        """Whether the full-precision model is measured even if it is no row; `shown`: a report will show it beside."""
        return shown

    def rides(self, candidate: Candidate) -> bool:
        """Whether a passenger must go through the layers of this candidate: there is one, and the journal lacks it."""
        return False

    def passenger(self, model: "nn.Module", candidate: Candidate, allocate: "Allocate") -> Passenger:
        """What goes through the layers of `model`, whose layers need no weights yet; later it is `candidate.walked`.

        If it is a `quantize.observer.Observer` too, it is told what is rounded.
        """
        raise NotImplementedError(f"{self.name} has no passenger")


class Entry(ABC):
    """The settings of one kind of evaluation (a subclass is a frozen dataclass), and how its results are read.

    FLAG asks for it. STAGE is what the time that it takes is counted under. EMPTY has its keys in results.json where
    it measured nothing.
    """

    FLAG: ClassVar[str]
    STAGE: ClassVar[str]
    EMPTY: ClassVar[dict[str, object]]
    NEEDS_WHOLE_MODEL: ClassVar[bool] = True

    @property
    @abstractmethod
    def asked(self) -> bool:
        """Whether it is to be done."""

    @abstractmethod
    def open(self, context: Context, common: "EvaluationSettings") -> Sequence[Evaluation]:
        """The evaluations that are asked for, checked. `common`: the settings of all. Raises InputError."""

    @classmethod
    @abstractmethod
    def figures(cls, results: dict) -> Iterator[Figure]:
        """The figures in `results` (a results.json, perhaps an older one, or its part on one model)."""


def digest(value: object) -> str:
    """16 hex digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
