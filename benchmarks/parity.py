"""Perplexity and quantization seconds against the original code's, setting by setting.

    python benchmarks/parity.py --model MODEL_DIR --tokens TOKENS.safetensors --reference REFERENCE.json

The reference file lists, under the model folder's name, settings with the perplexity and seconds that the original
reached with the same tokens. Prints a table per setting, and with --variants the mean over the W4A4 settings of every
search rule, order and probe.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.perplexity import perplexity
from models import decoder_spec
from models.load import ModelSource, load_config, load_model
from quantize.bits import BitSettings, ClipSettings
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationOrder, RotationSettings, SearchRule
from quantize.settings import Probe, QuantSettings, SmoothSettings
from quantize.statistics import channel_statistics
from utils.results import format_table

CPU = torch.device("cpu")


def quant_config(settings: dict, rule: SearchRule, order: RotationOrder, probe: Probe) -> QuantSettings:
    """The method's settings from an entry of the reference file."""
    return QuantSettings(
        bits=BitSettings(settings["wbits"], settings["abits"], symmetric=settings.get("symmetric", False)),
        clip=ClipSettings(settings["lac"], settings["swc"]),
        smooth=SmoothSettings(settings["alpha"]),
        rotation=RotationSettings(
            settings["block_size"], settings["max_rotation_step"], settings["permutation_times"], rule, order
        ),
        probe=probe,
        seed=settings["seed"],
    )


class Bench:
    """A model with its tokens and statistics; `measure` quantizes a fresh copy."""

    def __init__(self, model: str, tokens: Path):
        self.source = ModelSource(model)
        self.config = load_config(self.source)
        self.spec = decoder_spec(self.config)
        self.tokens = {name: value.long() for name, value in load_file(tokens).items()}
        self.peaks = channel_statistics(self.open_model(), self.spec, self.tokens["calibration"], CPU).scales

    def open_model(self):
        """A fresh full-precision copy of the model."""
        return load_model(self.source, self.config, torch.float32, "sdpa")

    def measure(self, config: QuantSettings) -> tuple[float, float]:
        """Perplexity, and the seconds of quantization."""
        model = self.open_model()
        started = time.perf_counter()
        quantize_model(model, self.spec, self.tokens["calibration"], self.peaks, config, CPU)
        seconds = time.perf_counter() - started
        return perplexity(model, self.spec, self.tokens["test"], CPU).perplexity, seconds


def label(settings: dict) -> str:
    """A short name of the settings."""
    parts = [f"W{settings['wbits']}A{settings['abits']}", f"B{settings['block_size']}"]
    parts += [f"P{settings['permutation_times']}", f"lac {settings['lac']}", f"swc {settings['swc']}"]
    return " ".join(parts + (["symmetric"] if settings.get("symmetric") else []) + [f"seed {settings['seed']}"])


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--variants", action="store_true", help="also compare search rules, orders and probes")
    args = parser.parse_args()
    reference = json.loads(args.reference.read_text())[Path(args.model).name]
    runs = [run for run in reference["runs"] if run["perplexity"] is not None]
    bench = Bench(args.model, args.tokens)

    rows, ratios = [], []
    for run in runs:
        config = quant_config(run["settings"], SearchRule.ROW, RotationOrder.RQ, Probe.MEAN)
        ppl, seconds = bench.measure(config)
        ratios.append((ppl / run["perplexity"], run["seconds"] / seconds))
        shown = [f"{ppl:.4f}", f"{run['perplexity']:.4f}", f"{ratios[-1][0]:.3f}"]
        rows.append([label(run["settings"]), *shown, f"{seconds:.1f}", f"{run['seconds']:.1f}", f"{ratios[-1][1]:.1f}"])
    header = ["settings (row, RQ)", "ppl", "original", "ratio", "s", "original s", "speed-up"]
    print(format_table(header, rows))
    print(f"median ratio {statistics.median(r for r, _ in ratios):.3f}", end=", ")
    print(f"median speed-up {statistics.median(s for _, s in ratios):.1f}")
    if args.variants:
        settings = [run["settings"] for run in runs if run["settings"]["wbits"] == 4]
        rows = []
        for rule, order, probe in itertools.product(SearchRule, RotationOrder, Probe):
            ppls = [bench.measure(quant_config(each, rule, order, probe))[0] for each in settings]
            rows.append([f"{rule} {order} {probe}", f"{statistics.mean(ppls):.4f}", f"{statistics.stdev(ppls):.4f}"])
        print(format_table([f"variant, {len(settings)} W4A4 settings", "mean ppl", "spread"], rows))


if __name__ == "__main__":
    main()
