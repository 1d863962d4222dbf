"""Activation statistics of a run: whether it needs them, the file they may be in, and keeping them there."""

import argparse
import logging
from pathlib import Path

from torch import Tensor

from experiment.session import Setup
from quantize.settings import QuantSettings
from quantize.statistics import ChannelStatistics, load_scales, same_calibration, save_statistics
from utils.distributed import is_main

logger = logging.getLogger(__name__)


def needs_peaks(quant: QuantSettings, layers_left: bool) -> bool:
    """Whether something is still to be smoothed; `layers_left`: whether there are layers that are not finished."""
    return quant.smooth is not None and layers_left and not quant.bits.untouched


def known_peaks(args: argparse.Namespace, setup: Setup) -> dict[str, Tensor] | None:
    """Channel peaks by linear name from the file, if it is of this model and data; None if they must be computed."""
    path = scales_path(args, setup)
    if args.act_scales is None and not (path.exists() and same_calibration(path, setup.origin())):
        return None
    logger.info("activation statistics: %s", path)
    return load_scales(path, setup.origin(), setup.skeleton, setup.spec)


def keep_statistics(args: argparse.Namespace, setup: Setup, statistics: ChannelStatistics) -> None:
    """Write what was computed, unless there is a file of another model or of other data."""
    path = scales_path(args, setup)
    if path.exists():
        logger.info("activation statistics: computed; %s is of another model or other data and was left alone", path)
    elif is_main():
        shifts = args.act_shifts or Path("act_shifts") / f"{setup.net}.safetensors"
        try:
            save_statistics(statistics, path, shifts, setup.origin())
            logger.info("activation statistics: computed, kept in %s", path)
        except OSError as error:
            logger.warning("activation statistics: computed, not kept (%s)", error)


def scales_path(args: argparse.Namespace, setup: Setup) -> Path:
    """The file that the run reads, or keeps its own in."""
    return args.act_scales or Path("act_scales") / f"{setup.net}.safetensors"
