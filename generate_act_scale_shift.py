"""Record per-channel activation statistics of one model, for smoothing.

For every linear of every decoder layer: the largest magnitude of each input channel (scale) and its running midpoint
(shift) over the calibration samples. main.py --smooth does this by itself when it finds no file; run this script to
do it once for many experiments.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiment.cli import run_script
from experiment.options import CalibrationSettings, ModelSettings
from quantize.settings import seed_option
from utils.errors import InputError
from utils.parser import Parser
from utils.setting_flags import add_flags, from_flags
from utils.settings import Changes, option, part


@dataclass(frozen=True)
class StatisticsSettings:
    """Everything that this script is told."""

    TITLE: ClassVar[str] = "output"

    model: ModelSettings = part(ModelSettings)
    calibration: CalibrationSettings = part(CalibrationSettings)
    seed: int = seed_option()
    scales: Path = option(
        Path("act_scales"),
        "folder of <net>.safetensors",
        flag="scales_output_path",
        changes=Changes.NOTHING,
    )
    shifts: Path = option(
        Path("act_shifts"),
        "folder of <net>.safetensors",
        flag="shifts_output_path",
        changes=Changes.NOTHING,
    )


def parse_flags() -> argparse.Namespace:
    """The command line's flags."""
    parser = Parser(__doc__, usage="--model MODEL [flags]")
    add_flags(parser, StatisticsSettings)
    return parser.parse_args()


def main(flags: argparse.Namespace) -> None:
    """Compute and write."""
    settings = from_flags(StatisticsSettings, flags)
    # torch and transformers load for seconds: not for --help or a wrong flag
    from experiment.estimate import Plan
    from experiment.residence import settle_
    from experiment.setup import make_setup, open_model
    from quantize.settings import QuantSettings
    from quantize.statistics import channel_statistics, save_statistics

    setup = make_setup(settings.model, settings.calibration, settings.seed)
    if setup.saved is not None:
        raise InputError(f"--model {setup.source.name}: is quantized already; give the full-precision model")
    model = open_model(setup)
    settle_(model, setup, QuantSettings(), Plan(setup.dtype, setup.device.type == "cuda", setup.calibration))
    started = time.perf_counter()
    statistics = channel_statistics(model, setup.spec, setup.tokens, setup.device)
    paths = [folder / f"{setup.net}.safetensors" for folder in (settings.scales, settings.shifts)]
    try:
        save_statistics(statistics, *paths, setup.origin())
    except OSError as error:
        raise InputError(f"the statistics cannot be written ({error})") from None
    seconds = time.perf_counter() - started
    print(f"{paths[0]}, {paths[1]}: {len(statistics.scales)} linears, {len(setup.tokens)} samples, {seconds:.1f} s")


if __name__ == "__main__":
    run_script(parse_flags, main)
