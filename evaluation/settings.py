"""The flags of evaluation, and the registry: the entries among the fields of `EvaluationSettings`."""

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from evaluation.base import Context, Entry, Evaluation, Figure, Kind
from evaluation.mmlu.settings import MMLUSettings
from evaluation.mtbench.settings import MTBenchSettings
from evaluation.tasks.settings import TaskSettings
from utils.errors import InputError
from utils.flags import NAME_LIST, refuse_idle
from utils.settings import Changes, option, part


@dataclass(frozen=True)
class PerplexitySettings(Entry):
    """Perplexity and KL divergence, on which text."""

    TITLE: ClassVar[str] = "evaluation, perplexity"
    FLAG: ClassVar[str] = "--eval_ppl"
    STAGE: ClassVar[str] = "perplexity"
    EMPTY: ClassVar[dict[str, object]] = {"perplexity": {}, "perplexity_details": {}, "bos_check": {}}
    NEEDS_WHOLE_MODEL: ClassVar[bool] = False

    eval_ppl: bool = option(
        False,
        "measure perplexity",
        changes=Changes.FIGURES,
        basic="measure perplexity",
    )
    test_dataset: tuple[str, ...] = option(
        ("wikitext2",),
        "one or more, separated by spaces or commas: wikitext2, ptb, c4, c4-new, or as for --calib_dataset "
        "(a token file's tensor is `test`) (default: wikitext2)",
        changes=Changes.FIGURES,
        basic="on which text, as for --calib_dataset (default: wikitext2)",
        **NAME_LIST,
    )
    eval_kl: bool = option(
        False, "also the KL divergence from the full-precision model, per token", changes=Changes.FIGURES
    )

    def __post_init__(self):
        if self.eval_kl and not self.eval_ppl:
            raise InputError("--eval_kl is measured with perplexity: add --eval_ppl")

    @property
    def asked(self) -> bool:
        """Whether it is to be measured."""
        return self.eval_ppl

    def open(self, context: Context, common: "EvaluationSettings") -> Sequence[Evaluation]:
        """One evaluation for every dataset, and where its windows lack BOS a look at what that costs."""
        from evaluation.bos import open_bos_checks
        from evaluation.perplexity import open_perplexities

        perplexities = open_perplexities(self, context, common)
        return [*perplexities, *open_bos_checks(perplexities, self, context, common)]

    @classmethod
    def figures(cls, results: dict) -> Iterator[Figure]:
        """Perplexity and divergence of every dataset."""
        short = {label: {"perplexity": value} for label, value in (results.get("perplexity") or {}).items()}
        for label, result in results.get("perplexity_details", short).items():
            value = math.nan if result["perplexity"] is None else result["perplexity"]
            yield Figure(f"{label} ppl", value, Kind.PERPLEXITY, label, lower_is_better=True)
            if result.get("divergence") is not None:
                yield Figure(f"{label} KL", result["divergence"], label=label, lower_is_better=True)


@dataclass(frozen=True)
class SensitivitySettings(Entry):
    """What the rounding of each part of the model costs.

    Every variant keeps hidden states of its own for each window, so there is a default. Shares of the gap are ratios of
    small differences: of the bundled model's KL divergence those of the roles added up to 180% on 2048 tokens and to
    120% on 32 000, which is what 16 windows of the usual length have.
    """

    TITLE: ClassVar[str] = "evaluation, sensitivity"
    FLAG: ClassVar[str] = "--sensitivity"
    STAGE: ClassVar[str] = "sensitivity"
    EMPTY: ClassVar[dict[str, object]] = {"sensitivity": {}}
    NEEDS_WHOLE_MODEL: ClassVar[bool] = False
    WINDOWS: ClassVar[int] = 16

    sensitivity: bool = option(
        False,
        "perplexity and KL with each role (weights, inputs, q, k, v), each group of linears and each layer left at 16 "
        "bits in turn, on the first --test_dataset: which bit to spend",
        changes=Changes.FIGURES,
    )
    sensitivity_windows: int = option(
        WINDOWS, f"on how many of its windows (default: {WINDOWS})", changes=Changes.FIGURES
    )

    def __post_init__(self):
        require_positive("sensitivity_windows", self.sensitivity_windows)
        other = self.sensitivity_windows != self.WINDOWS
        refuse_idle("sensitivity", self.sensitivity, sensitivity_windows=other)

    @property
    def asked(self) -> bool:
        """Whether it is to be measured."""
        return self.sensitivity

    def open(self, context: Context, common: "EvaluationSettings") -> Sequence[Evaluation]:
        """One evaluation, of the first test dataset."""
        from evaluation.sensitivity import Sensitivity

        return [Sensitivity(self, context, common)]

    @classmethod
    def figures(cls, results: dict) -> Iterator[Figure]:
        """None: it has a table of its own."""
        return iter(())


@dataclass(frozen=True)
class PromptSettings(Entry):
    """What the models complete."""

    FLAG: ClassVar[str] = "--prompt"
    STAGE: ClassVar[str] = "prompts"
    EMPTY: ClassVar[dict[str, object]] = {"completions": {}}

    prompt: tuple[str, ...] = option(
        (), "let both models complete these, and show it", changes=Changes.FIGURES, basic=True
    )

    @property
    def asked(self) -> bool:
        """Whether there are prompts."""
        return bool(self.prompt)

    def open(self, context: Context, common: "EvaluationSettings") -> Sequence[Evaluation]:
        """All prompts as one evaluation."""
        from evaluation.generation import Completions

        return [Completions(self, context, common)]

    @classmethod
    def figures(cls, results: dict) -> Iterator[Figure]:
        """None: it is text."""
        return iter(())


@dataclass(frozen=True)
class TextSettings:
    """Text that the model writes."""

    TITLE: ClassVar[str] = "evaluation, prompts and MT-Bench"

    prompts: PromptSettings = part(PromptSettings)
    max_new_tokens: int | None = option(
        None, "most tokens of a completion (default: 64) or an answer (default: 1024)", changes=Changes.FIGURES
    )
    mtbench: MTBenchSettings = part(MTBenchSettings)

    def __post_init__(self):
        require_positive("max_new_tokens", self.max_new_tokens)


def batch_size(text: str) -> int | None:
    """The value of `--eval_batch_size`; None: what fits."""
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 nor auto")
    return None if text == "auto" else int(text)


def require_positive(flag: str, value: int | None) -> None:
    """Raise InputError for a number below 1."""
    if value is not None and value < 1:
        raise InputError(f"--{flag} {value}: must be at least 1")


class Runtime(StrEnum):
    """What the linears of a quantized model multiply while it is measured: see `duquant.runtime`."""

    REFERENCE = "reference"
    INTEGER = "integer"


class Expand(StrEnum):
    """When what they multiply is made of the packed codes."""

    ONCE = "once"
    PER_CALL = "per_call"


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, on what, and how it is run. To register an evaluation, add its entry here."""

    TITLE: ClassVar[str] = "evaluation"

    limit: int | None = option(
        None, "only this many windows, items of a task, questions of a subject", changes=Changes.FIGURES, basic=True
    )
    eval_batch_size: int | None = option(
        None,
        "sequences, conversations or prompts at a time, or auto: what fits (default: auto)",
        changes=Changes.NOTHING,
        type=batch_size,
    )
    runtime: Runtime = option(
        Runtime.REFERENCE,
        "what the quantized model's linears multiply while it is measured: decoded weights (reference: figures are the "
        "same to the bit wherever it is measured), or integers where a kernel serves the device (faster on a CPU; the "
        "same but for the rounding of floats)",
        changes=Changes.FIGURES,
    )
    expand: Expand = option(
        Expand.ONCE,
        "when a whole model's packed weights are made into what is multiplied: once takes more memory, per_call more "
        "time",
        changes=Changes.NOTHING,
    )
    multigpu: bool = option(
        False, "spread the model over all GPUs for tasks, MMLU, MT-Bench and prompts", changes=Changes.NOTHING
    )
    max_memory: tuple[str, ...] = option(
        (),
        "with --multigpu: as 0=20GiB 1=20GiB cpu=60GiB",
        changes=Changes.NOTHING,
        metavar="DEVICE=SIZE",
    )
    perplexity: PerplexitySettings = part(PerplexitySettings)
    sensitivity: SensitivitySettings = part(SensitivitySettings)
    tasks: TaskSettings = part(TaskSettings)
    mmlu: MMLUSettings = part(MMLUSettings)
    text: TextSettings = part(TextSettings)

    def __post_init__(self):
        require_positive("limit", self.limit)
        refuse_idle("multigpu", self.multigpu, max_memory=self.max_memory)

    def asked(self) -> list[Entry]:
        """The entries of what is to be measured, in order."""
        return [entry for entry in _held(self) if entry.asked]


def entries(settings: type = EvaluationSettings) -> list[type[Entry]]:
    """Every registered entry, in order."""
    return [type(entry) for entry in _held(settings())]


def _held(settings: Any) -> Iterator[Entry]:
    """The entries among the parts of settings, and the parts of parts."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Entry):
            yield value
        elif dataclasses.is_dataclass(value):
            yield from _held(value)
