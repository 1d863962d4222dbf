"""One run, checked: what will be done, before any weight is loaded."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

from evaluation.runner import Evaluations, open_evaluations
from evaluation.settings import EvaluationSettings
from experiment.measuring import evaluation_context
from experiment.resuming import open_checkpoint
from experiment.session import Setup, make_setup
from models.shards import Shards, open_shards
from quantize.checkpoint import Checkpoint
from quantize.config import QuantConfig
from quantize.export import require_empty
from quantize.record import Recorder
from quantize.statistics import load_scales
from quantize.walk import check_shapes
from utils.distributed import is_main, world_size
from utils.errors import InputError
from utils.memory import available_memory
from utils.settings import from_flags

FILLED = 0.9  # of the free memory: the most that a model may take as a whole
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Flags, model and calibration data, the method's settings, what is measured, folder, checkpoint.

    `shards`: where the weights are, if they are read layer by layer.
    """

    args: argparse.Namespace
    setup: Setup
    quant: QuantConfig
    evaluations: Evaluations
    folder: Path
    checkpoint: Checkpoint | None
    shards: Shards | None = None

    def recorder(self) -> Recorder | None:
        """What looks on while layers are quantized, if a report is to be drawn."""
        return Recorder(self.folder / "report/data") if self.args.report and is_main() else None


def prepare(args: argparse.Namespace, quant: QuantConfig) -> Run:
    """Check the flags against the model's shapes and the data. Raises InputError for whatever is wrong."""
    setup = make_setup(args)
    if setup.saved is None:
        check_shapes(setup.skeleton, setup.spec, quant)
    else:
        quant = setup.saved
        refuse_for_saved(args)
    if setup.tokens is not None and len(setup.tokens) < world_size():
        raise InputError(f"--nsamples {len(setup.tokens)}: fewer than the {world_size()} processes that share them")
    if args.report:
        check_report(args.report_layers, setup.layers, quant)
    if args.save_model is not None:
        require_empty(args.save_model)
    evaluations = open_evaluations(from_flags(EvaluationSettings, args), evaluation_context(args, setup))
    if args.act_scales is not None:
        load_scales(args.act_scales, setup.origin(), setup.skeleton, setup.spec)
    shards = open_shards(setup.source, setup.config, setup.skeleton) if must_stream(args, setup) else None
    folder = args.output_dir / f"{setup.net}_{quant.label}"
    return Run(args, setup, quant, evaluations, folder, open_checkpoint(args, setup, quant), shards)


def must_stream(args: argparse.Namespace, setup: Setup) -> bool:
    """Whether the model is read layer by layer: by `--stream`, or because the host's memory is too small for it whole.

    Raises InputError if something needs the whole model.
    """
    if args.stream is False:
        return False
    given = "--stream reads one layer at a time"
    if args.stream is None:
        needed, free = model_bytes(setup), available_memory()
        if setup.saved is not None or needed <= FILLED * free:
            return False
        reason = f"the model needs {needed / 1e9:.1f} GB of the host's memory and {free / 1e9:.1f} GB are free"
        logger.info("%s: it is streamed", reason)
        given = f"{reason}, so it must be streamed, layer by layer (or give --no-stream)"
    refuse_for_stream(args, setup, given)
    return True


def refuse_for_stream(args: argparse.Namespace, setup: Setup, given: str) -> None:
    """Raise InputError for what needs the whole model at once; `given`: why it is not there."""
    if setup.saved is not None:
        raise InputError(f"--stream: {args.model} is quantized already and can only be loaded whole; drop the flag")
    if world_size() > 1:
        raise InputError(f"{given}, in a single process: start one, without a launcher")
    needing = [entry.FLAG for entry in from_flags(EvaluationSettings, args).asked() if entry.NEEDS_WHOLE_MODEL]
    needing += ["--save_model"] if args.save_model else []
    if needing:
        raise InputError(f"{given}, and {needing[0]} needs the whole model: drop one of the two")


def model_bytes(setup: Setup) -> int:
    """Host memory that the whole model takes, as `open_model` holds it."""
    width = 4 if setup.device.type == "cpu" else setup.dtype.itemsize
    return width * sum(parameter.numel() for parameter in setup.skeleton.parameters())


def check_report(chosen: list[int] | None, layers: int, quant: QuantConfig) -> None:
    """Raise InputError for a report that could not be drawn: of layers the model has not, or of no quantization."""
    if quant.bits.untouched:
        raise InputError("--report: 16-bit weights and activations leave nothing to show; drop the flag")
    for layer in chosen or []:
        if layer >= layers:
            raise InputError(f"--report_layers {layer}: the model has layers 0 to {layers - 1}")


def refuse_for_saved(args: argparse.Namespace) -> None:
    """Raise InputError for flags that make no sense for a model that is quantized already."""
    given = {"--act-scales": args.act_scales, "--eval_kl": args.eval_kl, "--report": args.report}
    given |= {"--save_dir": args.save_dir, "--resume": args.resume, "--save_model": args.save_model}
    for flag, value in given.items():
        if value:
            raise InputError(f"{flag}: {args.model} is quantized already and can only be evaluated; drop the flag")
