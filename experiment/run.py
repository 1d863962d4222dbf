"""One run of main.py: check, load, quantize, evaluate, and leave the figures."""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable

from torch import Tensor, nn

from evaluation.base import FULL, QUANTIZED
from evaluation.journal import Journal
from evaluation.measured import Measured
from evaluation.runner import Runner
from experiment.dry_run import dry_run
from experiment.measuring import model_identity
from experiment.outcome import Outcome, completions_text, summary_table, write_results
from experiment.peaks import keep_statistics, known_peaks, needs_peaks
from experiment.plan import Run, prepare
from experiment.resuming import finished_layers, resume_command
from experiment.rows import FULL_TITLE, full_title, method_name
from experiment.session import Setup, open_model, settings_of
from experiment.stream import execute_streamed
from experiment.tracking import check_tracking, open_tracker
from quantize.config import QuantConfig
from quantize.export import save_model
from quantize.record import Recorder
from quantize.state import FinishedLayer
from quantize.statistics import channel_statistics
from quantize.walk import quantize_model
from utils.device import describe
from utils.distributed import from_main, is_main, join_group, leave_group, make_equal_, world_size
from utils.errors import Incomplete, InputError
from utils.log import RESULT, add_log_file
from utils.results import plain, versions

logger = logging.getLogger(__name__)


def run_experiment(args: argparse.Namespace, quant: QuantConfig) -> None:
    """Check everything, quantize, measure, write results.json. Raises InputError for what a user can mend.

    results.json is written whatever happens, with the error in it; only wrong input leaves what was there as it was.
    """
    join_group()
    if not args.dry_run:
        check_tracking(args.track)
    run = prepare(args, quant)
    if args.dry_run:
        if is_main():
            dry_run(run)
        leave_group()
        return
    identity = model_identity(run.args, run.setup)
    journal = Journal(run.folder / "unfinished.jsonl", identity)
    runner = Runner(run.evaluations, journal, run.folder, run.folder.name, identity)
    runner.check([QUANTIZED])
    if is_main():
        add_log_file(run.folder / "log.txt")
    logger.info("%s", shlex.join(["python", *sys.argv]))
    logger.info("%s on %s, %s", run.setup.source.name, describe(run.setup.device), run.setup.dtype)
    if world_size() > 1:
        logger.info("%d processes share the evaluation", world_size())
    outcome = Outcome()
    if journal.parts:
        logger.info("an earlier run did not finish its evaluation; going on behind %d parts of it", journal.parts)
    with open_tracker(args.track, run.folder, run.folder.name, tracked_settings(run)) as tracker:
        outcome.measured.watch = tracker.layer
        execute_noting_error(run, outcome, runner)
        tracker.figures(outcome.measured.figures(), outcome.full.figures())
        finish(run, outcome)
        if outcome.error is not None:
            again = resume_command(sys.argv, run.checkpoint.folder) if run.checkpoint else "the same command"
            raise Incomplete(f"{outcome.error}; the rest is kept, try these again with: {again}")
    journal.close()
    leave_group()


def execute_noting_error(run: Run, outcome: Outcome, runner: Runner) -> None:
    """`execute`; what ends it early is written into results.json, and how to go on is said."""
    try:
        execute(run, outcome, runner)
    except InputError:
        raise
    except BaseException as error:
        outcome.error = f"{type(error).__name__}: {error}".rstrip(": ")
        write_results(run, outcome)
        if run.checkpoint is not None:
            logger.error("finished layers are kept; go on with: %s", resume_command(sys.argv, run.checkpoint.folder))
        raise


def tracked_settings(run: Run) -> dict:
    """What a tracked run is described by, as JSON has it."""
    return plain({**settings_of(run.args, run.setup), "method": method_name(run.quant), "versions": versions()})


def finish(run: Run, outcome: Outcome) -> None:
    """Write results.json and show the table."""
    failures = outcome.failures(run.quant)
    outcome.error = f"failed: {', '.join(failures)}" if failures else None
    write_results(run, outcome)
    if run.args.report and is_main():
        draw_report(run)
    earlier = run.folder / "report/index.html"
    if not run.args.report and earlier.exists():
        logger.warning("%s is of an earlier run, not of this one: --report would draw it anew", earlier)
    if run.evaluations.members:
        logger.log(RESULT, "\n%s\n", summary_table(run, outcome))
    if run.args.prompt:
        rows = [(title, measured.results["completions"]) for title, measured in outcome.rows(run.quant)]
        logger.log(RESULT, "%s\n", completions_text(run.args.prompt, rows))
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


def execute(run: Run, outcome: Outcome, runner: Runner) -> None:
    """Load, quantize, evaluate; figures go into `outcome` as they are found."""
    if run.shards is not None:
        execute_streamed(run, outcome, runner)
        return
    measured = outcome.measured
    title = full_title(run.quant)
    with measured.timing("load"):
        model = open_model(run.setup, run.args.attn_implementation)
    if run.setup.saved is not None:
        logger.info("quantized already: %s", run.quant.label)
        runner.measure(model, measured, QUANTIZED, title)
        return
    finished = from_main(lambda: finished_layers(run.args.resume, run.checkpoint, run.setup, run.quant))
    peaks = None
    if needs_peaks(run.quant, layers_left=len(finished) < run.setup.layers):
        peaks = activation_peaks(run.args, run.setup, model, measured)
    runner.for_comparison(run.args.report).measure(model, outcome.full, FULL, FULL_TITLE)
    keep = run.checkpoint and run.checkpoint.keep
    quantize_(run.setup, model, run.quant, peaks, measured, finished, keep, run.recorder())
    if run.args.save_model is not None and is_main():
        save_model(run.args.save_model, model, run.setup.tokenizer, run.setup.spec, run.quant)
        logger.info("model saved: %s", run.args.save_model)
    runner.measure(model, measured, QUANTIZED, title)


def activation_peaks(args: argparse.Namespace, setup: Setup, model: nn.Module, measured: Measured) -> dict[str, Tensor]:
    """Channel peaks for smoothing: from the file if it is of this model and data, else computed (and kept if new)."""
    known = known_peaks(args, setup)
    if known is not None:
        return known
    with measured.timing("statistics"):
        statistics = channel_statistics(model, setup.spec, setup.tokens, setup.device)
    keep_statistics(args, setup, statistics)
    return statistics.scales


def quantize_(
    setup: Setup,
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
        how = (quant, setup.device, finished, keep, recorder, measured.add_layer)
        quantize_model(model, setup.spec, setup.tokens, peaks, *how)
    make_equal_(model)
