"""Compare ways to quantize one model, or runs that are finished.

With --model: round-to-nearest, smoothing, a Hadamard rotation, the parts of DuQuant and all of it, with the same
quantizers, data and seeds, beside the full-precision model. Leaves table.md, table.csv, comparison.png and .svg,
results.json and log.txt in OUTPUT_DIR/<net>_w<wbits>a<abits>_compare/; every finished row is kept in rows/ there, and
the same command, started again, computes what is missing.

With folders of runs of main.py: their figures side by side, and every setting that differs.
"""

import argparse
from pathlib import Path

from experiment.comparison_options import check_comparison, check_runs, parse_flags
from experiment.options import make_quant_config
from experiment.script import run_script
from utils.errors import InputError


def main(args: argparse.Namespace) -> None:
    """Compare what the flags name."""
    if args.runs:
        compare_runs(args)
    else:
        compare_methods(args)


def compare_runs(args: argparse.Namespace) -> None:
    """Put finished runs side by side."""
    check_runs(args)
    from experiment.side_by_side import side_by_side

    text = side_by_side([Path(folder) for folder in args.runs])
    if args.output is not None:
        from utils.io import write_text

        try:
            write_text(args.output, text)
        except OSError as error:
            raise InputError(f"--output {args.output}: cannot be written ({error.strerror})") from None
    print(text)


def compare_methods(args: argparse.Namespace) -> None:
    """Quantize one model in every way asked for."""
    check_comparison(args)
    quant = make_quant_config(argparse.Namespace(**{**vars(args), "lwc": False}))  # a row of its own, beside --swc
    from experiment.compare import run_comparison  # torch and transformers load for seconds

    run_comparison(args, quant)


if __name__ == "__main__":
    run_script(lambda: parse_flags(__doc__), main)
