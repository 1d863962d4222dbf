"""Write the base rotations of DuQuant to one safetensors file.

Optional: main.py builds every size it needs in milliseconds. The file is for looking at them and for other programs.
"""

import argparse
from pathlib import Path

from experiment.cli import run_script
from utils.errors import InputError
from utils.log import progress
from utils.parser import Parser

LARGEST = 4096


def parse_flags() -> argparse.Namespace:
    """The command line's flags."""
    parser = Parser(__doc__)
    powers = [2**k for k in range(1, LARGEST.bit_length())]
    target = Path("rotations/base_rotations.safetensors")
    parser.add_argument("--output", type=Path, default=target, help="file to write")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=powers, help="block sizes to write (default: all powers of two to 4096)"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Build and write."""
    for size in args.sizes:
        if size < 2:
            raise InputError(f"--sizes {size}: a rotation needs at least 2 channels")
    from quantize.rotation import base_rotation  # torch loads for seconds: not for --help or a wrong flag
    from utils.io import write_tensors

    rotations = {f"base_{size}": base_rotation(size) for size in progress(sorted(set(args.sizes)), "base rotations")}
    try:
        write_tensors(args.output, rotations)
    except OSError as error:
        raise InputError(f"--output {args.output}: cannot be written ({error.strerror})") from None
    megabytes = sum(rotation.nbytes for rotation in rotations.values()) / 1e6
    print(f"{args.output}: {len(rotations)} rotations, {megabytes:.1f} MB, keys base_<size>")


if __name__ == "__main__":
    run_script(parse_flags, main)
