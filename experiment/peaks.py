"""Activation statistics of a run: whether it needs them, the file they may be in, and keeping them there."""

import logging
from pathlib import Path

from torch import Tensor

from experiment.plan import Run
from quantize.statistics import ChannelStatistics, load_scales, same_calibration, save_statistics
from utils.distributed import is_main

logger = logging.getLogger(__name__)


def needs_peaks(run: Run, layers_left: bool) -> bool:
    """Whether something is smoothed; `layers_left`: whether the run's own model has layers that are not finished."""
    own = run.quant.smooth and layers_left and not run.quant.bits.untouched
    return bool(own) or "smooth" in run.args.baselines


def known_peaks(run: Run) -> dict[str, Tensor] | None:
    """Channel peaks by linear name from the file, if it is of this model and data; None if they must be computed."""
    setup, path = run.setup, scales_path(run)
    if run.args.act_scales is None and not (path.exists() and same_calibration(path, setup.origin())):
        return None
    logger.info("activation statistics: %s", path)
    return load_scales(path, setup.origin(), setup.skeleton, setup.spec)


def keep_statistics(run: Run, statistics: ChannelStatistics) -> None:
    """Write what was computed, unless there is a file of another model or of other data."""
    path = scales_path(run)
    if path.exists():
        logger.info("activation statistics: computed; %s is of another model or other data and was left alone", path)
    elif is_main():
        shifts = run.args.act_shifts or Path("act_shifts") / f"{run.setup.net}.safetensors"
        try:
            save_statistics(statistics, path, shifts, run.setup.origin())
            logger.info("activation statistics: computed, kept in %s", path)
        except OSError as error:
            logger.warning("activation statistics: computed, not kept (%s)", error)


def scales_path(run: Run) -> Path:
    """The file that the run reads, or keeps its own in."""
    return run.args.act_scales or Path("act_scales") / f"{run.setup.net}.safetensors"
