"""Quantize a language model with DuQuant and measure it.

Walks the decoder layers one at a time: smoothing, greedy block rotation, zigzag permutation, second rotation, fake
quantization of weights, activations, q, k and v. Then evaluates, and writes results.json and log.txt to
OUTPUT_DIR/<net>_w<wbits>a<abits>/.
"""

import argparse

from evaluation.settings import EvaluationSettings
from experiment.options import (
    add_calibration_options,
    add_memory_options,
    add_model_options,
    add_output_options,
    add_quantization_options,
    add_report_options,
    add_smoothing_options,
    add_transform_options,
    make_quant_config,
)
from experiment.script import Parser, run_script
from utils.flags import refuse_idle
from utils.settings import add_flags, from_flags

EXAMPLES = """examples:
  bash run.sh                                       the bundled model, with its comparison table
  python main.py --model meta-llama/Llama-2-7b-hf --smooth --alpha 0.6 --wbits 4 --abits 4 \\
      --lac 0.9 --swc 0.8 --eval_ppl                the paper's W4A4 experiment
  python main.py --model DIR --calib_dataset wikitext2=train.txt --test_dataset wikitext2=test.txt \\
      --abits 4 --smooth --eval_ppl                 offline, with local copies of the text
"""


def main(args: argparse.Namespace) -> None:
    """Run the experiment that the flags describe."""
    quant = make_quant_config(args)
    from_flags(EvaluationSettings, args)  # wrong ones are named before anything is loaded
    refuse_idle("report", args.report, report_layers=args.report_layers)
    from experiment.run import run_experiment  # torch and transformers load for seconds: not for --help or a wrong flag

    run_experiment(args, quant)


def parse_flags() -> argparse.Namespace:
    """The command line's flags."""
    parser = Parser(__doc__, EXAMPLES)
    add_model_options(parser)
    add_memory_options(parser)
    add_calibration_options(parser)
    add_quantization_options(parser)
    add_smoothing_options(parser)
    add_transform_options(parser)
    add_flags(parser, EvaluationSettings)
    add_output_options(parser)
    add_report_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(parse_flags, main)
