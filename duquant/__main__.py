"""Write text with a quantized model, or measure how fast it is.

python -m duquant FOLDER --prompt "Once upon a time"
python -m duquant bench FOLDER --base MODEL
"""

import argparse
import sys
import time
from collections.abc import Container, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from duquant.bench import compare, table
from duquant.loading import DTYPES, base_model, load_quantized, peak_bytes, pick_device, quieten, require_model
from duquant.runtime import EXPANSIONS, RUNTIMES


class Parser(argparse.ArgumentParser):
    """Its errors are one line, and exit code 2. Flags are written out; they may have a `-` for every `_`."""

    def __init__(self, prog: str, **arguments):
        super().__init__(prog, allow_abbrev=False, **arguments)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse does, with either spelling."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([spelled(each, self._option_string_actions) for each in given], namespace)

    def error(self, message: str):
        """Print one line on stderr and exit."""
        raise SystemExit(refuse(f"{message}; see {self.prog} --help"))


def spelled(argument: str, known: Container[str]) -> str:
    """An argument, with `_` for every `-` in the name of a flag that is known so."""
    flag, equals, value = argument.partition("=")
    plain = f"--{flag[2:].replace('-', '_')}"
    return f"{plain}{equals}{value}" if flag.startswith("--") and plain in known else argument


class TimedStreamer(TextStreamer):
    """Prints text as it is written, and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then every token."""
        self.times.append(time.perf_counter())
        super().put(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    benches = arguments[:1] == ["bench"]
    flags = bench_parser().parse_args(arguments[1:]) if benches else text_parser().parse_args(arguments)
    quieten()
    try:
        (bench if benches else write)(flags)
    except ValueError as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def text_parser() -> Parser:
    """The flags of `python -m duquant`."""
    parser = Parser("python -m duquant", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--prompt", required=True, help="what the text begins with")
    parser.add_argument("--max_new_tokens", type=count, default=128, help="how many tokens to write at most (128)")
    return parser


def bench_parser() -> Parser:
    """The flags of `python -m duquant bench`."""
    parser = Parser("python -m duquant bench", description="Measure a quantized model beside what it was made from.")
    add_common(parser)
    parser.add_argument("--base", help="what it was made from: a folder or a hub id (what the folder's card names)")
    parser.add_argument("--prompt_tokens", type=count, default=512, help="how many tokens to read (512)")
    parser.add_argument("--new_tokens", type=count, default=32, help="how many tokens to write (32)")
    return parser


def add_common(parser: Parser) -> None:
    """Add what both commands take."""
    parser.add_argument("folder", help="what main.py --save_model wrote: a folder or a hub id")
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default="integer",
        help="what linears multiply (integer, where a kernel serves the device)",
    )
    parser.add_argument(
        "--expand",
        choices=EXPANSIONS,
        default="per_call",
        help="when what they multiply is made of packed weights: once takes more memory (per_call)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (an accelerator if there is one)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of what is not quantized (auto)")


def count(text: str) -> int:
    """A number from 1 on."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def write(flags: argparse.Namespace) -> None:
    """Stream the text to stdout, and say on stderr how fast it came. Raises ValueError for what cannot be used."""
    device = pick_device(flags.device)
    model, tokenizer = open_model(flags, device)
    inputs = tokenizer(flags.prompt, return_tensors="pt").to(device)
    prompt = inputs["input_ids"].shape[1]
    if prompt == 0:
        raise ValueError("--prompt: has no tokens")
    streamer = TimedStreamer(tokenizer)
    with torch.no_grad():
        model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=flags.max_new_tokens,
            do_sample=False,
            streamer=streamer,
        )
    print(speed_line(streamer.times, prompt, peak_bytes(device)), file=sys.stderr)


def speed_line(times: Sequence[float], prompt: int, peak: int) -> str:
    """What is said behind the text; `times`: when the prompt was given, and when each token came."""
    tokens = len(times) - 1
    seconds = times[-1] - times[1]
    speed = f", {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 and seconds > 0 else ""
    return f"{tokens} tokens{speed}; prompt: {prompt} in {times[1] - times[0]:.2f} s; peak memory: {peak / 1e9:.2f} GB"


def bench(flags: argparse.Namespace) -> None:
    """Print a table to stdout. Raises ValueError for what cannot be used."""
    device = pick_device(flags.device)
    base = flags.base or base_model(flags.folder)
    if flags.base is not None:
        require_model(flags.base)
    lengths = (flags.prompt_tokens, flags.new_tokens)
    speeds = compare(lambda: open_model(flags, device)[0], base, device, lengths)
    print(table(speeds, device))
    if base is None:
        note = "no base model is at hand that its card names; to measure that too give --base"
        print(f"{flags.folder}: {note}", file=sys.stderr)


def open_model(flags: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The quantized model that the flags name, and its tokenizer."""
    return load_quantized(flags.folder, device, flags.dtype, flags.runtime, flags.expand)


def refuse(message: str) -> int:
    """Say in one line what is wrong; the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
