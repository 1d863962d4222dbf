"""Record per-channel activation statistics of one model, for smoothing.

For every linear of every decoder layer: the largest magnitude of each input channel (scale) and its running midpoint
(shift) over the calibration samples. main.py --smooth does this by itself when it finds no file; run this script to
do it once for many experiments.
"""

import argparse
import time
from pathlib import Path

from experiment.options import add_calibration_options, add_model_options
from experiment.script import Parser, run_script
from utils.errors import InputError


def parse_flags() -> argparse.Namespace:
    """The command line's flags."""
    parser = Parser(__doc__)
    add_model_options(parser)
    add_calibration_options(parser)
    group = parser.add_argument_group("output")
    for flag, folder in (("--scales-output-path", "act_scales"), ("--shifts-output-path", "act_shifts")):
        group.add_argument(flag, type=Path, default=Path(folder), help="folder of <net>.safetensors")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Compute and write."""
    # torch and transformers load for seconds: not for --help or a wrong flag
    from experiment.session import make_setup, open_model
    from quantize.statistics import channel_statistics, save_statistics

    setup = make_setup(args)
    if setup.saved is not None:
        raise InputError(f"--model {args.model}: is quantized already; give the full-precision model")
    model = open_model(setup, args.attn_implementation)
    started = time.perf_counter()
    statistics = channel_statistics(model, setup.spec, setup.tokens, setup.device)
    paths = [folder / f"{setup.net}.safetensors" for folder in (args.scales_output_path, args.shifts_output_path)]
    try:
        save_statistics(statistics, *paths, setup.origin())
    except OSError as error:
        raise InputError(f"the statistics cannot be written ({error})") from None
    seconds = time.perf_counter() - started
    print(f"{paths[0]}, {paths[1]}: {len(statistics.scales)} linears, {len(setup.tokens)} samples, {seconds:.1f} s")


if __name__ == "__main__":
    run_script(parse_flags, main)
