"""How much the lazy rows save: the greedy search with and without them, on a probe of a 7B model's shape.

    python benchmarks/search.py
    python benchmarks/search.py --channels 11008 --device cuda

Three probes: Gaussian; with normal outliers (a few channels large for all tokens); with massive outliers as well (a
few tokens thousands of times the median, as at the input of down_proj). Prints medians and the ratio of the two
searches run in turn, and checks that their trajectories are the same.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantize.greedy import greedy_rotation
from quantize.rotation import random_orthogonal, step_rotation
from quantize.rotation_settings import RotationOrder, SearchRule
from utils.results import format_table


def make_probe(kind: str, tokens: int, channels: int) -> torch.Tensor:
    """A probe [tokens, channels] with outliers of the given kind."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator)
    if kind != "gaussian":
        x[:, torch.randperm(channels, generator=generator)[:6]] *= 40
    if kind == "massive":
        rows = torch.randperm(tokens, generator=generator)[:4]
        columns = torch.randperm(channels, generator=generator)[:3]
        x[rows[:, None], columns] = 1500 * torch.randn(4, 3, generator=generator).sign()
    return x


def timed(device: torch.device, x: torch.Tensor, step: torch.Tensor, steps: int, lazy: bool):
    """Seconds of one search, and its result."""
    started = time.perf_counter()
    search = greedy_rotation(x, step, steps, SearchRule.CHANNEL, lazy=lazy)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, search


def main() -> None:
    """Time the searches in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    step = step_rotation(random_orthogonal(args.block_size, torch.Generator().manual_seed(1)), RotationOrder.RQ)
    rows = []
    for kind in ("gaussian", "normal", "massive"):
        x = make_probe(kind, args.tokens, args.channels).to(device)
        timed(device, x, step, 4, True)  # warm up
        pairs = [[timed(device, x, step, args.steps, lazy) for lazy in (False, True)] for _ in range(args.repeats)]
        plain, lazy = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(pair[0][0] / pair[1][0] for pair in pairs)
        same = all(torch.equal(pair[0][1].exchanges, pair[1][1].exchanges) for pair in pairs)
        kept = len(pairs[0][1][1].exchanges)
        rows.append([kind, f"{plain:.2f}", f"{lazy:.3f}", f"{ratio:.1f}", "yes" if same else "NO", str(kept)])
    print(f"{args.tokens}×{args.channels}, blocks of {args.block_size}, {args.steps} steps, {device}")
    print(format_table(["probe", "plain s", "lazy s", "ratio", "same trajectory", "steps kept"], rows))


if __name__ == "__main__":
    main()
