"""One run of main.py: check, load, walk over the layers once, evaluate, and leave the figures."""

import logging
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from evaluation.base import FULL, QUANTIZED
from evaluation.journal import Journal
from evaluation.measured import Measured
from evaluation.runner import Runner
from experiment.dry_run import dry_run
from experiment.ending import cost, next_steps, place
from experiment.options import Keep, RunSettings
from experiment.prepare import Prepared, model_identity, prepare, resume_command
from experiment.residence import settle_
from experiment.results import (
    Outcome,
    completions_text,
    run_settings,
    summary_table,
    write_model_card,
    write_results,
)
from experiment.rows import FULL_TITLE, full_title, method_name
from experiment.setup import keep_statistics, known_peaks, open_model
from experiment.tracking import check_tracking, open_tracker
from experiment.travel import LayerFigures, needs_peaks, travel
from experiment.usual import Taken
from experiment.verify import verify_export
from models.exported import ExportWriter
from models.saved import ModelWriter
from models.streaming import LayerReader, load_shell
from quantize.observer import LayerLog, Observer
from quantize.quantization import other_blocks
from quantize.sizes import hidden_bytes, sample_copies
from quantize.state import FinishedLayer
from quantize.walk import layers_in_memory
from utils.device import describe, peak_memory
from utils.distributed import from_main, is_main, join_group, leave_group, world_size
from utils.errors import Incomplete, InputError
from utils.log import RESULT, add_log_file
from utils.memory import Allocate, available_memory, in_memory, memory_of, on_disk, too_large
from utils.results import plain, versions

logger = logging.getLogger(__name__)


def run_experiment(settings: RunSettings, taken: Sequence[Taken] = ()) -> None:
    """Check everything, quantize, measure, write results.json. Raises InputError for what a user can mend.

    `taken`: those of the settings that nobody gave, and why; the log says so.
    results.json is written whatever happens, with the error in it; only wrong input leaves what was there as it was.
    """
    join_group()
    track = settings.output.track.track
    if not settings.output.dry_run:
        check_tracking(track)
    prepared = prepare(settings)
    by_itself = [each for each in taken if each.name != "preset" or prepared.setup.saved is None]
    if settings.output.dry_run:
        if is_main():
            log_taken(by_itself)
            dry_run(prepared)
        leave_group()
        return
    runner = open_runner(prepared)
    if is_main():
        add_log_file(prepared.folder / "log.txt")
    log_start(prepared, runner)
    log_taken(by_itself)
    outcome = Outcome()
    with open_tracker(track, prepared.folder, prepared.folder.name, described(prepared)) as tracker:
        observers = [*observers_of(prepared, outcome.measured), tracker]
        execute_noting_error(prepared, outcome, runner, observers)
        tracker.figures(outcome.measured.figures(), outcome.full.figures())
        finish(prepared, outcome)
        if outcome.error is not None:
            again = resume_command(sys.argv, prepared.checkpoint.folder) if prepared.checkpoint else "the same command"
            exported = settings.output.export is not None and settings.output.export.exists()
            again += ", and another folder for --export" if exported else ""
            raise Incomplete(f"{outcome.error}; the rest is kept, try these again with: {again}")
    runner.journal.close()
    leave_group()


def open_runner(prepared: Prepared) -> Runner:
    """What measures the models of this run; raises InputError if answers in the folder are another model's."""
    identity = model_identity(prepared.setup, prepared.quant, prepared.settings.statistics.act_scales)
    journal = Journal(prepared.folder / "unfinished.jsonl", identity)
    full = prepared.quant.bits.untouched
    runner = Runner(prepared.evaluations, journal, prepared.folder, prepared.folder.name, identity, full)
    runner.check([QUANTIZED])
    return runner


def log_start(prepared: Prepared, runner: Runner) -> None:
    """What is run, where, and behind what."""
    setup = prepared.setup
    logger.info("%s", shlex.join(["python", *sys.argv]))
    logger.info("%s on %s, %s", setup.source.name, describe(setup.device), setup.dtype)
    blocks = other_blocks(setup.skeleton, setup.spec, prepared.quant) if setup.saved is None else None
    if blocks is not None:
        logger.info("%s", blocks)
    if world_size() > 1:
        logger.info("%d processes share the evaluation", world_size())
    if runner.journal.parts:
        logger.info(
            "an earlier run did not finish its evaluation; going on behind %d parts of it", runner.journal.parts
        )


def log_taken(taken: Sequence[Taken]) -> None:
    """What the run does by itself, and why."""
    for each in taken:
        logger.info("%s", each)


def described(prepared: Prepared) -> dict:
    """What a tracked run is described by, as JSON has it."""
    method = method_name(prepared.quant)
    return plain({**run_settings(prepared), "method": method, "versions": versions()})


def execute_noting_error(prepared: Prepared, outcome: Outcome, runner: Runner, observers: Sequence[Observer]) -> None:
    """`execute`; what ends it early is written into results.json, and how to go on is said."""
    try:
        execute(prepared, outcome, runner, observers)
    except InputError:
        raise
    except BaseException as error:
        if prepared.checkpoint is not None:  # said first: a launcher that ends all processes is in a hurry
            again = resume_command(sys.argv, prepared.checkpoint.folder)
            logger.error("finished layers are kept; go on with: %s", again)
        outcome.error = f"{type(error).__name__}: {error}".rstrip(": ")
        write_results(prepared, outcome)
        if isinstance(error, torch.OutOfMemoryError):
            keeps = "" if prepared.settings.model.keep is Keep.HOST else "--keep host, or "
            reason = str(error).splitlines()[0]
            raise InputError(f"{reason}: too little memory for this run; try {keeps}a lower --seqlen") from None
        raise


def finish(prepared: Prepared, outcome: Outcome) -> None:
    """Write results.json and show the table."""
    failures, report = outcome.failures(prepared.quant), prepared.settings.report
    outcome.error = f"failed: {', '.join(failures)}" if failures else None
    write_results(prepared, outcome)
    write_model_card(prepared, outcome)
    if report.report and is_main():
        with outcome.measured.timing("report"):
            draw_report(prepared)
    earlier = prepared.folder / "report/index.html"
    if not report.report and earlier.exists():
        logger.warning("%s is of an earlier run, not of this one: --report would draw it anew", earlier)
    table = summary_table(prepared, outcome)
    if table:
        logger.log(RESULT, "\n%s\n", table)
    completions = [(title, measured.results["completions"]) for title, measured in outcome.rows(prepared.quant)]
    if prepared.settings.evaluation.text.prompts.prompt:
        logger.log(RESULT, "%s\n", completions_text(prepared.settings.evaluation.text.prompts.prompt, completions))
    for line in ending(prepared, outcome):
        logger.info("%s", line)


def ending(prepared: Prepared, outcome: Outcome) -> list[str]:
    """What the run cost, where it is, and what to do next."""
    folder, setup, quant = prepared.folder, prepared.setup, prepared.quant
    seconds = {name: sum(each.seconds.get(name, 0) for _, each in outcome.rows(quant)) for name in outcome.stages()}
    saved = setup.source.name if setup.saved is not None else prepared.settings.output.save_model
    fresh = setup.saved is None and not quant.bits.untouched
    reported = prepared.settings.report.report and (folder / "report/index.html").exists()
    return [
        cost(seconds, outcome.spent(), peak_memory(setup.device)),
        place(folder, ("results.json", "log.txt", "report/index.html")),
        next_steps(folder, saved, fresh, reported, fresh),
    ]


def draw_report(prepared: Prepared) -> None:
    """Draw report/index.html; whatever prevents that costs the report, not the run."""
    from reporting.page import write_report  # matplotlib loads for seconds

    try:
        logger.info("report: %s", write_report(prepared.folder, prepared.settings.report.layers.report_layers))
    except InputError as error:
        logger.error("no report: %s", error)
    except Exception:
        logger.exception("the report failed; results.json is whole")


def execute(prepared: Prepared, outcome: Outcome, runner: Runner, observers: Sequence[Observer] = ()) -> None:
    """Load, walk, evaluate; figures go into `outcome` as they are found."""
    setup, measured, full = prepared.setup, outcome.measured, outcome.full
    compared = runner.for_comparison(prepared.settings.report.report)
    with measured.timing("load"):
        model = open_model(setup) if prepared.shards is None else open_shell(prepared)
        kept = settle_(model, setup, prepared.quant, prepared.plan, prepared.stays_whole)
    if prepared.shards is None:
        compared.part(whole=True).measure(model, full, FULL, FULL_TITLE)
    finished = from_main(prepared.finished)
    with ExitStack() as stack:
        layers = stack.enter_context(layer_source(prepared, model, measured))
        output, kinds = prepared.settings.output, (ModelWriter, ExportWriter)
        wanted = [(kind, to) for kind, to in zip(kinds, (output.save_model, output.export), strict=True) if to]
        writers = [stack.enter_context(kind(to, setup.spec, setup.layers)) for kind, to in wanted if is_main()]
        states = state_tokens(prepared, finished) + compared.tokens(FULL) + runner.tokens(QUANTIZED)
        needed = hidden_bytes(states, model, model.dtype)
        allocate = memory_of(setup.device) if kept.states else choose_memory(prepared, needed)
        own = runner.board(model, measured, QUANTIZED, allocate)
        statistics = travel(
            setup,
            model,
            layers,
            prepared.quant if setup.saved is None else None,
            measured,
            before=[compared.board(model, full, FULL, allocate)],
            behind=[*writers, own],
            peaks=partial(known_peaks, prepared.settings.statistics, setup),
            finished=finished,
            observers=[*observers, own],
            allocate=allocate,
        )
        if statistics is not None:
            keep_statistics(prepared.settings.statistics, setup, statistics)
        for writer in writers:
            writer.finish(model, setup.tokenizer, prepared.quant)
            logger.info("model %s: %s", writer.DONE, writer.folder)
        write_model_card(prepared, outcome)
    compared.part(whole=False).measure(model, full, FULL, FULL_TITLE)
    runner.measure(model, measured, QUANTIZED, full_title(prepared.quant))
    if output.verify and is_main():
        with measured.timing("verify"):
            verify_export(prepared, model, measured)


def observers_of(prepared: Prepared, measured: Measured) -> list[Observer]:
    """Who looks on while the layers are quantized: the report, the log, the checkpoint, then the figures."""
    observers: list[Observer] = [LayerLog(), LayerFigures(measured)]
    if prepared.checkpoint is not None:
        observers.insert(1, prepared.checkpoint)
    if prepared.settings.report.report and is_main():
        from reporting.recorder import Recorder

        observers.insert(0, Recorder(prepared.folder / "report/data"))
    return observers


def open_shell(prepared: Prepared) -> nn.Module:
    """The model without the weights of its layers."""
    setup = prepared.setup
    how = (setup.dtype, setup.compute_dtype, setup.model.attn_implementation)
    return load_shell(setup.source, setup.config, setup.spec, prepared.shards, *how)


@contextmanager
def layer_source(prepared: Prepared, model: nn.Module, measured: Measured) -> Iterator[Iterable[nn.Module]]:
    """The decoder layers, each with its weights on the device when its turn comes: from memory or from the files."""
    setup = prepared.setup
    if prepared.shards is None:
        yield layers_in_memory(model, setup.spec, setup.device)
        return
    with LayerReader(model, setup.spec, prepared.shards, setup.dtype, setup.device) as reader:
        yield timed_layers(reader.layers(), measured)


def timed_layers(layers: Iterator[nn.Module], measured: Measured) -> Iterator[nn.Module]:
    """`layers`, with the time that getting each takes counted as reading."""
    while True:
        with measured.timing("read"):
            layer = next(layers, None)
        if layer is None:
            return
        yield layer


def state_tokens(prepared: Prepared, finished: Mapping[int, FinishedLayer]) -> int:
    """How many calibration tokens' hidden states the walk holds: for statistics, and for the quantization."""
    setup, quant = prepared.setup, prepared.quant
    if setup.tokens is None or len(finished) >= setup.layers:
        return 0
    return sample_copies(quant, needs_peaks(setup, quant, finished)) * setup.tokens.numel()


def choose_memory(prepared: Prepared, needed: int) -> Allocate:
    """Where hidden states of `needed` bytes are to live: in files where they would fill the memory."""
    free, folder = available_memory(), prepared.setup.model.cache_dir
    files = too_large(needed, free)
    where = f"in files in {folder}" if files else "in memory"
    logger.info("hidden states: %.2f GB, %s (%.1f GB are free)", needed / 1e9, where, free / 1e9)
    return on_disk(folder) if files else in_memory
