"""Quantize a language model with DuQuant and measure it: --model alone is the paper's W4A4 and perplexity.

Walks the decoder layers one at a time: smoothing, greedy block rotation, zigzag permutation, second rotation, fake
quantization of weights, activations, q, k and v. Then evaluates, and writes results.json and log.txt to a folder in
OUTPUT_DIR that is named after the settings.

Where no flag decides what the quantized layers are, the preset is paper (--preset none: the flags' own defaults).
Where no evaluation is asked for, perplexity is measured (--no_eval_ppl: none). A folder that --save_model wrote keeps
the settings it was made with.
"""

import argparse
import sys

from experiment.cli import parse_with_preset, read_settings, run_script
from experiment.options import RunSettings
from experiment.usual import usual_run
from utils.parser import Parser, set_basic
from utils.setting_flags import add_flags

EXAMPLES = """examples:
  python main.py --model meta-llama/Llama-2-7b-hf                        the paper's W4A4, perplexity of WikiText-2
  python main.py --model DIR --preset best --save_model OUT              the best without training, and keep it
  python main.py --model DIR --calib_dataset a.txt --test_dataset b.txt  offline, on text of your own
"""


def parse_flags() -> argparse.Namespace:
    """The command line's flags."""
    parser = Parser(__doc__, EXAMPLES, "--model MODEL [flags]", short=True)
    doctor = parser.add_argument("--doctor", action="store_true", help="say what is installed and works here; no model")
    set_basic(doctor, True)
    add_flags(parser, RunSettings)
    return parse_with_preset(parser, RunSettings, usual_run)


def main(flags: argparse.Namespace) -> None:
    """Run the experiment that the flags describe, or look at the machine."""
    if flags.doctor:
        from experiment.doctor import examine

        sys.exit(examine())
    settings = read_settings(RunSettings, flags)
    from experiment.run import run_experiment  # torch and transformers load for seconds: not for --help or a wrong flag

    run_experiment(settings, flags.taken)


if __name__ == "__main__":
    run_script(parse_flags, main)
