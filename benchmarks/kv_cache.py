"""What the packed KV cache saves and what it costs: bytes per token, and the time of a token, beside the simulated one.

    python benchmarks/kv_cache.py
    python benchmarks/kv_cache.py --shape 2048 8 2 --contexts 512 2048 --dtype bfloat16
    python benchmarks/kv_cache.py --model MODEL_DIR --device cuda --dtype float16

The simulated cache holds the floats that k's and v's codes decode to. Of a model that is not quantized, q, k and v
alone are: a cache depends on nothing else. Both caches are filled with the same tokens, then decode in turn; bytes are
those of the tensors they hold, for float16 two for each of their numbers. Prints medians, the median ratio of the
times, and whether all logits are the same to the bit.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from duquant.attention import attach_, install, make_attention_quantizer
from duquant.cache import PackedCache
from duquant.scheme import Scheme, TensorScheme
from models import decoder_spec
from models.load import ModelSource, load_config, load_model
from models.saved import load_saved_model, read_settings
from utils.device import DTYPES
from utils.results import format_table

ROOT = Path(__file__).resolve().parents[1]


def open_model(args: argparse.Namespace) -> nn.Module:
    """A model whose attention is quantized: that of --model, or random weights of --shape."""
    dtype, device = DTYPES[args.dtype], torch.device(args.device)
    if args.shape is None:
        source = ModelSource(args.model)
        config = load_config(source)
        saved = read_settings(config)
        if saved is not None:
            del config.quantization_config
            return load_saved_model(source, config, decoder_spec(config), saved, dtype, "sdpa").to(device)
        model = load_model(source, config, dtype, "sdpa")
    else:
        hidden, layers, kv_heads = args.shape
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=kv_heads,
            max_position_embeddings=max(args.contexts) + args.tokens,
        )
        model = LlamaForCausalLM(config).to(dtype).eval()
    quantize_attention_(model, Scheme(key=TensorScheme(bits=args.kbits), value=TensorScheme(bits=args.vbits)))
    return model.to(device)


def quantize_attention_(model: nn.Module, scheme: Scheme) -> None:
    """Let every layer's attention round q, k and v."""
    install(model)
    spec = decoder_spec(model.config)
    for layer in spec.decoder_layers(model):
        attention = layer.get_submodule(spec.attention)
        attach_(attention, make_attention_quantizer(scheme, attention.head_dim, model.device))


@torch.no_grad()
def decode_timed(model: nn.Module, token: Tensor, cache: Cache) -> tuple[float, Tensor]:
    """Seconds that one more token takes, and its logits."""
    if token.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    logits = model(token, past_key_values=cache).logits
    if token.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, logits


@torch.no_grad()
def measure(model: nn.Module, context: int, count: int) -> list[str]:
    """A row of the table: both caches filled with `context` tokens, then `count` tokens through one and the other."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, context + count), generator=generator).to(model.device)
    simulated, packed = DynamicCache(config=model.config), PackedCache(model)
    for cache in (simulated, packed):
        model(tokens[:, :context], past_key_values=cache, logits_to_keep=1)
    pairs, same = [], True
    for at in range(context, context + count):
        (plain, expected), (here, found) = (
            decode_timed(model, tokens[:, at : at + 1], cache) for cache in (simulated, packed)
        )
        pairs.append((plain, here))
        same = same and torch.equal(found, expected)
    held = [tensor for layer in simulated.layers for tensor in (layer.keys, layer.values)]
    numbers, floats = sum(tensor.numel() for tensor in held), sum(tensor.nbytes for tensor in held)
    length = context + count
    sizes = [f"{size / length:,.0f}" for size in (2 * numbers, floats, packed.nbytes)]
    seconds = [f"{1000 * statistics.median(side):.2f}" for side in zip(*pairs, strict=True)]
    ratio = statistics.median(here / plain for plain, here in pairs)
    return [f"{context:,}", *sizes, f"{packed.nbytes / (2 * numbers):.3f}", *seconds, f"{ratio:.2f}", str(same)]


def main() -> None:
    """Measure every context length and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "assets/tiny-llama"), help="quantized and saved, or any other")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("HIDDEN", "LAYERS", "KV_HEADS"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 960])
    parser.add_argument("--tokens", type=int, default=32, help="tokens that are decoded behind each context")
    parser.add_argument("--kbits", type=int, default=4)
    parser.add_argument("--vbits", type=int, default=4)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = open_model(args)
    measure(model, 16, 4)  # warm up
    rows = [measure(model, context, args.tokens) for context in args.contexts]
    name = args.model if args.shape is None else "random, hidden size {}, {} layers, {} kv heads".format(*args.shape)
    print(f"{name}, {model.dtype}, {args.device}")  # a saved model has the dtype it was saved in
    columns = ["float16 B/token", "simulated", "packed", "packed/float16", "simulated ms/token", "packed", "ratio"]
    print(format_table(["tokens before", *columns, "same logits"], rows))


if __name__ == "__main__":
    main()
