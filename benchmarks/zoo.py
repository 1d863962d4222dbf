"""Models of the zoo's true shapes: what each needs, and random weights of one to time the method on.

    python benchmarks/zoo.py --table                                           the table of docs/any-size.md
    python benchmarks/zoo.py --shape llama-2-7b                                one layer, on the GPU if there is one
    python benchmarks/zoo.py --shape llama-2-7b --whole --dtype bfloat16       all layers
    python benchmarks/zoo.py --shape llama-2-7b --whole --windows 341          and perplexity on so many test windows
    python benchmarks/zoo.py --shape 1024x2816 --profile                       any widths; the costliest functions

The weights are random but the activations have an LLM's shape: a few channels of every norm are large, and one MLP
neuron fires thousands of times the median on a few tokens. Settings are the paper's (W4A4, blocks of 128, 256 steps,
smoothing 0.6), or another preset's. Layers and vocabulary beyond those asked for are left out: statistics and
quantization take the same time for every layer. The last line is the figures as JSON.
"""

import argparse
import cProfile
import json
import pstats
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from duquant.linear import expanded
from evaluation.perplexity import perplexity
from experiment.dry_run import size
from experiment.estimate import Plan, estimate
from experiment.options import Keep
from experiment.presets import PRESETS, preset_quant
from experiment.residence import choose_residence
from models import decoder_spec
from models.load import load_skeleton, pick_dtype
from models.zoo import SHAPES, zoo_config
from quantize.bits import BitSettings, ClipSettings
from quantize.quantization import Quantization
from quantize.rotation_settings import RotationSettings
from quantize.settings import QuantSettings, SmoothSettings
from quantize.spec import DecoderSpec
from quantize.statistics import channel_statistics
from quantize.walk import layers_in_memory, walk
from utils.batching import BatchSize
from utils.capacity import free_device_memory
from utils.device import DTYPES, describe, peak_memory, pick_device
from utils.log import setup_console
from utils.results import format_table

SETTINGS = QuantSettings(BitSettings(4, 4), ClipSettings(0.9, 0.8), SmoothSettings(0.6))
WIKITEXT2_WINDOWS = 341  # of 2048 tokens, as Llama 2's tokenizer makes them
VOCABULARY = 4096  # of a model whose layers are timed
NORMAL_OUTLIERS, NORMAL_FACTOR = 6, 30.0
MASSIVE_NEURON, MASSIVE_FACTOR = 7, 20.0  # what it gives must fit into float16


def requirements() -> str:
    """The table of what every model needs for the paper's experiment with perplexity on WikiText-2."""
    rows = []
    for name in SHAPES:
        config = zoo_config(name)
        skeleton, windows = load_skeleton(config), ((WIKITEXT2_WINDOWS, 2048),)
        gpu, cpu = (
            estimate(skeleton, decoder_spec(config), SETTINGS, Plan(config.dtype, on_gpu, (128, 2048), windows))
            for on_gpu in (True, False)
        )
        sizes = (gpu.weights, gpu.layer_wide, gpu.device, gpu.host, gpu.host_streamed, cpu.host, cpu.host_streamed)
        shown = [size(value) for value in (*sizes, gpu.checkpoint)]
        rows.append([name, str(gpu.layers), f"{gpu.parameters / 1e9:.3f} B", *shown])
    header = ["model", "layers", "parameters", "weights, 16 bit", "one layer, float32", "GPU", "host", "host, streamed"]
    return format_table([*header, "host, no GPU", "no GPU, streamed", "checkpoint of the run"], rows)


def shape_config(shape: str, layers: int | None) -> PretrainedConfig:
    """The config of a model of the zoo, or of a Llama with the widths HIDDENxMLP and heads of 128."""
    if shape in SHAPES:
        return zoo_config(shape, layers)
    hidden, mlp = (int(width) for width in shape.split("x"))
    heads = max(1, hidden // 128)
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers or 1, num_attention_heads=heads
    )


@torch.no_grad()
def make_model(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A model of `config`'s layers with random weights and outliers, on the host.

    All layers have the same weights: drawing them takes longer than quantizing them does on a GPU.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not weights: make them anew
    generator = torch.Generator().manual_seed(0)
    for parameter in (*model.model.layers[0].parameters(), model.model.embed_tokens.weight, model.lm_head.weight):
        parameter.normal_(0, 0.02, generator=generator)
    model.model.embed_tokens.weight.mul_(50)
    model.model.norm.weight.fill_(1)
    put_outliers_(model.model.layers[0], generator)
    for layer in model.model.layers[1:]:
        layer.load_state_dict(model.model.layers[0].state_dict())
    return model.eval().requires_grad_(False)


def put_outliers_(layer: nn.Module, generator: torch.Generator) -> None:
    """Give the norms a few large channels, and one MLP neuron that fires hard where its gate is open."""
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.fill_(1)
        norm.weight[torch.randperm(len(norm.weight), generator=generator)[:NORMAL_OUTLIERS]] = NORMAL_FACTOR
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight[MASSIVE_NEURON] *= MASSIVE_FACTOR


class Stopwatch:
    """Seconds by stage, with the device done with its work at every look at the clock."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    def now(self) -> float:
        """The time when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str):
        """Add the time of the block to stage `name`."""
        started = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - started


def measure(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: torch.Tensor,
    settings: QuantSettings,
    windows: int,
    integers: bool,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of statistics, quantization and perplexity of the whole of `model`, and of its searches among that."""
    watch = Stopwatch(device)
    with watch.stage("statistics"):
        peaks = channel_statistics(model, spec, tokens, device).scales
    with watch.stage("quantize"):
        quantization = Quantization(model, spec, tokens, peaks, settings, device)
        walk(layers_in_memory(model, spec, device), [quantization], len(spec.decoder_layers(model)), "quantizing")
    if windows:
        test = torch.randint(VOCABULARY, (windows, tokens.shape[1]), generator=torch.Generator().manual_seed(1))
        batch = BatchSize.choose(None, tokens.shape[1], device)
        with watch.stage("perplexity"), expanded(model, integers):
            perplexity(model, spec, test, device, batch_size=batch)
    return {**watch.seconds, "search": quantization.search_seconds}


def show(figures: dict, whole: int) -> str:
    """The figures of a run as a table: a layer, all that was run, and the model of `whole` layers."""
    layers = figures["layers"]
    rows = [
        [stage, *(f"{seconds * factor:.2f}" for factor in (1 / layers, 1, whole / layers))]
        for stage, seconds in figures["seconds"].items()
    ]
    return format_table(["seconds", "per layer", f"{layers} layer(s)", f"{whole} layers"], rows)


def main() -> None:
    """Print the table, or build, time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="what every model of the zoo needs, and nothing else")
    parser.add_argument("--shape", default="llama-2-7b", help=f"{', '.join(SHAPES)}, or HIDDENxMLP")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="all layers of the model")
    parser.add_argument("--nsamples", type=int, help="calibration samples (default: 128 on a GPU, 4 on a CPU)")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: float32 on a CPU")
    parser.add_argument("--device")
    parser.add_argument("--windows", type=int, default=0, help="test windows, which need the model's own vocabulary")
    parser.add_argument("--integers", action="store_true", help="perplexity multiplies codes")
    parser.add_argument("--preset", choices=list(PRESETS), default="paper", help="as main.py's")
    parser.add_argument("--search_rows", type=int, help="as main.py's (default: all)")
    parser.add_argument("--keep", choices=list(Keep), default=Keep.AUTO, help="as main.py's")
    parser.add_argument(
        "--tf32", action="store_true", help="a GPU may multiply any float32 in TF32, as main.py does not"
    )
    parser.add_argument(
        "--warm", action="store_true", help="first all of it on one layer: kernels are compiled, libraries loaded"
    )
    parser.add_argument("--profile", action="store_true", help="also the functions that took longest")
    args = parser.parse_args()
    if args.table:
        print(requirements())
        return
    setup_console()
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    device, whole = pick_device(args.device), shape_config(args.shape, None).num_hidden_layers
    config = shape_config(args.shape, None if args.whole else args.layers)
    dtype = pick_dtype(args.dtype, config, device, DTYPES)
    samples = args.nsamples or (128 if device.type == "cuda" else 4)
    tokens = torch.randint(VOCABULARY, (samples, args.seqlen), generator=torch.Generator().manual_seed(0))
    if not args.windows:
        config.vocab_size = VOCABULARY
    settings = preset_quant(PRESETS[args.preset], replace(SETTINGS, rotation=RotationSettings(rows=args.search_rows)))
    if args.warm:
        single = shape_config(args.shape, 1)
        single.vocab_size = config.vocab_size
        measure(make_model(single, dtype), decoder_spec(single), tokens, settings, args.windows, args.integers, device)
    model, spec = make_model(config, dtype), decoder_spec(config)
    plan = Plan(dtype, device.type == "cuda", (samples, args.seqlen), ((args.windows, args.seqlen),))
    needed = estimate(load_skeleton(config), spec, settings, plan)
    kept = choose_residence(Keep(args.keep), needed, free_device_memory(device), whole=True)
    if kept.weights:
        model.to(device)
    profile = cProfile.Profile()
    if args.profile:
        profile.enable()
    seconds = measure(model, spec, tokens, settings, args.windows, args.integers, device)
    if args.profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    figures = {
        "shape": args.shape,
        "preset": args.preset,
        "tf32": args.tf32,
        "layers": len(spec.decoder_layers(model)),
        "dtype": str(dtype),
        "nsamples": samples,
    }
    figures |= {"seqlen": args.seqlen, "device": describe(device), "seconds": seconds, **peak_memory(device)}
    print(f"{args.shape}, {dtype}, {samples}×{args.seqlen} tokens, {figures['device']}; kept there: {kept}")
    print(show(figures, whole))
    print(", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in peak_memory(device).items()))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
