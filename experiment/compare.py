"""One model, quantized in several ways: each row by itself, everything they share computed once."""

import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from evaluation.base import FULL
from evaluation.journal import Journal
from evaluation.measured import Measured
from evaluation.runner import Evaluations, Runner, open_evaluations
from experiment.ending import cost, place
from experiment.prepare import statistics_identity
from experiment.residence import make_plan, settle_
from experiment.results import settings_dict
from experiment.rows import FULL_TITLE, CompareSettings, Row, plan_rows
from experiment.run import log_taken
from experiment.setup import Setup, fetch_tokens, keep_statistics, known_peaks, make_setup, open_model
from experiment.tables import Finished, comparison_text, csv_table, row_facts, table_rows
from experiment.tracking import Tracker, check_tracking, open_tracker
from experiment.travel import LayerFigures, travel
from experiment.usual import Taken
from models.load import model_fingerprint
from quantize.observer import LayerLog
from quantize.quantization import check_shapes, other_blocks
from quantize.rotation_settings import Transform
from quantize.settings import QuantSettings, SmoothMeasure
from quantize.statistics import load_scales
from quantize.walk import layers_in_memory
from reporting.picture import draw
from utils.data import data_fingerprint
from utils.device import describe, peak_memory
from utils.distributed import from_main, is_main, join_group, leave_group, world_size
from utils.errors import Incomplete, InputError
from utils.io import write_json, write_text
from utils.log import RESULT, add_log_file
from utils.results import differences, flatten, plain, versions
from utils.settings import Changes, flat, folder_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Settings, the model with the calibration tokens of every seed, what is measured, the rows, and their folder."""

    settings: CompareSettings
    setups: dict[int, Setup]
    evaluations: Evaluations
    rows: tuple[Row, ...]
    folder: Path
    identities: dict[str, dict]  # by row key: what its figures depend on

    @property
    def setup(self) -> Setup:
        """That of the first seed."""
        return next(iter(self.setups.values()))

    def path(self, row: Row) -> Path:
        """Where a finished row is kept."""
        return self.folder / "rows" / f"{row.key}.json"


Peaks = dict[int, dict[str, Tensor]]  # by seed: activation peaks, which rows compute once for all


def run_comparison(settings: CompareSettings, taken: Sequence[Taken] = ()) -> None:
    """Measure every row that is not there yet, and write table, picture and results.

    `taken`: those of the settings that nobody gave. A row that fails is recorded, the others go on. Raises InputError
    for what a user can mend, Incomplete if a row failed.
    """
    join_group()
    check_tracking(settings.track.track)
    comparison = prepare(settings)
    earlier = from_main(lambda: {row.key: read_row(comparison, row) for row in comparison.rows})
    if is_main():
        add_log_file(comparison.folder / "log.txt")
    logger.info("%s", shlex.join(["python", *sys.argv]))
    log_taken(taken)
    setup = comparison.setup
    logger.info("%s on %s, %s", setup.source.name, describe(setup.device), setup.dtype)
    for blocks in dict.fromkeys(other_blocks(setup.skeleton, setup.spec, row.quant) for row in comparison.rows):
        if blocks is not None:
            logger.info("%s", blocks)
    started = time.perf_counter()
    try:
        finished = measure_rows(comparison, earlier)
    except (KeyboardInterrupt, SystemExit):
        logger.error("finished rows are kept in %s; the same command goes on behind them", comparison.folder / "rows")
        raise
    errors = [f"{each.row.key}: {each.error}" for each in finished if each.error is not None]
    error = f"failed: {'; '.join(errors)}" if errors else None
    if is_main():
        write_outputs(comparison, finished, error)
        measured = [each.figures for each in finished if earlier[each.row.key] is None]
        for line in ending(comparison, measured, time.perf_counter() - started):
            logger.info("%s", line)
    leave_group()
    if error is not None:
        raise Incomplete(f"{error}; the other rows are kept, try these again with the same command")


def prepare(settings: CompareSettings) -> Comparison:
    """Check the settings against the model's shapes and the data. Raises InputError for whatever is wrong."""
    seeds, files = settings.seeds, settings.statistics
    further = settings.quant.tuning.samples
    setup = make_setup(settings.model, settings.calibration, seeds[0], further=further)
    if setup.saved is not None:
        raise InputError(f"--model {setup.source.name}: is quantized already; give the full-precision model")
    rows = plan_rows(settings.row_names, settings.quant.untrained, settings.quant.training, seeds)
    for row in rows:
        check_shapes(setup.skeleton, setup.spec, row.quant)
    evaluations = open_evaluations(settings.evaluation, setup.context(settings.calibration.seqlen, seeds[0]))
    if files.act_scales is not None:
        load_scales(files.act_scales, setup.origin(), setup.skeleton, setup.spec)
    setups = {seed: setup if seed == seeds[0] else at_seed(settings, setup, seed) for seed in seeds}
    shared = {
        "model": model_fingerprint(setup.source, setup.config),
        "dtype": str(setup.dtype),
        "--attn_implementation": settings.model.attn_implementation,
        "measured": {"--limit": settings.evaluation.limit, **evaluations.identity()},
    }
    statistics = statistics_identity(files.act_scales)
    identities = {row.key: shared | row_identity(row, setups, statistics) for row in rows}
    identities = {key: json.loads(json.dumps(plain(flatten(each)))) for key, each in identities.items()}
    folder = settings.comparison.output_dir / comparison_folder(settings, setup.net)
    return Comparison(settings, setups, evaluations, rows, folder, identities)


def comparison_folder(settings: CompareSettings, net: str) -> str:
    """The name of the comparison's folder: rows of one name and seed have different ones if their figures can differ.

    Which rows and seeds there are it does not tell: each has files of its own.
    """
    bits = settings.quant.bits
    return folder_name(f"{net}_w{bits.weight}a{bits.activation}_compare", settings, ("wbits", "abits", "seed"))


def at_seed(settings: CompareSettings, setup: Setup, seed: int) -> Setup:
    """The same model with the calibration samples of another seed."""
    what = (setup.config, setup.tokenizer, setup.bos, settings.quant.tuning.samples)
    tokens, more = fetch_tokens(settings.model, settings.calibration, seed, *what)
    return replace(setup, tokens=tokens, tuning_tokens=more)


def row_identity(row: Row, setups: dict[int, Setup], statistics: str) -> dict[str, object]:
    """What a row's figures depend on beside the model and what is measured: settings that do nothing are left out."""
    quant = row.quant
    if quant.bits.untouched:
        return {}
    made = flat(quant, Changes.MODEL)
    if row.seed is None:
        del made["seed"]
    idle = (*flat(quant.rotation), "probe", "probe_tokens") if quant.transform is Transform.NONE else ()
    for name in idle:
        del made[name]
    identity: dict[str, object] = {"quantization": made}
    if row.seed is not None:
        identity["calibration"] = data_fingerprint(setups[row.seed].tokens)
    by_peaks = quant.smooth is not None and quant.smooth.measure is SmoothMeasure.PEAK
    return identity | ({"activation statistics": statistics} if by_peaks else {})


def read_row(comparison: Comparison, row: Row) -> dict | None:
    """The figures of a row that an earlier run finished; None if it is to be measured.

    Raises InputError, naming what differs, for a row of the same name with other settings or data.
    """
    path = comparison.path(row)
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        identity, figures = saved["identity"], saved["figures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: cannot be read (%s); this row is measured again", path, error)
        return None
    different = differences(identity, comparison.identities[row.key])
    if different:
        raise InputError(f"{path} is of another comparison ({'; '.join(different)}); choose another --output_dir")
    return figures


def measure_rows(comparison: Comparison, earlier: dict[str, dict | None]) -> list[Finished]:
    """Every row with its figures: those in `earlier` as they are, the others measured now and kept."""
    peaks: Peaks = {}
    finished = []
    pending = [row for row in comparison.rows if earlier[row.key] is None]
    if comparison.evaluations.teaching().members and pending and pending[0].name != FULL:
        teach(comparison)
    for number, row in enumerate(comparison.rows, start=1):
        if earlier[row.key] is not None:
            logger.info("row %d of %d, %s: from an earlier run", number, len(comparison.rows), row.key)
            finished.append(Finished(row, earlier[row.key]))
            continue
        logger.info("row %d of %d, %s: %s", number, len(comparison.rows), row.key, row.full_title)
        measured = Measured()
        tracker = track_row(comparison, row, required=row is pending[0])
        try:
            with tracker:
                measure_row(comparison, row, peaks, measured, tracker)
                tracker.figures(measured.figures())
                tracker.failed = bool(measured.failures)
        except Exception as error:
            if world_size() > 1 or (isinstance(error, InputError) and not finished):
                raise
            if isinstance(error, InputError):
                logger.error("%s: %s", row.key, error)
            else:
                logger.exception("%s failed", row.key)
            finished.append(Finished(row, kept_figures(measured), f"{type(error).__name__}: {error}"))
            continue
        finished.append(keep_row(comparison, row, measured))
    return finished


def track_row(comparison: Comparison, row: Row, required: bool) -> Tracker:
    """What tracks one row; unless it is `required`, a row that cannot be tracked is measured all the same."""
    settings = shared_settings(comparison) | flat(row.quant)
    settings |= {"row": row.key, "method": row.title, "seed": row.seed, "versions": versions()}
    kind, folder = comparison.settings.track.track, comparison.folder
    return open_tracker(kind, folder, row.key, plain(settings), group=folder.name, required=required)


def measure_row(comparison: Comparison, row: Row, peaks: Peaks, measured: Measured, tracker: Tracker) -> None:
    """Load the model, quantize it as `row` says, and measure it; what an interrupted run found is taken over."""
    identity, folder = comparison.identities[row.key], comparison.folder
    journal = Journal(comparison.path(row).with_suffix(".unfinished.jsonl"), identity)
    runner = Runner(comparison.evaluations, journal, folder, folder.name, identity)
    setup, files = comparison.setups.get(row.seed, comparison.setup), comparison.settings.statistics
    with measured.timing("load"):
        model = open_model(setup)
        settle(comparison, model, setup, row.quant)
    own = runner.board(model, measured, row.key)
    statistics = travel(
        setup,
        model,
        layers_in_memory(model, setup.spec, setup.device),
        row.quant,
        measured,
        behind=[own],
        peaks=lambda: peaks.get(row.seed) or known_peaks(files, setup),
        observers=[LayerLog(), LayerFigures(measured), tracker, own],
    )
    if statistics is not None:
        keep_statistics(files, setup, statistics)
        peaks[row.seed] = statistics.scales
    runner.measure(model, measured, row.key, row.full_title)
    if not measured.failures:
        journal.close()


def teach(comparison: Comparison) -> None:
    """What the divergence is measured from, where the full-precision row is not about to be measured anyway."""
    folder = comparison.folder
    journal = Journal(folder / "rows" / "teacher.unfinished.jsonl", comparison.identities)
    runner = Runner(comparison.evaluations.teaching(), journal, folder, folder.name, comparison.identities)
    model = open_model(comparison.setup)
    settle(comparison, model, comparison.setup, comparison.rows[0].quant)
    runner.measure(model, Measured(), FULL, FULL_TITLE)
    journal.close()


def settle(comparison: Comparison, model: nn.Module, setup: Setup, quant: QuantSettings) -> None:
    """Bring `model` to the GPU if a row has room for it there."""
    evaluations = comparison.evaluations
    computed, batch = comparison.settings.statistics.act_scales is None, comparison.settings.evaluation.eval_batch_size
    kept = evaluations.teaching()  # what was taught is kept there too
    plan = make_plan(setup, quant, evaluations, kept, computed, batch)
    settle_(model, setup, quant, plan, whole=not evaluations.spread)


def keep_row(comparison: Comparison, row: Row, measured: Measured) -> Finished:
    """Write a finished row to its file; one with a failed evaluation is not finished."""
    figures = kept_figures(measured)
    if measured.failures:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in measured.failures.items())
        return Finished(row, figures, reasons)
    if is_main():
        facts = {"row": row.name, "title": row.title, "bits": row.bits, "seed": row.seed}
        facts |= {"identity": comparison.identities[row.key], "figures": figures}
        write_json(comparison.path(row), facts)
    return Finished(row, figures)


def kept_figures(measured: Measured) -> dict:
    """Figures as a file has them."""
    return plain({**measured.figures(), "layers": measured.layers})


def shared_settings(comparison: Comparison) -> dict:
    """The settings that all rows share."""
    return settings_dict(comparison.settings, comparison.setup)


def write_outputs(comparison: Comparison, finished: list[Finished], error: str | None) -> None:
    """Write table, picture and results into the comparison's folder, and show the table."""
    folder, rows = comparison.folder, table_rows(finished)
    text = comparison_text(finished, comparison.settings.evaluation.text.prompts.prompt)
    write_text(folder / "table.md", text + "\n")
    write_text(folder / "table.csv", csv_table(rows))
    draw(rows, f"{comparison.setup.net}, {rows[-1].bits}", folder)
    facts = run_facts(comparison) | {"error": error, "rows": [row_facts(each) for each in finished]}
    write_json(folder / "results.json", plain(facts))
    logger.log(RESULT, "\n%s\n", text)


def ending(comparison: Comparison, measured: Sequence[dict], total: float) -> list[str]:
    """What the rows that were `measured` now cost, where everything is, and what to do next."""
    stages = dict.fromkeys(stage for figures in measured for stage in figures["seconds"])
    seconds = {stage: sum(figures["seconds"].get(stage, 0) for figures in measured) for stage in stages}
    model = shlex.quote(comparison.settings.model.model)
    return [
        cost(seconds, total, peak_memory(comparison.setup.device)),
        place(comparison.folder, ("table.md", "table.csv", "comparison.png", "results.json", "log.txt")),
        f"next: keep the one you choose: python main.py --model {model} --preset NAME --save_model DIR",
    ]


def run_facts(comparison: Comparison) -> dict:
    """What results.json says of the comparison as a whole."""
    setup = comparison.setup
    data = {str(seed): data_fingerprint(each.tokens) for seed, each in comparison.setups.items()}
    return {
        "settings": shared_settings(comparison),
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "device": describe(setup.device),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "processes": world_size(),
        "data": {"calibration": data},
        **peak_memory(setup.device),
    }
