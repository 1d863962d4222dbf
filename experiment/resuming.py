"""Where a run's checkpoint is, whose it is, and how to go on with it."""

import argparse
import shlex
from pathlib import Path

from experiment.session import Setup
from models.load import config_digest, weights_digest
from quantize.checkpoint import Checkpoint, bytes_needed, require_new, require_same_run
from quantize.original import read_original
from quantize.settings import QuantSettings
from quantize.state import FinishedLayer
from utils.data import data_fingerprint
from utils.distributed import is_main
from utils.errors import InputError
from utils.io import file_digest
from utils.results import plain


def open_checkpoint(args: argparse.Namespace, setup: Setup, quant: QuantSettings) -> Checkpoint | None:
    """The checkpoint folder that `--resume` or `--save_dir` names, if any. Of several processes the main one has it.

    With `--dry_run` it is only looked at: None.
    """
    if quant.bits.untouched and (args.resume or args.save_dir):
        raise InputError("--save_dir and --resume: 16-bit weights and activations leave nothing to keep; drop the flag")
    if not is_main():
        return None
    if args.dry_run:
        return check_checkpoint(args, setup)
    if args.resume is not None and not is_original(args.resume):
        return Checkpoint.resume(args.resume, identity(args, setup))
    if args.save_dir is not None:
        needed = bytes_needed(setup.skeleton, setup.spec, quant)
        return Checkpoint.create(args.save_dir, identity(args, setup), args.model, needed)
    return None


def check_checkpoint(args: argparse.Namespace, setup: Setup) -> None:
    """Raise InputError if the folder cannot be begun, or gone on with; it is left as it is."""
    if args.resume is not None and not is_original(args.resume):
        require_same_run(args.resume, identity(args, setup))
    if args.save_dir is not None:
        require_new(args.save_dir)


def is_original(path: Path) -> bool:
    """Whether `--resume` names a checkpoint of the paper's own code."""
    return path.suffix == ".pth"


def finished_layers(
    resume: Path | None, checkpoint: Checkpoint | None, setup: Setup, quant: QuantSettings
) -> dict[int, FinishedLayer]:
    """Layers that need not be computed, by index."""
    if resume is not None and is_original(resume):
        return read_original(resume, setup.skeleton, setup.spec, quant)
    return checkpoint.finished(setup.layers, setup.spec) if checkpoint else {}


def identity(args: argparse.Namespace, setup: Setup) -> dict[str, object]:
    """What decides the state of every layer: a checkpoint is used only where all of it is the same."""
    flags = ["wbits", "abits", "group_size", "symmetric", "lac", "swc", "smooth", "transform", "probe", "seed"]
    flags += ["block_size", "max_rotation_step", "permutation_times", "rotation_search", "rotation_order"]
    flags += ["alpha", "smooth_weight_peak", "gqa_smooth"] if args.smooth else []
    flags += ["lwc", "attn_implementation"]
    flags += ["epochs", "lwc_lr", "wd", "batch_size", "aug_loss"] if args.lwc else []
    statistics = file_digest(args.act_scales) if args.act_scales else "computed"
    return {
        "model config": config_digest(setup.config),
        "model weights": weights_digest(setup.source, setup.config),
        "calibration data": data_fingerprint(setup.tokens),
        "dtype": str(setup.dtype),
        **({"activation statistics": statistics} if args.smooth else {}),
        **{f"--{flag}": plain(getattr(args, flag)) for flag in flags},
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
