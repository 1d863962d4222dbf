"""Quantize decoder layers of a real model's shape, with random weights and synthetic outliers, and time it.

    python benchmarks/real_shape.py                                          one Llama-2-7B layer on this CPU, float32
    python benchmarks/real_shape.py --device cuda --dtype float16 --layers 32 --nsamples 128      the whole model on a
    GPU

The weights are random but the activations have an LLM's shape: a few channels of every norm are large, and one MLP
neuron fires thousands of times the median on a few tokens. Settings are the paper's: blocks of 128, 256 steps,
smoothing 0.6.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import decoder_spec
from quantize.config import BitConfig, ClipConfig, QuantConfig, SmoothConfig
from quantize.statistics import channel_statistics
from quantize.walk import quantize_model
from utils.device import DTYPES, describe, peak_memory
from utils.log import setup_console

SHAPES = {  # hidden size, MLP size, heads, kv heads
    "llama-2-7b": (4096, 11008, 32, 32),
    "llama-3-8b": (4096, 14336, 32, 8),
    "llama-2-70b": (8192, 28672, 64, 8),
}
NORMAL_OUTLIERS, NORMAL_FACTOR = 6, 30.0
MASSIVE_FACTOR = 60.0


@torch.no_grad()
def make_model(shape: str, layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of `layers` equal decoder layers with random weights and outliers, on the host."""
    hidden, mlp, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
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


def put_outliers_(layer: torch.nn.Module, generator: torch.Generator) -> None:
    """Give the norms a few large channels, and one MLP neuron that fires hard where its gate is open."""
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.fill_(1)
        norm.weight[torch.randperm(len(norm.weight), generator=generator)[:NORMAL_OUTLIERS]] = NORMAL_FACTOR
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight[7] *= MASSIVE_FACTOR


def main() -> None:
    """Build, record statistics, quantize, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--nsamples", type=int, default=4, help="calibration samples of --seqlen random tokens")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    setup_console()
    device = torch.device(args.device)
    model = make_model(args.shape, args.layers, DTYPES[args.dtype])
    spec = decoder_spec(model.config)
    tokens = torch.randint(4096, (args.nsamples, args.seqlen), generator=torch.Generator().manual_seed(0))
    config = QuantConfig(BitConfig(4, 4), ClipConfig(0.9, 0.8), SmoothConfig(0.6))
    started = time.perf_counter()
    peaks = channel_statistics(model, spec, tokens, device).scales
    recorded = time.perf_counter()
    quantize_model(model, spec, tokens, peaks, config, device)
    done = time.perf_counter()
    memory = peak_memory(device)
    samples = f"{args.nsamples}×{args.seqlen} tokens"
    print(f"{args.shape}, {args.layers} layer(s), {args.dtype}, {samples}, {describe(device)}")
    print(f"statistics {(recorded - started) / args.layers:.2f} s a layer, {recorded - started:.1f} s in all")
    print(f"quantize   {(done - recorded) / args.layers:.2f} s a layer, {done - recorded:.1f} s in all")
    print(", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in memory.items()))


if __name__ == "__main__":
    main()
