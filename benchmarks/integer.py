"""One decoder layer of a 7B model on a CPU: integers against floats, in time and in memory.

    OMP_NUM_THREADS=2 python benchmarks/integer.py                    # Llama-2-7B's shape, 512 tokens
    python benchmarks/integer.py --shape 1024x2816 --tokens 1         # other widths; decoding

The layer has random codes of 4 bits in the formats of the paper (one range per output channel and token), two rotations
of blocks of 128 and a permutation per input; attention, its quantizers and norms are all in the time. The ways to
compute take turns, `--rounds` times; the figures are medians of the ratios of each turn, and every way's outputs are
held against the reference's. Memory is what processes of their own hold: one to a way, after the layer was made
(`weights`: its growth over the layer's other parts, beside float16) and at its peak in two calls.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.zoo import shape_config
from duquant.attention import attach_, install, make_attention_quantizer
from duquant.formats import IntegerFormat
from duquant.hadamard import hadamard
from duquant.linear import GroupInput, QuantLinear
from duquant.packing import PackedCodes, packed_width
from duquant.quantizer import Quantizer, RatioClip
from duquant.runtime import set_runtime_
from duquant.scheme import Scheme
from duquant.transform import DualTransform
from utils.results import format_table

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
FORM, BLOCK = IntegerFormat(4), 128
WAYS = {  # name → (runtime, expand) of a quantized layer, or the dtype of an ordinary one
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "reference, once": ("reference", "once"),
    "integer, per call": ("integer", "per_call"),
    "integer, once": ("integer", "once"),
}


def random_codes(outputs: int, channels: int, generator: torch.Generator) -> PackedCodes:
    """Random packed codes of a weight with a standard deviation of about 0.02."""
    values = torch.randint(256, (outputs, packed_width(channels, FORM)), dtype=torch.uint8, generator=generator)
    return PackedCodes(values, torch.full((outputs, 1), 0.004), torch.full((outputs, 1), 8.0), channels)


def quantize_(model: LlamaModel, generator: torch.Generator) -> None:
    """Put random codes in the place of the linears of the model's layer, which may be on the meta device."""
    layer, rotation = model.layers[0], hadamard(BLOCK)
    for paths in GROUPS:
        channels = layer.get_submodule(paths[0]).in_features
        order = torch.randperm(channels, generator=generator)[None]
        transform = DualTransform(torch.stack((rotation, rotation)), order)
        group = GroupInput(transform, Quantizer(FORM, RatioClip(0.9)), len(paths))
        for path in paths:
            parent, _, name = path.rpartition(".")
            codes = random_codes(layer.get_submodule(path).out_features, channels, generator)
            setattr(layer.get_submodule(parent), name, QuantLinear(codes, FORM, None, group))
    head_dim = layer.self_attn.head_dim
    attach_(layer.self_attn, make_attention_quantizer(Scheme(), head_dim, torch.device("cpu")))


def make(way: str, config: LlamaConfig) -> LlamaModel:
    """A model of one layer that computes in that way; random, and the same for all that are quantized."""
    how, generator = WAYS[way], torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = LlamaModel(config).eval().requires_grad_(False)
    if isinstance(how, tuple):
        install(model)
        quantize_(model, generator)
        set_runtime_(model, *how)
    dtype = torch.float32 if isinstance(how, tuple) else how
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = (
                    torch.ones(parameter.shape) if parameter.dim() == 1 else torch.empty(parameter.shape, dtype=dtype)
                )
                setattr(module, name, torch.nn.Parameter(value.to(dtype), requires_grad=False))
                if parameter.dim() > 1:
                    value.normal_(0, 0.02, generator=generator)
    model.rotary_emb = type(model.rotary_emb)(config)
    return model


@torch.no_grad()  # as generation and evaluations do it
def called(model: LlamaModel, x: Tensor) -> Tensor:
    """The hidden states [1, T, C] behind the layer."""
    return model(inputs_embeds=x.to(model.norm.weight.dtype), use_cache=False).last_hidden_state.float()


def status(field: str) -> int:
    """Bytes of this process, from Linux: `VmRSS` that it holds, `VmHWM` that it has held at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def held(way: str, config: LlamaConfig, tokens: int) -> dict[str, int]:
    """Bytes of this process for the layer: held behind two calls, and at most in them, above what came before."""
    x = torch.randn(1, tokens, config.hidden_size)
    small = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_attention_heads=2, num_hidden_layers=1, vocab_size=8
    )
    called(make(way, small), torch.randn(1, 2, 256))  # libraries are loaded
    before = settled()
    model = make(way, config)
    for _ in range(2):
        called(model, x)
    return {"weights": settled() - before, "peak": status("VmHWM") - before}


def settled() -> int:
    """Bytes that this process holds, without what the allocator keeps of tensors that are gone."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def memory(args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """`held` of every way, each in a process of its own."""
    figures = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--shape", args.shape, "--tokens", str(args.tokens), "--held", way]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures[way] = json.loads(done.stdout.splitlines()[-1])
    return figures


def times(config: LlamaConfig, tokens: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of a call by way and round, and each way's relative distance to the reference's outputs."""
    x = torch.randn(1, tokens, config.hidden_size, generator=torch.Generator().manual_seed(1))
    models = {way: make(way, config) for way in WAYS}
    outputs = {way: called(model, x) for way, model in models.items()}
    exact = outputs["reference, once"]
    off = {way: ((each - exact).norm() / exact.norm()).item() for way, each in outputs.items()}
    seconds = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, model in models.items():
            started = time.perf_counter()
            called(model, x)
            seconds[way].append(time.perf_counter() - started)
    return seconds, off


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", help="a model of the zoo with Llama's layers, or HIDDENxMLP")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--held", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = shape_config(args.shape, 1)
    config.vocab_size, config._attn_implementation = 8, "sdpa"
    if args.held:
        print(json.dumps(held(args.held, config, args.tokens)))
        return
    bytes_ = memory(args)
    seconds, off = times(config, args.tokens, args.rounds)
    half = bytes_["bfloat16"]
    rows = []
    for way in WAYS:
        ratios = [
            statistics.median(a / b for a, b in zip(seconds[base], seconds[way], strict=True))
            for base in ("float32", "bfloat16")
        ]
        sizes = [bytes_[way]["weights"] / half["weights"], bytes_[way]["peak"] / half["peak"]]
        shown = (
            f"{off[way]:.1e}" if isinstance(WAYS[way], tuple) else "",
            *(f"{each:.2f}" for each in (*ratios, *sizes)),
        )
        rows.append([way, f"{statistics.median(seconds[way]) * 1e3:.1f}", *shown])
    header = ["way", "ms", "off", "speed / float32", "speed / bfloat16", "held / 16 bit", "peak / 16 bit"]
    print(f"{args.shape}: one layer, {args.tokens} tokens, {torch.get_num_threads()} threads")
    print(format_table(header, rows))
    print(json.dumps({"shape": args.shape, "tokens": args.tokens, "seconds": seconds, "off": off, "bytes": bytes_}))


if __name__ == "__main__":
    main()
