"""One run, checked: what will be done, before any weight is loaded."""

import logging
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.runner import Evaluations, open_evaluations
from experiment.estimate import Plan
from experiment.export import check_export
from experiment.options import RunSettings
from experiment.presets import PresetSettings
from experiment.residence import make_plan
from experiment.setup import Setup, make_setup
from models.load import config_digest, has_weights, model_fingerprint, weights_digest
from models.saved import require_empty
from models.shards import Shards, open_shards
from quantize.checkpoint import Checkpoint, require_new, require_same_run
from quantize.original import read_original
from quantize.quantization import check_shapes
from quantize.settings import QuantSettings
from quantize.sizes import checkpoint_bytes, model_bytes
from quantize.state import FinishedLayer
from quantize.statistics import load_scales
from utils.data import data_fingerprint
from utils.distributed import from_main, is_main, local_size, world_size
from utils.errors import InputError
from utils.io import file_digest
from utils.memory import available_memory
from utils.settings import Changes, flat, folder_name

FILLED = 0.9  # of the free memory: the most that a model may take as a whole
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Settings, model and calibration data, what is measured, folder, checkpoint.

    `shards`: where the weights are, if they are read layer by layer. `missing`: what a plan has to do without, a line
    each.
    """

    settings: RunSettings
    setup: Setup
    evaluations: Evaluations
    folder: Path
    checkpoint: Checkpoint | None = None
    shards: Shards | None = None
    missing: tuple[str, ...] = ()

    @property
    def quant(self) -> QuantSettings:
        """The method's settings: of a saved model those it was made with."""
        return self.setup.saved or self.settings.quant

    @property
    def plan(self) -> Plan:
        """What is done, as the estimate wants it."""
        settings, evaluations = self.settings, self.evaluations
        compared = evaluations.for_comparison(settings.report.report)
        computed, batch = settings.statistics.act_scales is None, settings.evaluation.eval_batch_size
        return make_plan(self.setup, self.quant, evaluations, compared, computed, batch)

    @property
    def stays_whole(self) -> bool:
        """Whether the model is there as a whole all the time, and in one place."""
        return self.shards is None and not self.evaluations.spread

    def finished(self) -> dict[int, FinishedLayer]:
        """Layers that need not be computed, by index."""
        setup, output = self.setup, self.settings.output
        if output.original:
            return read_original(output.resume, setup.skeleton, setup.spec, self.quant)
        return self.checkpoint.finished(setup.layers, setup.spec) if self.checkpoint else {}


def prepare(settings: RunSettings) -> Prepared:
    """Check the settings against the model's shapes and the data. Raises InputError for whatever is wrong.

    With `--dry_run` what is only missing is noted.
    """
    quant, output = settings.quant, settings.output
    missing: list[str] | None = [] if output.dry_run else None
    setup = make_setup(
        settings.model, settings.calibration, quant.seed, not quant.bits.untouched, missing, quant.tuning.samples
    )
    if setup.saved is not None:
        refuse_for_saved(settings)
        settings = replace(settings, preset=PresetSettings())  # it was made with settings of its own
    elif not quant.bits.untouched:
        check_shapes(setup.skeleton, setup.spec, quant)
    if 0 < setup.calibration[0] < world_size():
        raise InputError(f"--nsamples {setup.calibration[0]}: fewer than the {world_size()} processes that share them")
    looks = (quant.views_layers or quant.reads_rows) and setup.calibration[0] > 0
    if looks and quant.training is not None and quant.training.batch_size < world_size():
        batch = f"--batch_size {quant.training.batch_size}"
        raise InputError(f"{batch}: leaves some of the {world_size()} processes without samples to decide by")
    if settings.evaluation.sensitivity.asked and quant.bits.untouched:
        raise InputError("--sensitivity: 16-bit weights and activations leave nothing to spend bits on; drop the flag")
    if settings.evaluation.sensitivity.asked and quant.tunes:
        raise InputError("--sensitivity: looks at layers before they are tuned: give --tune_samples 0")
    if settings.report.report:
        check_report(settings.report.layers.report_layers, setup.layers, quant)
    if output.save_model is not None:
        require_empty(output.save_model)
        if quant.bits.untouched:
            raise InputError("--save_model: nothing is quantized, so there is nothing to save; drop the flag")
    check_export(settings, setup, setup.saved or quant)
    context = setup.context(settings.calibration.seqlen, quant.seed)
    evaluations = open_evaluations(settings.evaluation, context, missing)
    if settings.statistics.act_scales is not None and not missing:
        load_scales(settings.statistics.act_scales, setup.origin(), setup.skeleton, setup.spec)
    shards: Shards | None = None
    if must_stream(settings, setup):
        without_weights = missing is not None and not has_weights(setup.source)
        shards = {} if without_weights else open_shards(setup.source, setup.config, setup.skeleton)
    checkpoint = open_checkpoint(settings, setup, missing)
    folder = output.output_dir / run_folder(settings, setup)
    return Prepared(settings, setup, evaluations, folder, checkpoint, shards, tuple(missing or ()))


def run_folder(settings: RunSettings, setup: Setup) -> str:
    """The name of the run's folder: two runs whose figures can differ have different ones."""
    quant = setup.saved or settings.quant
    stem = f"{setup.net}_w{quant.bits.weight}a{quant.bits.activation}" + "_original" * settings.output.original
    told = replace(settings, quant=quant)
    return folder_name(stem, told, ("wbits", "abits"))


def model_identity(setup: Setup, quant: QuantSettings, statistics: Path | None) -> dict[str, object]:
    """What decides every figure of the model that these settings make, contents and not names of files."""
    return {
        "model": model_fingerprint(setup.source, setup.config),
        "dtype": str(setup.dtype),
        "attn_implementation": setup.model.attn_implementation,
        "calibration": None if setup.tokens is None else data_fingerprint(setup.tokens),
        "activation statistics": statistics_identity(statistics),
        **flat(quant, Changes.MODEL),
    }


def statistics_identity(path: Path | None) -> str:
    """What tells a statistics file from others: its content, or that there is none."""
    return "computed" if path is None else file_digest(path)


def must_stream(settings: RunSettings, setup: Setup) -> bool:
    """Whether the model is read layer by layer: by `--stream`, or because the host's memory is too small for it whole.

    Raises InputError if something that is asked for needs the whole model.
    """
    wanted, given = settings.memory.stream, "--stream reads one layer at a time"
    if wanted is False:
        return False
    if wanted is None:
        # in the dtype of its files a model is mapped from them, once for all processes of a machine
        held = 1 if setup.config.dtype is setup.compute_dtype else local_size()
        needed, free = held * model_bytes(setup.skeleton, setup.compute_dtype), from_main(available_memory)
        if setup.saved is not None or needed <= FILLED * free:
            return False
        reason = f"the model needs {needed / 1e9:.1f} GB of the host's memory and {free / 1e9:.1f} GB are free"
        logger.info("%s: it is streamed", reason)
        given = f"{reason}, so it must be streamed, layer by layer (or give --no-stream)"
    if setup.saved is not None:
        raise InputError(f"--stream: {setup.source.name} is quantized already and can only be loaded whole; drop it")
    needing = [entry.FLAG for entry in settings.evaluation.asked() if entry.NEEDS_WHOLE_MODEL]
    needing += ["--verify"] * settings.output.verify + ["--tune_samples"] * settings.quant.tunes
    if needing:
        raise InputError(f"{given}, and {needing[0]} needs the whole model: drop one of the two")
    return True


def check_report(chosen: tuple[int, ...] | None, layers: int, quant: QuantSettings) -> None:
    """Raise InputError for a report that could not be drawn: of layers the model has not, or of no quantization."""
    if quant.bits.untouched:
        raise InputError("--report: 16-bit weights and activations leave nothing to show; drop the flag")
    for layer in chosen or ():
        if layer >= layers:
            raise InputError(f"--report_layers {layer}: the model has layers 0 to {layers - 1}")


def refuse_for_saved(settings: RunSettings) -> None:
    """Raise InputError for flags that make no sense for a model that is quantized already."""
    output = settings.output
    given = {"--act-scales": settings.statistics.act_scales, "--eval_kl": settings.evaluation.perplexity.eval_kl}
    given |= {"--sensitivity": settings.evaluation.sensitivity.sensitivity, "--tune_samples": settings.quant.tunes}
    given |= {"--report": settings.report.report, "--save_dir": output.save_dir, "--resume": output.resume}
    for flag, value in (given | {"--save_model": output.save_model}).items():
        if value:
            named = settings.model.model
            raise InputError(f"{flag}: {named} is quantized already and can only be evaluated; drop the flag")


def open_checkpoint(settings: RunSettings, setup: Setup, missing: list[str] | None) -> Checkpoint | None:
    """The checkpoint folder that `--resume` or `--save_dir` names, if any. Of several processes the main one has it.

    With `--dry_run` it is only looked at: None. Whether it is of this run shows only if nothing is `missing`.
    """
    output, quant = settings.output, settings.quant
    resumed = output.resume is not None and not output.original
    if quant.bits.untouched and (output.resume or output.save_dir):
        raise InputError("--save_dir and --resume: 16-bit weights and activations leave nothing to keep; drop the flag")
    if not is_main() or not (resumed or output.save_dir):
        return None
    if output.dry_run:
        if not resumed:
            require_new(output.save_dir)
        elif missing:
            missing.append(f"--resume {output.resume}: whether it is of this run shows when nothing else is missing")
        else:
            require_same_run(output.resume, checkpoint_identity(settings, setup))
        return None
    identity = checkpoint_identity(settings, setup)
    if resumed:
        return Checkpoint.resume(output.resume, identity)
    needed = checkpoint_bytes(setup.skeleton, setup.spec, quant)
    return Checkpoint.create(output.save_dir, identity, setup.source.name, needed)


def checkpoint_identity(settings: RunSettings, setup: Setup) -> dict[str, object]:
    """What decides the state of every layer: a checkpoint is used only where all of it is the same."""
    made = {f"--{name}": value for name, value in flat(settings.quant, Changes.LAYERS).items()}
    statistics = statistics_identity(settings.statistics.act_scales)
    return {
        "model config": config_digest(setup.config),
        "model weights": weights_digest(setup.source, setup.config),
        "calibration data": data_fingerprint(setup.tokens),
        "dtype": str(setup.dtype),
        **({"activation statistics": statistics} if settings.quant.smooth else {}),
        **made,
        "--attn_implementation": setup.model.attn_implementation,
    }


def resume_command(argv: list[str], folder: Path) -> str:
    """The command that goes on with the checkpoint in `folder`."""
    flags = ("--save_dir", "--resume")
    kept, skip = [], False
    for argument in argv:
        if not skip and argument.partition("=")[0] not in flags:
            kept.append(argument)
        skip = not skip and argument in flags
    return shlex.join(["python", *kept, "--resume", str(folder)])
