"""Draw the report of a finished run, from what main.py --report saved in its folder.

Writes RUN_DIR/report/index.html, one page with everything in it, and its figures as PNG and SVG beside it.
"""

import argparse
from pathlib import Path

from experiment.cli import run_script
from experiment.options import ReportLayers
from utils.parser import Parser
from utils.setting_flags import add_flags, from_flags

EXAMPLES = """examples:
  python report.py output/tiny-llama_w4a4
  python report.py output/Llama-2-7b-hf_w4a4 --report_layers 0,1,15,31
"""


def parse_flags() -> argparse.Namespace:
    """The command line's flags."""
    parser = Parser(__doc__, EXAMPLES, "RUN_DIR [flags]")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder with results.json, as main.py wrote it")
    add_flags(parser, ReportLayers)
    return parser.parse_args()


def main(flags: argparse.Namespace) -> None:
    """Draw what the flags name."""
    from reporting.page import write_report  # matplotlib loads for seconds: not for --help or a wrong flag

    print(write_report(flags.run_dir, from_flags(ReportLayers, flags).report_layers))


if __name__ == "__main__":
    run_script(parse_flags, main)
