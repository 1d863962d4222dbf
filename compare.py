"""Compare ways to quantize one model, or runs that are finished.

With --model: round-to-nearest, smoothing, Hadamard rotations, the parts of DuQuant and all of it, with the same
quantizers, data and seeds, beside the full-precision model and whole presets at the same bits. Leaves table.md,
table.csv, comparison.png and .svg, results.json and log.txt in a folder in OUTPUT_DIR that is named after the settings;
every finished row is kept in rows/ there, and the same command, started again, computes what is missing. Where no
evaluation is asked for, perplexity is measured (--no_eval_ppl: none).

With folders of runs of main.py: their figures side by side, and every setting that differs. With --published, where
folders of comparisons do too: their figures beside the published ones of the same model and method.
"""

import argparse
from pathlib import Path

from experiment.cli import given_flags, parse_with_preset, read_settings, run_script
from experiment.rows import CompareSettings
from experiment.usual import usual_evaluation
from utils.errors import InputError
from utils.parser import Parser, set_basic
from utils.setting_flags import add_flags

EXAMPLES = """examples:
  python compare.py --model meta-llama/Llama-2-7b-hf --preset paper             with the paper's quantizers
  python compare.py --model DIR --preset paper --rows rtn dual --seeds 2 3 4    mean ± deviation
  python compare.py output/RUN_A output/RUN_B                                   runs that are finished
"""


def make_parser() -> Parser:
    """The parser of compare.py."""
    parser = Parser(__doc__, EXAMPLES, "(--model MODEL [flags] | RUN RUN ... [--output FILE.md])", short=True)
    runs = parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs, instead of a model")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="with RUNs: also write what is printed")
    beside = parser.add_argument("--published", action="store_true", help="with RUNs: beside published figures")
    set_basic(runs, True)
    set_basic(beside, True)
    add_flags(parser, CompareSettings, leave_out=("transform",))
    return parser


def parse_flags() -> argparse.Namespace:
    """The command line's flags. Raises InputError unless there is a model or there are runs, and not both."""
    parser = make_parser()
    flags = parse_with_preset(parser, CompareSettings, usual_evaluation)
    if bool(flags.runs) == bool(flags.model):
        raise InputError("give --model to compare ways to quantize it, or the folders of finished runs, and not both")
    for name in sorted(given_flags(parser) - {"runs", "output", "published", "quiet"}) if flags.runs else ():
        raise InputError(f"--{name} is for --model: finished runs are only read; drop the flag")
    return flags


def main(flags: argparse.Namespace) -> None:
    """Compare what the flags name."""
    if flags.runs:
        compare_runs([Path(folder) for folder in flags.runs], flags.published, flags.output)
        return
    if flags.output is not None:
        raise InputError("--output is for finished runs: with --model everything goes to --output_dir")
    if flags.published:
        raise InputError("--published is for finished runs: give it with their folders when the comparison is done")
    settings = read_settings(CompareSettings, flags)
    if not settings.evaluation.asked():
        raise InputError(
            "nothing to compare by: drop --no_eval_ppl, or add --tasks, --eval_mmlu, --eval_mtbench or --prompt"
        )
    from experiment.compare import run_comparison  # torch and transformers load for seconds

    run_comparison(settings, flags.taken)


def compare_runs(folders: list[Path], published: bool, output: Path | None) -> None:
    """Put finished runs side by side, or beside what is published."""
    from experiment.published import published_text
    from experiment.tables import side_by_side

    text = published_text(folders) if published else side_by_side(folders)
    if output is not None:
        from utils.io import write_text

        try:
            write_text(output, text)
        except OSError as error:
            raise InputError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(text)


if __name__ == "__main__":
    run_script(parse_flags, main)
