"""Generation in batches against one text at a time: tokens per second, and whether the tokens are the same.

    python benchmarks/generation.py                              # the bundled model
    python benchmarks/generation.py --shape 1024 2816 4          # random weights: hidden size, MLP, layers
    python benchmarks/generation.py --shape 4096 11008 32 --device cuda --dtype float16 --texts 32 --batches 32

Prompts of different lengths, and every text has all its `--new_tokens`. The sizes of batches take turns, `--rounds`
times; the ratio is the median of those of each round. `same`: texts whose tokens are those of one at a time."""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.decoding import Request, write_tokens
from utils.device import DTYPES
from utils.results import format_table

ROOT = Path(__file__).resolve().parents[1]


def open_model(args: argparse.Namespace) -> nn.Module:
    """The model of --model, or random weights of --shape."""
    dtype = DTYPES[args.dtype]
    if args.shape is None:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to(args.device)
    hidden, mlp, layers = args.shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    return LlamaForCausalLM(config).to(dtype).eval().to(args.device)


def measure(model: nn.Module, requests: list[Request], size: int) -> tuple[float, list[list[int]]]:
    """Seconds for all requests, `size` at a time, and what was written."""
    started, written = time.perf_counter(), []
    for start in range(0, len(requests), size):
        written += write_tokens(model, requests[start : start + size], lambda _: False, model.device)
    return time.perf_counter() - started, written


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "assets/tiny-llama"), help="any model of transformers")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("HIDDEN", "MLP", "LAYERS"))
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--prompt_tokens", type=int, nargs=2, default=[8, 64], metavar=("FEWEST", "MOST"))
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model, generator = open_model(args), torch.Generator().manual_seed(0)
    fewest, most = args.prompt_tokens
    lengths = torch.randint(fewest, most + 1, (args.texts,), generator=generator).tolist()
    vocabulary = model.config.vocab_size
    requests = [
        Request(torch.randint(vocabulary, (length,), generator=generator).tolist(), args.new_tokens)
        for length in lengths
    ]
    sizes = [1, *args.batches]
    measure(model, requests[:2], 2)  # warm up
    seconds = {size: [] for size in sizes}
    for _ in range(args.rounds):
        written = {}
        for size in sizes:
            taken, written[size] = measure(model, requests, size)
            seconds[size].append(taken)
    rows = []
    for size in sizes:
        ratio = statistics.median(alone / here for alone, here in zip(seconds[1], seconds[size], strict=True))
        same = sum(here == alone for here, alone in zip(written[size], written[1], strict=True))
        speed = args.texts * args.new_tokens / statistics.median(seconds[size])
        rows.append([str(size), f"{speed:.1f}", f"{ratio:.2f}", f"{same} of {args.texts}"])
    name = args.model if args.shape is None else "random, hidden size {}, MLP {}, {} layers".format(*args.shape)
    print(f"{name}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads: {args.texts} texts")
    print(format_table(["at a time", "tokens/s", "ratio", "same"], rows))


if __name__ == "__main__":
    main()
