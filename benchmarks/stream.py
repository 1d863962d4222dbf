"""Quantize and measure a checkpoint that is larger than the memory it may use, and print what memory it used.

    python benchmarks/stream.py                                       five layers of Llama-2-70B's shape, 8.6 GB
    python benchmarks/stream.py --shape llama-2-13b --layers 13       as large, in smaller layers

Writes a Llama with random weights and outliers, in float16, one file per layer, runs `main.py --stream` on it with
calibration, search, quantization, perplexity and KL divergence in full precision and quantized, and compares the peak
resident memory of that process with what was predicted before: 1.5 × one decoder layer in float32, the hidden states,
and 1 GB. The files are removed from the system's file cache first, so they are read from the disk.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPES = {  # hidden size, MLP size, heads, kv heads
    "small": (1024, 2816, 16, 16),
    "llama-2-7b": (4096, 11008, 32, 32),
    "llama-2-13b": (5120, 13824, 40, 40),
    "llama-2-70b": (8192, 28672, 64, 8),
}
VOCABULARY = 512  # the bundled tokenizer's
OUTLIERS, OUTLIER_FACTOR, MASSIVE_FACTOR = 6, 30.0, 60.0
GB = 1e9
CHUNK = 2**24


def layer_shapes(shape: str) -> dict[str, tuple[int, ...]]:
    """The tensors of one decoder layer."""
    hidden, mlp, heads, kv_heads = SHAPES[shape]
    kv = hidden // heads * kv_heads
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }


def parameters(shape: str) -> int:
    """Numbers in one decoder layer."""
    return sum(rows[0] * (rows[1] if len(rows) > 1 else 1) for rows in layer_shapes(shape).values())


def write_checkpoint(folder: Path, shape: str, layers: int) -> None:
    """A Llama of `layers` layers, a file for each and one for the rest; only one layer is in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    hidden, mlp, heads, kv_heads = SHAPES[shape]
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="float16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "assets/tiny-llama" / name, folder)
    outer = {"model.embed_tokens.weight": (VOCABULARY, hidden), "lm_head.weight": (VOCABULARY, hidden)}
    outer |= {"model.norm.weight": (hidden,)}
    index = {}
    for number in range(layers + 1):
        own = {f"model.layers.{number}.{name}": size for name, size in layer_shapes(shape).items()}
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: random_tensor(name, size, generator) for name, size in (own if number < layers else outer).items()
        }
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def random_tensor(name: str, size: tuple[int, ...], generator):
    """Weights with an LLM's outliers: a few large channels of every norm, and one MLP neuron that fires hard."""
    import torch

    if len(size) == 1:
        tensor = torch.ones(size)
        if "layernorm" in name:
            tensor[torch.randperm(size[0], generator=generator)[:OUTLIERS]] = OUTLIER_FACTOR
        return tensor.half()
    tensor = torch.empty(size).normal_(0, 1 if "embed" in name else 0.02, generator=generator).half()
    if "gate_proj" in name or "up_proj" in name:
        tensor[7] *= MASSIVE_FACTOR
    return tensor


def write_tokens(path: Path, samples: int, windows: int, length: int) -> None:
    """Random token ids for calibration [samples, length] and test [windows, length]."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    sizes = {"calibration": (samples, length), "test": (windows, length)}
    save_file({name: torch.randint(VOCABULARY, size, generator=generator) for name, size in sizes.items()}, path)


def generate(folder: Path, args: argparse.Namespace) -> None:
    """Model and tokens, made by a process of their own so that its memory is not counted."""
    context = multiprocessing.get_context("spawn")
    for target, arguments in (
        (write_checkpoint, (folder / "model", args.shape, args.layers)),
        (write_tokens, (folder / "tokens.safetensors", args.nsamples, args.windows, args.seqlen)),
    ):
        process = context.Process(target=target, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"generating the checkpoint failed in {folder}")


def forget(folder: Path) -> None:
    """Push the files out of the system's file cache (they must be on the disk for that)."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(path: Path) -> float:
    """Reading one file from the disk while nothing else is done."""
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(CHUNK)
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def run_main(folder: Path, args: argparse.Namespace) -> tuple[dict, int]:
    """Run main.py; its results, and its peak resident bytes as the system counted them."""
    flags = ["--model", folder / "model", "--net", "big", "--stream", "--cache_dir", folder / "cache"]
    flags += ["--calib_dataset", folder / "tokens.safetensors", "--test_dataset", folder / "tokens.safetensors"]
    flags += ["--dtype", "float16", "--device", "cpu", "--wbits", 4, "--abits", 4, "--lac", 0.9, "--swc", 0.8]
    flags += ["--smooth", "--alpha", 0.6, "--max_rotation_step", args.max_rotation_step]
    flags += ["--eval_ppl", "--eval_kl", "--output_dir", folder / "output"]
    command = [sys.executable, str(ROOT / "main.py"), *map(str, flags)]
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"main.py ended with {os.waitstatus_to_exitcode(status)}")
    [path] = (folder / "output").glob("*/results.json")
    return json.loads(path.read_text(encoding="utf-8")), usage.ru_maxrss * 1024


def report(args: argparse.Namespace, results: dict, peak: int, predicted: dict[str, float], alone: float) -> bool:
    """Print what was found; whether it is below what was predicted."""
    seconds, allowed = results["seconds"], sum(predicted.values())
    full = results["full_precision"]["seconds"]["perplexity"]
    split = {
        "read": seconds["read"] + seconds["load"],
        "statistics": seconds["statistics"],
        "search": seconds["search"],
        "quantize": seconds["quantize"] - seconds["search"],
        "evaluate": seconds["perplexity"] + full,
    }
    size = sum(path.stat().st_size for path in (args.folder / "model").glob("*.safetensors"))
    print(f"\n{args.shape}, {args.layers} layers, checkpoint {size / GB:.2f} GB in float16, {results['device']}")
    print(
        " + ".join(f"{name} {value / GB:.2f}" for name, value in predicted.items()), f"= {allowed / GB:.2f} GB allowed"
    )
    print(f"peak resident {peak / GB:.2f} GB ({results['peak_host_memory_bytes'] / GB:.2f} by its own account)")
    print(f"ratio {peak / allowed:.3f}: {'below' if peak < allowed else 'ABOVE'} what is allowed")
    total = seconds["total"]
    print(", ".join(f"{name} {value:.1f} s" for name, value in split.items()), f"of {total:.1f} s")
    waited = seconds["read"] / args.layers
    print(f"a layer: {alone:.2f} s to read from the disk alone, {waited:.2f} s waited for in the run")
    details = results["perplexity_details"]["tokens"]
    print(f"perplexity {details['perplexity']:.2f}, KL {details['divergence']:.4f} nats, random weights")
    return peak < allowed


def main() -> None:
    """Generate, predict, run, compare; exit code 1 if more memory was used than allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-70b")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--nsamples", type=int, default=4)
    parser.add_argument("--windows", type=int, default=4, help="evaluation windows")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--max_rotation_step", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="for checkpoint and results (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="do not delete what was generated")
    args = parser.parse_args()
    args.folder = args.folder or Path(tempfile.mkdtemp(prefix="stream_", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        if not (args.folder / "model").exists():
            generate(args.folder, args)
        # calibration for the statistics and for the probe; every window in full precision and quantized
        tokens = 2 * (args.nsamples + args.windows) * args.seqlen
        predicted = {
            "1.5 × one layer in float32": 1.5 * 4 * parameters(args.shape),
            "hidden states": 4.0 * tokens * SHAPES[args.shape][0],
            "1 GB": GB,
        }
        print(" + ".join(f"{name} {value / GB:.2f} GB" for name, value in predicted.items()), flush=True)
        forget(args.folder / "model")
        alone = seconds_to_read(args.folder / f"model/model-00001-of-{args.layers + 1:05d}.safetensors")
        forget(args.folder / "model")
        results, peak = run_main(args.folder, args)
        below = report(args, results, peak, predicted, alone)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder)
    sys.exit(0 if below else 1)


if __name__ == "__main__":
    main()
