"""One run of main.py: check, load, quantize, evaluate, and leave the figures."""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from experiment.evaluations import FULL, QUANTIZED, open_journal
from experiment.evaluator import Evaluator
from experiment.measured import Measured
from experiment.options import BASELINES
from experiment.outcome import Outcome, completions_text, method_name, summary_table, write_results
from experiment.plan import Run, prepare
from experiment.resuming import finished_layers, resume_command
from experiment.session import open_model
from quantize.config import QuantConfig, SmoothConfig, Transform
from quantize.export import save_model
from quantize.record import Recorder
from quantize.state import FinishedLayer
from quantize.statistics import channel_statistics, load_scales, same_calibration, save_statistics
from quantize.walk import quantize_model
from utils.device import describe
from utils.distributed import from_main, is_main, join_group, leave_group, make_equal_, world_size
from utils.errors import Incomplete, InputError
from utils.log import add_log_file

logger = logging.getLogger(__name__)


def run_experiment(args: argparse.Namespace, quant: QuantConfig) -> None:
    """Check everything, quantize, measure, write results.json. Raises InputError for what a user can mend.

    results.json is written whatever happens, with the error in it; only wrong input leaves what was there as it was.
    """
    join_group()
    run = prepare(args, quant)
    if is_main():
        add_log_file(run.folder / "log.txt")
    logger.info("%s", shlex.join(["python", *sys.argv]))
    logger.info("%s on %s, %s", run.setup.source.name, describe(run.setup.device), run.setup.dtype)
    if world_size() > 1:
        logger.info("%d processes share the evaluation", world_size())
    outcome = Outcome()
    journal = open_journal(run.evaluations, run.folder)
    evaluator = Evaluator(run.evaluations, run.setup, journal, run.folder, run.folder.name)
    try:
        execute(run, outcome, evaluator)
    except InputError:
        raise
    except BaseException as error:
        outcome.error = f"{type(error).__name__}: {error}".rstrip(": ")
        write_results(run, outcome)
        if run.checkpoint is not None:
            logger.error("finished layers are kept; go on with: %s", resume_command(sys.argv, run.checkpoint.folder))
        raise
    finish(run, outcome)
    if outcome.error is not None:
        again = resume_command(sys.argv, run.checkpoint.folder) if run.checkpoint else "the same command"
        raise Incomplete(f"{outcome.error}; the rest is kept, try these again with: {again}")
    journal.close()
    leave_group()


def finish(run: Run, outcome: Outcome) -> None:
    """Write results.json and show the table."""
    failures = outcome.failures(run.quant)
    outcome.error = f"failed: {', '.join(failures)}" if failures else None
    write_results(run, outcome)
    if run.args.report and is_main():
        draw_report(run)
    if not run.evaluations.empty:
        logger.info("\n%s\n", summary_table(run, outcome))
    if run.evaluations.prompts:
        logger.info("%s\n", completions_text(run, outcome))
    logger.info("results: %s", run.folder / "results.json")


def draw_report(run: Run) -> None:
    """Draw report/index.html; whatever prevents that costs the report, not the run."""
    from reporting.page import write_report  # matplotlib loads for seconds

    try:
        logger.info("report: %s", write_report(run.folder, run.args.report_layers))
    except InputError as error:
        logger.error("no report: %s", error)
    except Exception:
        logger.exception("the report failed; results.json is whole")


def execute(run: Run, outcome: Outcome, evaluator: Evaluator) -> None:
    """Load, quantize, evaluate, and the baselines; figures go into `outcome` as they are found."""
    measured, baselines = outcome.measured, outcome.baselines
    title = f"{method_name(run.quant)} {run.quant.label.upper()}"
    with measured.timing("load"):
        model = open_model(run.setup, run.args.attn_implementation)
    if run.setup.saved is not None:
        logger.info("quantized already: %s", run.quant.label)
        evaluator.measure(model, measured, QUANTIZED, title)
        return
    finished = from_main(lambda: finished_layers(run.args.resume, run.checkpoint, run.setup, run.quant))
    peaks = activation_peaks(run, model, measured, needed=len(finished) < run.setup.layers)
    if "full" in run.args.baselines:
        evaluator.measure(model, outcome.full, FULL, BASELINES["full"])
        baselines["full"] = outcome.full
    else:
        evaluator.for_comparison().measure(model, outcome.full, FULL, BASELINES["full"])
    recorder = Recorder(run.folder / "report/data") if run.args.report and is_main() else None
    quantize_(run, model, run.quant, peaks, measured, finished, run.checkpoint and run.checkpoint.keep, recorder)
    if run.args.save_model is not None and is_main():
        save_model(run.args.save_model, model, run.setup.tokenizer, run.setup.spec, run.quant)
        logger.info("model saved: %s", run.args.save_model)
    evaluator.measure(model, measured, QUANTIZED, title)
    del model
    for name in (name for name in ("rtn", "smooth") if name in run.args.baselines):
        baselines[name] = Measured()
        measure_baseline(run, name, peaks, evaluator, baselines[name])


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
    elif is_main():
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
    recorder: Recorder | None = None,
) -> None:
    """Quantize `model` in place, unless 16 bits on both sides ask for nothing; the same on every process."""
    if quant.bits.untouched:
        logger.info("16-bit weights and activations: nothing to quantize")
        return
    with measured.timing("quantize"):
        setup = run.setup

        def done(index: int, layer: FinishedLayer) -> None:
            measured.layers.append(layer.figures)  # so that a run that ends early has the figures of what it did
            if keep is not None:
                keep(index, layer)

        measured.layers = quantize_model(
            *(model, setup.spec, setup.tokens, peaks, quant, setup.device, finished, done, recorder)
        )
    make_equal_(model)


def baseline_config(quant: QuantConfig, smooth: SmoothConfig | None) -> QuantConfig:
    """The same quantizers without the transform, and without training."""
    return replace(quant, transform=Transform.NONE, smooth=smooth, clip=replace(quant.clip, learned=False))


def smoothing(args: argparse.Namespace) -> SmoothConfig:
    """The settings of smoothing, whether or not the run itself smooths."""
    return SmoothConfig(args.alpha, args.smooth_weight_peak, args.gqa_smooth)


def measure_baseline(
    run: Run, name: str, peaks: dict[str, Tensor] | None, evaluator: Evaluator, measured: Measured
) -> None:
    """Quantize a fresh copy of the model without the transform (and, for `rtn`, without smoothing), and measure it."""
    smooth = None if name == "rtn" else run.quant.smooth or smoothing(run.args)
    with measured.timing("load"):
        model = open_model(run.setup, run.args.attn_implementation)
    quantize_(run, model, baseline_config(run.quant, smooth), peaks, measured)
    evaluator.measure(model, measured, name, BASELINES[name])
