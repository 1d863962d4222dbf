"""Quantize a language model with DuQuant and measure it.

Walks the decoder layers one at a time: smoothing, greedy block rotation, zigzag permutation, second rotation, fake
quantization of weights, activations, q, k and v. Then evaluates, and writes results.json and log.txt to a folder in
OUTPUT_DIR that is named after the settings.
"""

import argparse

from experiment.cli import Parser, parse_with_preset, read_settings, run_script
from experiment.options import RunSettings
from utils.settings import add_flags

EXAMPLES = """examples:
  bash run.sh                                       the bundled model, with its comparison table
  python main.py --model meta-llama/Llama-2-7b-hf --preset paper --eval_ppl
                                                    the paper's W4A4 experiment
  python main.py --model DIR --calib_dataset wikitext2=train.txt --test_dataset wikitext2=test.txt \\
      --abits 4 --smooth --eval_ppl                 offline, with local copies of the text
"""


def parse_flags() -> argparse.Namespace:
    """The command line's flags."""
    parser = Parser(__doc__, EXAMPLES)
    add_flags(parser, RunSettings)
    return parse_with_preset(parser, RunSettings)


def main(flags: argparse.Namespace) -> None:
    """Run the experiment that the flags describe."""
    settings = read_settings(RunSettings, flags)
    from experiment.run import run_experiment  # torch and transformers load for seconds: not for --help or a wrong flag

    run_experiment(settings)


if __name__ == "__main__":
    run_script(parse_flags, main)
