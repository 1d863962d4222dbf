"""One evaluation after the other, of every model of a run. What they are is none of its business."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import nn

from duquant.linear import expanded
from evaluation.base import FULL, QUANTIZED, Candidate, Context, Evaluation, EvaluationError, Passenger, digest
from evaluation.journal import Journal, Section
from evaluation.measured import Measured
from evaluation.settings import EvaluationSettings, Expand, Runtime
from quantize.observer import Observer
from quantize.spec import InputGroup
from utils.distributed import world_size
from utils.errors import InputError, noting
from utils.log import RESULT
from utils.memory import Allocate
from utils.placement import Memory, parse_memory, placed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluations:
    """What is measured of every model, all data read and checked, and where a whole model is meanwhile.

    `spread`: over all GPUs, each within its part of `limits`. `integers`: linears multiply codes where a kernel serves
    them. `keep`: what is made of a whole model's codes is kept.
    """

    members: tuple[Evaluation, ...]
    context: Context
    spread: bool = False
    limits: Memory | None = None
    integers: bool = False
    keep: bool = True

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """Number and length of the token windows of each that sends some through the layers of the full model."""
        return tuple(each.windows for each in self.members if each.windows is not None and not each.advises)

    @property
    def own_windows(self) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """The same of the run's own model, each window once per variant: those from the first layer on, and others."""
        sending = [each for each in self.members if each.windows is not None and not each.advises]
        return tuple(
            tuple((each.windows[0] * each.variants[kind], each.windows[1]) for each in sending if each.variants[kind])
            for kind in (0, 1)
        )

    @property
    def need_whole_model(self) -> bool:
        """Whether one of them needs more than a layer at a time."""
        return any(each.entry.NEEDS_WHOLE_MODEL for each in self.members)

    def identity(self) -> dict[str, dict]:
        """By name, what their figures depend on beside the model."""
        return {each.name: each.identity() for each in self.members if not each.advises}

    def for_comparison(self, shown: bool) -> "Evaluations":
        """What the full-precision model is measured for even if it is no row; `shown`: a report shows it beside."""
        return replace(self, members=tuple(each for each in self.members if each.for_comparison(shown)))

    def teaching(self) -> "Evaluations":
        """Those that compare what a model gives with what the full-precision model gave, which was measured first."""
        return replace(self, members=tuple(each for each in self.members if each.teaches))


def open_evaluations(settings: EvaluationSettings, context: Context, missing: list[str] | None = None) -> Evaluations:
    """Read and check the data of all that is asked for. Raises InputError for what is wrong with them.

    With a list for it, what is only `missing` is noted there, and its evaluations are left out.
    """
    members: list[Evaluation] = []
    for entry in settings.asked():
        with noting(missing, entry.FLAG):
            members += entry.open(context, settings)
    integers, keep = settings.runtime is Runtime.INTEGER, settings.expand is Expand.ONCE
    limits = parse_memory(list(settings.max_memory)) or None
    return Evaluations(tuple(members), context, settings.multigpu, limits, integers, keep)


@dataclass
class Runner:
    """Measures the models of one run; what they answered goes into `folder`, signed with `model_id`.

    `model_identity`, which JSON can hold: what decides every figure of the run's own model but the evaluation. What the
    journal has is not measured again. `own_is_full`: nothing of the run's own model is quantized.
    """

    evaluations: Evaluations
    journal: Journal
    folder: Path
    model_id: str
    model_identity: object
    own_is_full: bool = False
    aboard: dict[str, "Travellers"] = field(default_factory=dict, repr=False)

    def check(self, rows: Iterable[str]) -> None:
        """Raise InputError if what is in the folder already is not of these models."""
        for row in rows:
            for evaluation in self.evaluations.members:
                evaluation.check(self._candidate(evaluation, row))

    def for_comparison(self, shown: bool) -> "Runner":
        """The same, for what the full-precision model is measured for anyway; `shown`: a report shows it beside."""
        return replace(self, evaluations=self.evaluations.for_comparison(shown), aboard={})

    def part(self, whole: bool) -> "Runner":
        """The same, for what needs the model as a whole, or for the rest."""
        members = tuple(each for each in self.evaluations.members if each.entry.NEEDS_WHOLE_MODEL is whole)
        return replace(self, evaluations=replace(self.evaluations, members=members))

    def tokens(self, row: str) -> int:
        """How many tokens' hidden states `board` holds for this row."""
        riding = self._riding(row)
        return sum(math.prod(each.windows) * (1 if row == FULL else sum(each.variants)) for each in riding)

    def board(self, model: nn.Module, measured: Measured, row: str, allocate: Allocate | None = None) -> "Travellers":
        """What goes through the layers of `model` for the evaluations of `row`, one passenger for all of them.

        Its layers need no weights yet. `measure` takes the scores from where the travellers arrived.
        """

        def begin(each: Evaluation) -> Passenger:
            return each.passenger(model, self._candidate(each, row), allocate)

        self.aboard[row] = Travellers(
            measured, {each: partial(begin, each) for each in self._riding(row)}, self.evaluations.integers
        )
        return self.aboard[row]

    def measure(self, model: nn.Module, measured: Measured, row: str, title: str) -> None:
        """Run every evaluation on `model`; figures go into `measured`, and so does what ended one of them early."""
        whole = [each for each in self.evaluations.members if each.entry.NEEDS_WHOLE_MODEL]
        for evaluation in self.evaluations.members:
            if evaluation not in whole:
                self._run(evaluation, model, measured, row, title)
        if whole:
            with attempt(measured, "placing the model", "placing"), self._placed(model):
                for evaluation in whole:
                    self._run(evaluation, model, measured, row, title)

    def _run(self, evaluation: Evaluation, model: nn.Module, measured: Measured, row: str, title: str) -> None:
        if evaluation.name in measured.failures:  # on its way through the layers
            return
        walked = self.aboard[row].take(evaluation) if row in self.aboard else None
        candidate = self._candidate(evaluation, row, title, walked)
        with attempt(measured, evaluation.name, evaluation.entry.STAGE):
            for finding in evaluation.run(model, candidate):
                measured.add(finding.results)
                measured.failures |= finding.failures
                if finding.text:
                    level = RESULT if finding.shown else logging.INFO
                    logger.log(level, "%s%s%s", title, "\n" if "\n" in finding.text else ", ", finding.text)

    def _riding(self, row: str) -> list[Evaluation]:
        return [each for each in self.evaluations.members if each.rides(self._candidate(each, row))]

    def _candidate(
        self, evaluation: Evaluation, row: str, title: str = "", walked: Passenger | None = None
    ) -> Candidate:
        return Candidate(
            row=row,
            title=title,
            folder=self.folder,
            model_id=self.model_id,
            identity=self.model_identity,
            journal=self._section(evaluation, row),
            student=self._section(evaluation, QUANTIZED),
            walked=walked,
            full=row == FULL or (row == QUANTIZED and self.own_is_full),
        )

    def _section(self, evaluation: Evaluation, row: str) -> Section:
        """What the journal has of this evaluation: with other data it is another one."""
        return self.journal.under(f"{row}/{evaluation.name}/{digest(evaluation.identity())}")

    @contextmanager
    def _placed(self, model: nn.Module) -> Iterator[None]:
        """`model` is where it can run; on one device what is made of its codes is kept: every token needs all of it."""
        how = self.evaluations
        keep = how.keep and not how.spread
        with placed(model, how.context.device, how.spread, how.limits), expanded(model, how.integers, keep):
            yield


class Travellers(Observer):
    """The passengers that evaluations send through a model's layers, as one; who fails is recorded and gets off.

    Those that are observers are told what is rounded in the layer that they visit next.
    """

    def __init__(self, measured: Measured, riding: dict[Evaluation, Callable[[], Passenger]], integers: bool = False):
        self._measured, self._integers = measured, integers
        self._aboard: dict[Evaluation, Passenger] = {}
        for evaluation, begin in riding.items():
            with measured.timing(evaluation.entry.STAGE):
                self._aboard[evaluation] = begin()

    def visit(self, index: int, layer: nn.Module) -> None:
        """Layer `index` is on the device."""
        with expanded(layer, self._integers):
            self._let(lambda passenger: passenger.visit(index, layer))

    def rounding(self, group: InputGroup, path: str, linear: nn.Module) -> None:
        """The linear at `path` is about to be rounded."""
        self._let(lambda passenger: isinstance(passenger, Observer) and passenger.rounding(group, path, linear))

    def _let(self, act: Callable[[Passenger], object]) -> None:
        for evaluation, passenger in list(self._aboard.items()):
            with attempt(self._measured, evaluation.name, evaluation.entry.STAGE):
                act(passenger)
            if evaluation.name in self._measured.failures:
                del self._aboard[evaluation]

    def take(self, evaluation: Evaluation) -> Passenger | None:
        """Who arrived for the evaluation: then it leaves."""
        return self._aboard.pop(evaluation, None)


@contextmanager
def attempt(measured: Measured, name: str, stage: str) -> Iterator[None]:
    """An evaluation that fails is recorded and does not end the others; with several processes it ends all."""
    try:
        with measured.timing(stage):
            yield
    except Exception as error:
        if world_size() > 1:
            raise
        if isinstance(error, (InputError, EvaluationError)):
            logger.error("%s: %s", name, error)
        else:
            logger.exception("%s failed", name)
        measured.failures[name] = f"{type(error).__name__}: {error}"
