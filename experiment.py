"""One experiment of main.py: check, load, quantize, evaluate, and leave the figures."""

import argparse
import enum
import logging
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from evaluation.perplexity import Perplexity, perplexity
from options import BASELINES
from quantize.config import QuantConfig, SmoothConfig, Transform
from quantize.layer import LayerReport
from quantize.statistics import channel_statistics, load_scales, same_calibration, save_statistics
from quantize.walk import check_shapes, quantize_model
from session import Setup, make_setup, open_model
from utils import data
from utils.device import describe, peak_memory
from utils.errors import InputError
from utils.io import write_json
from utils.log import add_log_file
from utils.results import finite_or_none, format_table, versions

logger = logging.getLogger(__name__)


@dataclass
class Measured:
    """Figures of one way to run the model: perplexity by dataset label, wall seconds by stage, figures per layer."""

    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)

    @contextmanager
    def timing(self, stage: str):
        """Add the wall time of the block to `seconds[stage]`."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class Run:
    """One run, checked: flags, model and calibration data, the method's settings, test windows, output folder."""

    args: argparse.Namespace
    setup: Setup
    quant: QuantConfig
    tests: dict[str, Tensor]
    folder: Path


def run_experiment(args: argparse.Namespace, quant: QuantConfig) -> None:
    """Check everything, quantize, measure, write results.json. Raises InputError for what a user can mend."""
    run = prepare(args, quant)
    add_log_file(run.folder / "log.txt")
    logger.info("%s", shlex.join(["python", *sys.argv]))
    logger.info("%s on %s, %s", run.setup.source.name, describe(run.setup.device), run.setup.dtype)
    started = time.perf_counter()

    measured, baselines = Measured(), {}
    with measured.timing("load"):
        model = open_model(run.setup, run.args.attn_implementation)
    peaks = activation_peaks(run, model, measured)
    if "full" in run.args.baselines:
        baselines["full"] = Measured()
        evaluate_(run, model, baselines["full"], BASELINES["full"])
    quantize_(run, model, run.quant, peaks, measured)
    evaluate_(run, model, measured, run.quant.label)
    del model
    write_results(run, measured, baselines, started)
    for name in (name for name in ("rtn", "smooth") if name in run.args.baselines):
        baselines[name] = measure_baseline(run, name, peaks)
    write_results(run, measured, baselines, started)
    if run.tests and run.args.eval_ppl:
        logger.info("\n%s\n", summary_table(run, measured, baselines))
    logger.info("results: %s", run.folder / "results.json")


def prepare(args: argparse.Namespace, quant: QuantConfig) -> Run:
    """Check the flags against the model's shapes and the data, before any weight is loaded."""
    setup = make_setup(args)
    check_shapes(setup.skeleton, setup.spec, quant)
    run = Run(args, setup, quant, {}, args.output_dir / f"{setup.net}_{quant.label}")
    if args.eval_ppl:
        run.tests.update(test_windows(args, setup))
    if args.act_scales is not None:
        load_scales(args.act_scales, setup.origin(), setup.skeleton, setup.spec)
    return run


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


def activation_peaks(run: Run, model: nn.Module, measured: Measured) -> dict[str, Tensor] | None:
    """Channel peaks for smoothing: from the file if it is of this model and data, else computed (and kept if new)."""
    if run.quant.smooth is None and "smooth" not in run.args.baselines:
        return None
    args, setup, origin = run.args, run.setup, run.setup.origin()
    path = args.act_scales or Path("act_scales") / f"{setup.net}.safetensors"
    if args.act_scales is not None or (path.exists() and same_calibration(path, origin)):
        logger.info("activation statistics: %s", path)
        return load_scales(path, origin, setup.skeleton, setup.spec)
    with measured.timing("statistics"):
        statistics = channel_statistics(model, setup.spec, setup.tokens, setup.device)
    if path.exists():
        logger.info("activation statistics: computed; %s is of another model or other data and was left alone", path)
    else:
        shifts = args.act_shifts or Path("act_shifts") / f"{setup.net}.safetensors"
        save_statistics(statistics, path, shifts, origin)
        logger.info("activation statistics: computed, kept in %s", path)
    return statistics.scales


def quantize_(
    run: Run, model: nn.Module, quant: QuantConfig, peaks: dict[str, Tensor] | None, measured: Measured
) -> None:
    """Quantize `model` in place, unless 16 bits on both sides ask for nothing."""
    if quant.bits.untouched:
        logger.info("16-bit weights and activations: nothing to quantize")
        return
    with measured.timing("quantize"):
        setup = run.setup
        measured.layers = quantize_model(model, setup.spec, setup.tokens, peaks, quant, setup.device)


def evaluate_(run: Run, model: nn.Module, measured: Measured, title: str) -> None:
    """Measure perplexity on every test dataset."""
    for label, tokens in run.tests.items():
        with measured.timing("perplexity"):
            result = perplexity(model, run.setup.spec, tokens, run.setup.device, f"{label} perplexity")
        measured.perplexity[label] = result
        counted = f"{result.windows} windows of {result.tokens_per_window} tokens"
        logger.info("%s, %s: perplexity %.4f (%.4f nats, %s)", title, label, result.perplexity, result.nats, counted)


def measure_baseline(run: Run, name: str, peaks: dict[str, Tensor] | None) -> Measured:
    """Quantize a fresh copy of the model without the transform (and, for `rtn`, without smoothing), and measure it."""
    smooth = None if name == "rtn" else run.quant.smooth or SmoothConfig(run.args.alpha, run.args.smooth_weight_peak)
    measured = Measured()
    with measured.timing("load"):
        model = open_model(run.setup, run.args.attn_implementation)
    quantize_(run, model, replace(run.quant, transform=Transform.NONE, smooth=smooth), peaks, measured)
    evaluate_(run, model, measured, BASELINES[name])
    return measured


def write_results(run: Run, measured: Measured, baselines: dict[str, Measured], started: float) -> None:
    """Write results.json."""
    resolved = {"nsamples": len(run.setup.tokens), "seqlen": run.setup.seqlen, "net": run.setup.net}
    settings = {key: _plain(value) for key, value in {**vars(run.args), **resolved}.items()}
    results = {
        "settings": settings,
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "device": describe(run.setup.device),
        "dtype": str(run.setup.dtype).removeprefix("torch."),
        "data": {"calibration": data.data_fingerprint(run.setup.tokens)},
        **_figures(measured),
        **peak_memory(run.setup.device),
        "layers": [asdict(report) for report in measured.layers],
        "baselines": {name: _figures(baseline) for name, baseline in baselines.items()},
    }
    results["seconds"]["total"] = time.perf_counter() - started
    write_json(run.folder / "results.json", results)


def _figures(measured: Measured) -> dict:
    return {
        "perplexity": {label: finite_or_none(result.perplexity) for label, result in measured.perplexity.items()},
        "perplexity_details": {
            label: {key: finite_or_none(value) for key, value in asdict(result).items()}
            for label, result in measured.perplexity.items()
        },
        "seconds": dict(measured.seconds),
    }


def _plain(value: object) -> object:
    """A flag's value as JSON."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def summary_table(run: Run, measured: Measured, baselines: dict[str, Measured]) -> str:
    """Perplexity and seconds of the baselines and of the run itself, as a Markdown table."""
    bits = run.quant.label.upper()
    rows = [
        (BASELINES[name], "–" if name == "full" else bits, baselines[name]) for name in BASELINES if name in baselines
    ]
    rows.append((method_name(run.quant), bits, measured))
    header = ["", "bits", *(f"{label} ppl" for label in run.tests), "quantize s", "evaluate s"]
    return format_table(header, [_table_row(title, bits, figures, run.tests) for title, bits, figures in rows])


def method_name(quant: QuantConfig) -> str:
    """What these settings are called in a table."""
    if quant.bits.untouched:
        return BASELINES["full"]
    if quant.transform is Transform.DUAL:
        return "DuQuant" if quant.smooth else "DuQuant without smoothing"
    return BASELINES["smooth" if quant.smooth else "rtn"]


def _table_row(title: str, bits: str, measured: Measured, labels: Iterable[str]) -> list[str]:
    quantized = f"{measured.seconds['quantize']:.1f}" if "quantize" in measured.seconds else "–"
    values = [f"{measured.perplexity[label].perplexity:.3f}" for label in labels]
    return [title, bits, *values, quantized, f"{measured.seconds['perplexity']:.1f}"]
