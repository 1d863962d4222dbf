"""Zero-shot and few-shot accuracy on lm-eval's tasks, with its own prompts and metrics, one task after the other."""

import contextlib
import io
import json
import logging
import math
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from evaluation.journal import Journal
from evaluation.tasks.plan import PAPER_TASKS, TaskPlan, quiet_logger, task_manager
from evaluation.tasks.scores import TaskScore, ZeroShot, mean_of, summary
from utils.distributed import gather, is_main, together
from utils.documents import in_short
from utils.errors import InputError
from utils.io import write_atomically
from utils.log import shows_bars
from utils.results import plain

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from evaluation.tasks.harness import PlacedLM

BATCH_SIZE_CPU = 16
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # lm-eval's own
HUB_PATIENCE = 5  # seconds for the hub to answer at all; its client would go on trying for half a minute per task

logger = logging.getLogger(__name__)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    plan: TaskPlan,
    *,
    device: torch.device,
    batch_size: int | None,
    limit: int | None,
    journal: Journal,
    log_samples: Path | None = None,
) -> ZeroShot:
    """Evaluate `model`, which is on `device` (or spread over several, beginning there) and stays as it is.

    `batch_size` None is 16 on a CPU and found by lm-eval on a GPU; `limit` takes the first items of every task. What
    the journal holds is not done again. A task that fails is logged and returned in `failed`; it is tried again when
    the evaluation is. `log_samples`: folder for samples_<task>.jsonl, a line per item. Seeds Python's, numpy's and
    torch's generators, as lm-eval does. Every process must make the same call.
    """
    from evaluation.tasks.harness import PlacedLM

    if batch_size is None:
        batch_size = "auto" if device.type == "cuda" else BATCH_SIZE_CPU
    with _quiet():
        lm = PlacedLM(model, tokenizer, device, batch_size)
    manager = task_manager(plan)
    scores: list[TaskScore] = []
    failed: dict[str, str] = {}
    with _hub_that_answers(any(map(plan.from_hub, plan.units))):
        for unit in plan.units:
            unit_scores = _kept(journal, unit, plan, log_samples)
            if unit_scores is None:
                try:
                    unit_scores = _evaluate_unit(lm, manager, unit, plan, limit, log_samples)
                except InputError:
                    raise
                except Exception as error:
                    failed[unit] = _report(unit, error)
                    continue
                journal.keep(f"task:{unit}", [asdict(score) for score in unit_scores])
                logger.info(summary(unit_scores[0], lm.max_length))
            scores += unit_scores
    return ZeroShot(tuple(scores), failed, mean_of(scores, PAPER_TASKS), limit, dict(SEEDS))


def samples_path(folder: Path, task: str) -> Path:
    """Where the items of a task are logged."""
    return folder / f"samples_{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}.jsonl"


class _NotDownloadedError(Exception):
    """The items of a task could not be fetched."""


def _evaluate_unit(
    lm: "PlacedLM", manager: "TaskManager", unit: str, plan: TaskPlan, limit: int | None, log_samples: Path | None
) -> list[TaskScore]:
    """Scores of one task, or of a group and its members."""
    from lm_eval.evaluator import evaluate

    started = time.monotonic()
    lm.cut, lm.label, lm.screen = 0, unit, sys.stderr
    loaded: dict = {}
    with _quiet(bars=shows_bars()):  # of downloads
        together(lambda: loaded.update(_load(manager, unit, plan)))  # nobody begins if somebody could not load
    with _quiet():
        _seed_(loaded["tasks"].values(), plan.num_fewshot)
        results = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=log_samples is not None)
    if log_samples is not None and is_main():
        for task, samples in results["samples"].items():
            _write_samples(samples_path(log_samples, task), samples)
    return _scores(results, unit, time.monotonic() - started, lm.cut)


def _load(manager: "TaskManager", unit: str, plan: TaskPlan) -> dict:
    """lm-eval's task objects of a unit, items included."""
    try:
        return manager.load([unit])
    except OSError as error:
        if not plan.from_hub(unit):
            raise
        reason = in_short(error)
        raise _NotDownloadedError(f"its dataset cannot be downloaded ({reason}); use --task_data_dir") from error


def _seed_(tasks: Iterable, num_fewshot: int | None) -> None:
    """Fix what is random, and the number of examples, as lm-eval's own front end does."""
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])  # noqa: NPY002 (what tasks draw from)
    torch.manual_seed(SEEDS["torch"])
    for task in tasks:
        own = task.get_config("num_fewshot")
        shots = own if own == 0 or num_fewshot is None else num_fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])


def _scores(results: dict, unit: str, seconds: float, cut: int) -> list[TaskScore]:
    """lm-eval's figures, those of the unit itself first."""
    scores = []
    for name, values in sorted(results["results"].items(), key=lambda entry: entry[0] != unit):
        metrics = {
            key.removesuffix(",none"): float(value)
            for key, value in values.items()
            if "," in key and isinstance(value, (int, float)) and math.isfinite(value)
        }
        if metrics:
            version, shots = results["versions"].get(name), results["n-shot"].get(name)
            scores.append(
                TaskScore(
                    task=name,
                    metrics=metrics,
                    items=values.get("sample_len", 0),
                    version=None if version is None else str(version),
                    num_fewshot=shots,
                    seconds=seconds,
                    cut=cut,
                    group=None if name == unit else unit,
                )
            )
    if not scores:
        raise RuntimeError(f"lm-eval returned no figure for {unit}")
    return scores


def _kept(journal: Journal, unit: str, plan: TaskPlan, log_samples: Path | None) -> list[TaskScore] | None:
    """What the main process's journal has of a unit, if the log of its items, should one be wanted, is there too."""
    rows = journal.get(f"task:{unit}")
    if log_samples is not None and not all(samples_path(log_samples, task).exists() for task in plan.members[unit]):
        rows = None
    rows = gather(rows)[0]
    return None if rows is None else [TaskScore(**row) for row in rows]


def _report(unit: str, error: Exception) -> str:
    """Log why a unit failed, with the traceback unless the hub is to blame; return the reason, one line."""
    if isinstance(error, _NotDownloadedError):
        logger.error("%s: %s", unit, error)
        return str(error)
    reason = in_short(error)
    logger.exception("%s failed (%s); going on with the other tasks", unit, reason)
    return reason


def _write_samples(path: Path, samples: Sequence[dict]) -> None:
    """One JSON object per item; numbers that are not finite are null."""
    lines = [json.dumps(plain(sample), ensure_ascii=False, default=_as_json) + "\n" for sample in samples]
    write_atomically(path, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))


def _as_json(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


@contextlib.contextmanager
def _quiet(bars: bool = False) -> Iterator[None]:
    """Keep lm-eval, and what it calls, from talking: only errors, and `bars` if they are wanted.

    It prints and draws wherever it runs, so both streams are set aside; nothing of ours may be logged inside.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_logger("lm_eval"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not bars:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


@contextlib.contextmanager
def _hub_that_answers(needed: bool) -> Iterator[None]:
    """If the hub is needed and does not answer, use what is cached and do not ask again for every task."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if needed and not any(before):
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE)
        except Exception as error:  # whatever the hub's client is built on
            logger.warning("%s does not answer (%s); only cached datasets can be used", constants.ENDPOINT, error)
            datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
