"""The flags of compare.py: main.py's for a model, but for those that say what the rows are."""

import argparse
from pathlib import Path

from evaluation.settings import EvaluationSettings, entries
from experiment.options import (
    add_calibration_options,
    add_model_options,
    add_quantization_options,
    add_search_options,
    add_smoothing_options,
    add_track_option,
)
from experiment.rows import ROWS, SMOOTH
from experiment.script import Parser
from quantize.config import Transform
from utils.errors import InputError
from utils.settings import add_flags, from_flags

EXAMPLES = """examples:
  python compare.py --model meta-llama/Llama-2-7b-hf --alpha 0.6 --abits 4 --lac 0.9 --swc 0.8 --eval_ppl
  python compare.py --model DIR --rows full rtn smooth dual --seeds 2 3 4 --abits 4 --eval_ppl
  python compare.py output/Llama-2-7b-hf_w4a4 other/Llama-2-7b-hf_w4a4
"""
NOT_FOR_ROWS = {"transform": Transform.DUAL, "save_dir": None, "resume": None, "save_model": None}
NOT_FOR_ROWS |= {"report": False, "report_layers": None}


def make_parser(description: str) -> Parser:
    """The parser of compare.py."""
    parser = Parser(description, EXAMPLES)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs, instead of a model")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="with RUNs: also write what is printed")
    add_model_options(parser, required=False)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--rows", nargs="+", choices=ROWS, help="which rows (default: all); full is the full-precision model"
    )
    group.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="one or more, of the calibration samples drawn and of the random rotations; the table has mean ± sample "
        "standard deviation (default: --seed)",
    )
    group.add_argument(
        "--no_smooth", dest="smooth", action="store_false", help="no smoothing before rotations and permutations"
    )
    group.add_argument(
        "--output_dir", type=Path, default=Path("output"), help="everything goes to <net>_w4a4_compare/ in here"
    )
    add_track_option(group)
    add_calibration_options(parser)
    add_quantization_options(parser)
    add_smoothing_options(parser)
    add_search_options(parser.add_argument_group("rotation and permutation"))
    add_flags(parser, EvaluationSettings)
    parser.set_defaults(smooth=True, **NOT_FOR_ROWS)
    return parser


def parse_flags(description: str) -> argparse.Namespace:
    """The command line's flags. Raises InputError unless there is a model or there are runs, and not both."""
    parser = make_parser(description)
    args = parser.parse_args()
    if bool(args.runs) == bool(args.model):
        raise InputError("give --model to compare ways to quantize it, or the folders of finished runs, and not both")
    args.given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    return args


def check_runs(args: argparse.Namespace) -> None:
    """Raise InputError for flags that finished runs have no use for."""
    for name in args.given:
        if name not in ("runs", "output", "quiet"):
            raise InputError(f"--{name} is for --model: finished runs are only read; drop the flag")


def check_comparison(args: argparse.Namespace) -> None:
    """Raise InputError for a comparison that cannot be; complete the rows and seeds."""
    if args.output is not None:
        raise InputError("--output is for finished runs: with --model everything goes to --output_dir")
    if not from_flags(EvaluationSettings, args).asked():
        *others, last = (entry.FLAG for entry in entries())
        raise InputError(f"nothing to compare by: add {', '.join(others)} or {last}")
    if min(args.wbits, args.abits) >= 16:
        raise InputError(f"--wbits {args.wbits} --abits {args.abits}: nothing is quantized, so every row is the same")
    if not args.smooth and SMOOTH in (args.rows or ()):
        raise InputError("--rows smooth is the row that only smooths: drop it or --no_smooth")
    seeds = args.seeds or [args.seed]
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise InputError(f"--seeds {seed}: must be between 0 and {2**32 - 1}")
    args.rows = args.rows or [row for row in ROWS if args.smooth or row != SMOOTH]
    args.seeds = list(dict.fromkeys(seeds))
    args.seed = args.seeds[0]
