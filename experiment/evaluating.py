"""What main.py measures of a model: all checked before weights are loaded, then one evaluation after the other."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from evaluation.generation import complete
from evaluation.journal import Journal
from evaluation.perplexity import Perplexity, final_hidden, score
from experiment.measured import Measured
from experiment.session import Setup
from models.load import model_fingerprint
from utils import data
from utils.batching import BatchSize
from utils.distributed import world_size
from utils.errors import InputError
from utils.placement import Memory, parse_memory, placed

logger = logging.getLogger(__name__)

FULL, QUANTIZED = "full", "quantized"  # rows: the full-precision model, the run's own; others are baselines
# Flags that change nothing of what is found: where things are, and how much of it is asked for.
FREE_FLAGS = ("output_dir", "cache_dir", "save_dir", "resume", "save_model", "net", "baselines", "eval_ppl", "eval_kl")
FREE_FLAGS += ("test_dataset", "prompt", "multigpu", "max_memory", "eval_batch_size", "device", "offload_calibration")


@dataclass(frozen=True)
class Evaluations:
    """What is to be measured, read and checked: token windows [N, T] by dataset label, prompts, and where to run."""

    windows: dict[str, Tensor]
    divergence: bool
    prompts: tuple[str, ...]
    max_new_tokens: int
    batch_size: int | None
    spread: bool
    memory: Memory | None

    def for_comparison(self) -> "Evaluations":
        """The part that the full-precision model is needed for, whether or not it is in the table."""
        return replace(self, windows=self.windows if self.divergence else {})

    @property
    def empty(self) -> bool:
        """Whether there is nothing to measure."""
        return not (self.windows or self.prompts)


def plan_evaluations(args: argparse.Namespace, setup: Setup) -> Evaluations:
    """Read and check the data of every evaluation asked for. Raises InputError for what is wrong with it."""
    return Evaluations(
        windows=test_windows(args, setup) if args.eval_ppl else {},
        divergence=args.eval_kl,
        prompts=tuple(args.prompt),
        max_new_tokens=args.max_new_tokens,
        batch_size=args.eval_batch_size,
        spread=args.multigpu,
        memory=parse_memory(args.max_memory) or None,
    )


def test_windows(args: argparse.Namespace, setup: Setup) -> dict[str, Tensor]:
    """Token windows [N, T] of every test dataset, by label, cut to `--limit`."""
    windows: dict[str, Tensor] = {}
    for dataset in args.test_dataset:
        label = data.dataset_label(dataset)
        if label in windows:
            raise InputError(f"--test_dataset: two of them would be called {label}; rename a file or drop one")
        seqlen = args.seqlen if data.is_token_file(dataset) else setup.seqlen
        tokens = data.test_tokens(
            dataset, setup.tokenizer, seqlen=seqlen, cache_dir=args.cache_dir, vocab_size=setup.config.vocab_size
        )
        windows[label] = tokens[: args.limit]
    return windows


def open_journal(args: argparse.Namespace, setup: Setup, folder: Path) -> Journal:
    """What an unfinished run of the same model and calibration data with the same flags has found."""
    model = model_fingerprint(setup.source, setup.config)
    calibration = None if setup.tokens is None else data.data_fingerprint(setup.tokens)
    flags = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    journal = Journal(folder / "unfinished.jsonl", {"model": model, "calibration": calibration, "flags": flags})
    if len(journal):
        logger.info("an earlier run did not finish its evaluation; going on behind %d parts of it", len(journal))
    return journal


@dataclass
class Evaluator:
    """Measures the models of one run. `teachers`: what the full-precision one, measured first, gave before its head."""

    plan: Evaluations
    setup: Setup
    journal: Journal
    teachers: dict[str, Tensor] = field(default_factory=dict)

    def measure(self, model: nn.Module, measured: Measured, row: str, title: str) -> None:
        """Run every evaluation on `model`; figures go into `measured`, and so does what ended one of them early."""
        for label in self.plan.windows:
            with self._attempt(measured, f"perplexity {label}"), measured.timing("perplexity"):
                measured.perplexity[label] = self._perplexity(model, row, label)
                logger.info("%s, %s: %s", title, label, measured.perplexity[label])
        if self.plan.prompts:
            with self._attempt(measured, "evaluations"), self._placed(model):
                self._complete(model, measured)

    def for_comparison(self) -> "Evaluator":
        """The same, for what the full-precision model must be measured for anyway."""
        return replace(self, plan=self.plan.for_comparison())

    def _perplexity(self, model: nn.Module, row: str, label: str) -> Perplexity:
        tokens = self.plan.windows[label]
        key, later = (f"{name}/perplexity/{label}/{data.data_fingerprint(tokens)}" for name in (row, QUANTIZED))
        keep_hidden = self.plan.divergence and row == FULL and later not in self.journal
        if key in self.journal and not keep_hidden:
            return Perplexity(**self.journal.get(key))
        setup = self.setup
        batch_size = BatchSize.choose(self.plan.batch_size, tokens.shape[1], setup.device)
        hidden = final_hidden(model, setup.spec, tokens, setup.device, f"{label} perplexity", batch_size)
        result = score(model, setup.spec, tokens, hidden, setup.device, self.teachers.get(label))
        if keep_hidden:
            self.teachers[label] = hidden
        self.journal.keep(key, asdict(result))
        return result

    def _complete(self, model: nn.Module, measured: Measured) -> None:
        for prompt in self.plan.prompts:
            with self._attempt(measured, "prompt"), measured.timing("prompts"):
                setup, length = self.setup, self.plan.max_new_tokens
                measured.completions[prompt] = complete(model, setup.tokenizer, prompt, setup.device, length)

    def _placed(self, model: nn.Module):
        return placed(model, self.setup.device, self.plan.spread, self.plan.memory)

    @contextmanager
    def _attempt(self, measured: Measured, name: str) -> Iterator[None]:
        """An evaluation that fails is recorded and does not end the others; with several processes it ends all."""
        try:
            yield
        except Exception as error:
            if world_size() > 1:
                raise
            if isinstance(error, InputError):
                logger.error("%s: %s", name, error)
            else:
                logger.exception("%s failed", name)
            measured.failures[name] = f"{type(error).__name__}: {error}"
