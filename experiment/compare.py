"""One model, quantized in several ways: each row by itself, everything they share computed once."""

import argparse
import json
import logging
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from evaluation.journal import Journal
from evaluation.measured import Measured
from evaluation.runner import Evaluations, Runner, open_evaluations
from evaluation.settings import EvaluationSettings
from experiment.comparison_output import Finished, write_outputs
from experiment.measuring import evaluation_context
from experiment.rows import FULL, FULL_TITLE, Row, plan_rows
from experiment.run import activation_peaks, quantize_
from experiment.session import Setup, fetch_tokens, make_setup, open_model, settings_of
from experiment.tracking import Tracker, check_tracking, open_tracker
from models.load import model_fingerprint
from quantize.config import QuantConfig, Transform
from quantize.statistics import load_scales
from quantize.walk import check_shapes
from utils.data import data_fingerprint
from utils.device import describe, peak_memory
from utils.distributed import from_main, is_main, join_group, leave_group, world_size
from utils.errors import Incomplete, InputError
from utils.io import file_digest, write_json
from utils.log import add_log_file
from utils.results import differences, flatten, plain, versions
from utils.settings import from_flags

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Flags, the model with the calibration tokens of every seed, what is measured, the rows, and their folder."""

    args: argparse.Namespace
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


@dataclass(frozen=True)
class Shared:
    """What rows compute once for all: activation peaks by seed."""

    peaks: dict[int, dict[str, Tensor]]


def run_comparison(args: argparse.Namespace, quant: QuantConfig) -> None:
    """Measure every row that is not there yet, and write table, picture and results.

    `quant` has the quantizers and the smoothing. A row that fails is recorded, the others go on. Raises InputError for
    what a user can mend, Incomplete if a row failed.
    """
    join_group()
    check_tracking(args.track)
    comparison = prepare(args, quant)
    found = from_main(lambda: {row.key: read_row(comparison, row) for row in comparison.rows})
    if is_main():
        add_log_file(comparison.folder / "log.txt")
    logger.info("%s", shlex.join(["python", *sys.argv]))
    setup = comparison.setup
    logger.info("%s on %s, %s", setup.source.name, describe(setup.device), setup.dtype)
    try:
        finished = measure_rows(comparison, found)
    except (KeyboardInterrupt, SystemExit):
        logger.error("finished rows are kept in %s; the same command goes on behind them", comparison.folder / "rows")
        raise
    errors = [f"{each.row.key}: {each.error}" for each in finished if each.error is not None]
    error = f"failed: {'; '.join(errors)}" if errors else None
    if is_main():
        write_outputs(comparison.folder, finished, run_facts(comparison) | {"error": error}, args.prompt)
    leave_group()
    if error is not None:
        raise Incomplete(f"{error}; the other rows are kept, try these again with the same command")


def prepare(args: argparse.Namespace, quant: QuantConfig) -> Comparison:
    """Check the flags against the model's shapes and the data. Raises InputError for whatever is wrong."""
    setup = make_setup(args)
    if setup.saved is not None:
        raise InputError(f"--model {args.model}: is quantized already; give the full-precision model")
    rows = plan_rows(args.rows, quant, args.lwc, args.seeds)
    for row in rows:
        check_shapes(setup.skeleton, setup.spec, row.quant)
    evaluations = open_evaluations(from_flags(EvaluationSettings, args), evaluation_context(args, setup))
    if args.act_scales is not None:
        load_scales(args.act_scales, setup.origin(), setup.skeleton, setup.spec)
    setups = {seed: setup if seed == args.seed else at_seed(args, setup, seed) for seed in args.seeds}
    shared = {
        "model": model_fingerprint(setup.source, setup.config),
        "dtype": str(setup.dtype),
        "--attn_implementation": args.attn_implementation,
        "measured": {"--limit": args.limit, "--eval_kl": args.eval_kl, **evaluations.identity()},
    }
    statistics = file_digest(args.act_scales) if args.act_scales is not None else "computed"
    identities = {row.key: shared | row_identity(row, setups, statistics) for row in rows}
    identities = {key: json.loads(json.dumps(plain(flatten(each)))) for key, each in identities.items()}
    folder = args.output_dir / f"{setup.net}_{quant.label}_compare"
    return Comparison(args, setups, evaluations, rows, folder, identities)


def at_seed(args: argparse.Namespace, setup: Setup, seed: int) -> Setup:
    """The same model with the calibration samples of another seed."""
    flags = argparse.Namespace(**{**vars(args), "seed": seed})
    return replace(setup, tokens=fetch_tokens(flags, setup.config, setup.tokenizer))


def row_identity(row: Row, setups: dict[int, Setup], statistics: str) -> dict[str, object]:
    """What a row's figures depend on beside the model and what is measured: settings that do nothing are left out."""
    quant = row.quant
    if quant.bits.untouched:
        return {}
    settings = asdict(quant)
    settings["training"].pop("offload")
    unused = {"training": not quant.clip.learned, "seed": row.seed is None, "smooth": quant.smooth is None}
    unused |= dict.fromkeys(("rotation", "probe"), quant.transform is Transform.NONE)
    found: dict[str, object] = {"quantization": {key: value for key, value in settings.items() if not unused.get(key)}}
    if row.seed is not None:
        found["calibration"] = data_fingerprint(setups[row.seed].tokens)
    return found | ({"activation statistics": statistics} if quant.smooth else {})


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


def measure_rows(comparison: Comparison, found: dict[str, dict | None]) -> list[Finished]:
    """Every row with its figures: those in `found` as they are, the others measured now and kept."""
    shared, finished = Shared({}), []
    pending = [row for row in comparison.rows if found[row.key] is None]
    if comparison.evaluations.teaching().members and pending and pending[0].name != FULL:
        teach(comparison)
    for number, row in enumerate(comparison.rows, start=1):
        if found[row.key] is not None:
            logger.info("row %d of %d, %s: from an earlier run", number, len(comparison.rows), row.key)
            finished.append(Finished(row, found[row.key]))
            continue
        logger.info("row %d of %d, %s: %s", number, len(comparison.rows), row.key, row.full_title)
        measured = Measured()
        tracker = track_row(comparison, row, required=row is pending[0])
        try:
            with tracker:
                measured.watch = tracker.layer
                measure_row(comparison, row, shared, measured)
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
    quant, settings = row.quant, shared_settings(comparison)
    settings |= {"row": row.key, "method": row.title, "seed": row.seed, "smooth": quant.smooth is not None}
    settings |= {"wbits": quant.bits.weight, "abits": quant.bits.activation, "transform": quant.transform}
    settings |= {"lwc": quant.clip.learned, "swc": quant.clip.weight_ratio, "versions": versions()}
    folder = comparison.folder
    return open_tracker(comparison.args.track, folder, row.key, plain(settings), group=folder.name, required=required)


def measure_row(comparison: Comparison, row: Row, shared: Shared, measured: Measured) -> None:
    """Load the model, quantize it as `row` says, and measure it; what an interrupted run found is taken over."""
    identity, folder = comparison.identities[row.key], comparison.folder
    journal = Journal(comparison.path(row).with_suffix(".unfinished.jsonl"), identity)
    runner = Runner(comparison.evaluations, journal, folder, folder.name, identity)
    setup, args = comparison.setups.get(row.seed, comparison.setup), comparison.args
    with measured.timing("load"):
        model = open_model(setup, args.attn_implementation)
    if row.quant.smooth is not None and row.seed not in shared.peaks:
        shared.peaks[row.seed] = activation_peaks(args, setup, model, measured)
    quantize_(setup, model, row.quant, shared.peaks.get(row.seed), measured)
    runner.measure(model, measured, row.key, row.full_title)
    if not measured.failures:
        journal.close()


def teach(comparison: Comparison) -> None:
    """What the divergence is measured from, where the full-precision row is not about to be measured anyway."""
    folder = comparison.folder
    journal = Journal(folder / "rows" / "teacher.unfinished.jsonl", comparison.identities)
    runner = Runner(comparison.evaluations.teaching(), journal, folder, folder.name, comparison.identities)
    model = open_model(comparison.setup, comparison.args.attn_implementation)
    runner.measure(model, Measured(), FULL, FULL_TITLE)
    journal.close()


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
    """The settings that all rows share, without what is for finished runs."""
    found = settings_of(comparison.args, comparison.setup)
    return {name: value for name, value in found.items() if name not in ("given", "runs", "output")}


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
