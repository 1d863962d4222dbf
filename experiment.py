"""One experiment of main.py: check, load, quantize, evaluate, and leave the figures."""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from evaluation.perplexity import perplexity
from options import BASELINES
from outcome import Measured, Outcome, summary_table, write_results
from quantize.config import QuantConfig, SmoothConfig, Transform
from quantize.export import require_empty, save_model
from quantize.state import FinishedLayer
from quantize.statistics import channel_statistics, load_scales, same_calibration, save_statistics
from quantize.walk import check_shapes, quantize_model
from resuming import finished_layers, open_checkpoint, resume_command
from session import Run, Setup, make_setup, open_model
from utils import data
from utils.device import describe
from utils.errors import InputError
from utils.log import add_log_file

logger = logging.getLogger(__name__)


def run_experiment(args: argparse.Namespace, quant: QuantConfig) -> None:
    """Check everything, quantize, measure, write results.json. Raises InputError for what a user can mend.

    results.json is written whatever happens, with the error in it; only wrong input leaves what was there as it was.
    """
    run = prepare(args, quant)
    add_log_file(run.folder / "log.txt")
    logger.info("%s", shlex.join(["python", *sys.argv]))
    logger.info("%s on %s, %s", run.setup.source.name, describe(run.setup.device), run.setup.dtype)
    outcome = Outcome()
    try:
        execute(run, outcome)
    except InputError:
        raise
    except BaseException as error:
        outcome.error = f"{type(error).__name__}: {error}".rstrip(": ")
        write_results(run, outcome)
        if run.checkpoint is not None:
            logger.error("finished layers are kept; go on with: %s", resume_command(sys.argv, run.checkpoint.folder))
        raise
    write_results(run, outcome)
    if run.tests:
        logger.info("\n%s\n", summary_table(run, outcome.measured, outcome.baselines))
    logger.info("results: %s", run.folder / "results.json")


def execute(run: Run, outcome: Outcome) -> None:
    """Load, quantize, evaluate, and the baselines; figures go into `outcome` as they are found."""
    measured, baselines = outcome.measured, outcome.baselines
    with measured.timing("load"):
        model = open_model(run.setup, run.args.attn_implementation)
    if run.setup.saved is not None:
        logger.info("quantized already: %s", run.quant.label)
        evaluate_(run, model, measured, run.quant.label)
        return
    finished = finished_layers(run)
    peaks = activation_peaks(run, model, measured, needed=len(finished) < run.setup.layers)
    if "full" in run.args.baselines:
        baselines["full"] = Measured()
        evaluate_(run, model, baselines["full"], BASELINES["full"])
    quantize_(run, model, run.quant, peaks, measured, finished, run.checkpoint and run.checkpoint.keep)
    if run.args.save_model is not None:
        save_model(run.args.save_model, model, run.setup.tokenizer, run.setup.spec, run.quant)
        logger.info("model saved: %s", run.args.save_model)
    evaluate_(run, model, measured, run.quant.label)
    del model
    for name in (name for name in ("rtn", "smooth") if name in run.args.baselines):
        baselines[name] = measure_baseline(run, name, peaks)


def prepare(args: argparse.Namespace, quant: QuantConfig) -> Run:
    """Check the flags against the model's shapes and the data, before any weight is loaded."""
    setup = make_setup(args)
    if setup.saved is None:
        check_shapes(setup.skeleton, setup.spec, quant)
    else:
        quant = setup.saved
        refuse_for_saved(args)
    if args.save_model is not None:
        require_empty(args.save_model)
    tests = test_windows(args, setup) if args.eval_ppl else {}
    if args.act_scales is not None:
        load_scales(args.act_scales, setup.origin(), setup.skeleton, setup.spec)
    folder = args.output_dir / f"{setup.net}_{quant.label}"
    return Run(args, setup, quant, tests, folder, open_checkpoint(args, setup, quant))


def refuse_for_saved(args: argparse.Namespace) -> None:
    """Raise InputError for flags that make no sense for a model that is quantized already."""
    given = {"--act-scales": args.act_scales, "--baselines": args.baselines}
    given |= {"--save_dir": args.save_dir, "--resume": args.resume, "--save_model": args.save_model}
    for flag, value in given.items():
        if value:
            raise InputError(f"{flag}: {args.model} is quantized already and can only be evaluated; drop the flag")


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


def activation_peaks(run: Run, model: nn.Module, measured: Measured, needed: bool) -> dict[str, Tensor] | None:
    """Channel peaks for smoothing: from the file if it is of this model and data, else computed (and kept if new).

    None where nothing is smoothed, or no layer is left to be (`needed`).
    """
    if not (run.quant.smooth and needed) and "smooth" not in run.args.baselines:
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
        try:
            save_statistics(statistics, path, shifts, origin)
            logger.info("activation statistics: computed, kept in %s", path)
        except OSError as error:
            logger.warning("activation statistics: computed, not kept (%s)", error)
    return statistics.scales


def quantize_(
    run: Run,
    model: nn.Module,
    quant: QuantConfig,
    peaks: dict[str, Tensor] | None,
    measured: Measured,
    finished: dict[int, FinishedLayer] | None = None,
    keep: Callable[[int, FinishedLayer], None] | None = None,
) -> None:
    """Quantize `model` in place, unless 16 bits on both sides ask for nothing."""
    if quant.bits.untouched:
        logger.info("16-bit weights and activations: nothing to quantize")
        return
    with measured.timing("quantize"):
        setup = run.setup
        measured.layers = quantize_model(model, setup.spec, setup.tokens, peaks, quant, setup.device, finished, keep)


def evaluate_(run: Run, model: nn.Module, measured: Measured, title: str) -> None:
    """Measure perplexity on every test dataset."""
    for label, tokens in run.tests.items():
        with measured.timing("perplexity"):
            result = perplexity(model, run.setup.spec, tokens, run.setup.device, f"{label} perplexity")
        measured.perplexity[label] = result
        counted = f"{result.windows} windows of {result.tokens_per_window} tokens"
        logger.info("%s, %s: perplexity %.4f (%.4f nats, %s)", title, label, result.perplexity, result.nats, counted)


def baseline_config(quant: QuantConfig, smooth: SmoothConfig | None) -> QuantConfig:
    """The same quantizers without the transform, and without training."""
    return replace(quant, transform=Transform.NONE, smooth=smooth, clip=replace(quant.clip, learned=False))


def measure_baseline(run: Run, name: str, peaks: dict[str, Tensor] | None) -> Measured:
    """Quantize a fresh copy of the model without the transform (and, for `rtn`, without smoothing), and measure it."""
    smooth = None if name == "rtn" else run.quant.smooth or SmoothConfig(run.args.alpha, run.args.smooth_weight_peak)
    measured = Measured()
    with measured.timing("load"):
        model = open_model(run.setup, run.args.attn_implementation)
    quantize_(run, model, baseline_config(run.quant, smooth), peaks, measured)
    evaluate_(run, model, measured, BASELINES[name])
    return measured
