"""One run, checked: what will be done, before any weight is loaded."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from experiment.evaluations import Evaluations, plan_evaluations
from experiment.resuming import open_checkpoint
from experiment.session import Setup, make_setup
from quantize.checkpoint import Checkpoint
from quantize.config import QuantConfig
from quantize.export import require_empty
from quantize.statistics import load_scales
from quantize.walk import check_shapes
from utils.errors import InputError


@dataclass(frozen=True)
class Run:
    """Flags, model and calibration data, the method's settings, what is measured, folder, checkpoint."""

    args: argparse.Namespace
    setup: Setup
    quant: QuantConfig
    evaluations: Evaluations
    folder: Path
    checkpoint: Checkpoint | None


def prepare(args: argparse.Namespace, quant: QuantConfig) -> Run:
    """Check the flags against the model's shapes and the data. Raises InputError for whatever is wrong."""
    setup = make_setup(args)
    if setup.saved is None:
        check_shapes(setup.skeleton, setup.spec, quant)
    else:
        quant = setup.saved
        refuse_for_saved(args)
    if args.report:
        check_report(args.report_layers, setup.layers, quant)
    if args.save_model is not None:
        require_empty(args.save_model)
    evaluations = plan_evaluations(args, setup)
    if args.act_scales is not None:
        load_scales(args.act_scales, setup.origin(), setup.skeleton, setup.spec)
    folder = args.output_dir / f"{setup.net}_{quant.label}"
    return Run(args, setup, quant, evaluations, folder, open_checkpoint(args, setup, quant))


def check_report(chosen: list[int] | None, layers: int, quant: QuantConfig) -> None:
    """Raise InputError for a report that could not be drawn: of layers the model has not, or of no quantization."""
    if quant.bits.untouched:
        raise InputError("--report: 16-bit weights and activations leave nothing to show; drop the flag")
    for layer in chosen or []:
        if layer >= layers:
            raise InputError(f"--report_layers {layer}: the model has layers 0 to {layers - 1}")


def refuse_for_saved(args: argparse.Namespace) -> None:
    """Raise InputError for flags that make no sense for a model that is quantized already."""
    given = {"--act-scales": args.act_scales, "--baselines": args.baselines, "--eval_kl": args.eval_kl}
    given |= {"--report": args.report}
    given |= {"--save_dir": args.save_dir, "--resume": args.resume, "--save_model": args.save_model}
    for flag, value in given.items():
        if value:
            raise InputError(f"{flag}: {args.model} is quantized already and can only be evaluated; drop the flag")
