"""Quantize a language model with DuQuant and measure it.

Walks the decoder layers one at a time: smoothing, greedy block rotation, zigzag permutation, second rotation, fake
quantization of weights, activations, q, k and v. Then evaluates, and writes results.json and log.txt to a folder in
OUTPUT_DIR that is named after the settings.
"""

import argparse

from experiment.cli import Parser, run_script
from experiment.options import RunSettings
from utils.settings import add_flags, from_flags

EXAMPLES = """examples:
  bash run.sh                                       the bundled model, with its comparison table
  python main.py --model meta-llama/Llama-2-7b-hf --smooth --alpha 0.6 --wbits 4 --abits 4 \\
      --lac 0.9 --swc 0.8 --eval_ppl                the paper's W4A4 experiment
  python main.py --model DIR --calib_dataset wikitext2=train.txt --test_dataset wikitext2=test.txt \\
      --abits 4 --smooth --eval_ppl                 offline, with local copies of the text
"""


def parse_flags() -> argparse.Namespace:
    """The command line's flags."""
    parser = Parser(__doc__, EXAMPLES)
    add_flags(parser, RunSettings)
    return parser.parse_args()


def main(flags: argparse.Namespace) -> None:
    """Run the experiment that the flags describe."""
    settings = from_flags(RunSettings, flags)
    from experiment.run import run_experiment  # torch and transformers load for seconds: not for --help or a wrong flag

    run_experiment(settings)


if __name__ == "__main__":
    run_script(parse_flags, main)
