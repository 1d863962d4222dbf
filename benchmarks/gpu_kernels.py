"""The Triton kernels against half precision, on a GPU; or, without one, what they move, compute and occupy on paper.

    python benchmarks/gpu_kernels.py                         # times, on the GPU that is there
    python benchmarks/gpu_kernels.py --models 7b --dtypes float16 --rows 1 2048
    python benchmarks/gpu_kernels.py --paper                 # no GPU: bytes, operations, lower bounds, occupancy

Every linear of a layer (those that read the same input as one) for a few numbers of rows: `F.linear` in half precision,
then the two steps of a W4A4 linear: rows are transformed (blocks of 128, one permutation) and rounded, and codes are
multiplied; and fake quantization, which takes the place of both in the reference runtime, by its kernel and by torch's
operations. Times are medians over `--repeats` replays of a CUDA graph, before each of which the L2 cache is emptied:
between two calls a model's other weights go through it. The first call of each step compiles its kernels and, for a few
rows, measures tile sizes: half a minute in the first run.

On paper: a bound is the larger of bytes over bandwidth and operations over peak, as the vendor's data sheets have them
(dense). What lies between the launches of the transform stays in the L2 cache, whose bandwidth no data sheet gives: it
is a column of its own and in no bound. Registers and shared memory are those of the compiled kernels, which needs
Triton and its assembler, but no GPU; from them follows how many programs a multiprocessor holds at a time.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from duquant.formats import IntegerFormat
from duquant.ops import fused
from duquant.ops import triton as ops
from duquant.ops.triton_launch import BYTE_TILE, HALVES, WORD_TILE
from duquant.ops.triton_product import FEW_CONFIGS, PRODUCT_CONFIGS, product, product_bytes, product_few, row_words
from duquant.ops.triton_quantize import MATRIX_FACTOR, ROUNDING, fake_quantize, quantize, rotate_halves
from duquant.ops.triton_tools import triton
from duquant.packing import PackedCodes, code_sums
from duquant.quantizer import Quantizer, RatioClip
from quantize.gptq_kernel import TILE, round_block
from utils.device import DTYPES
from utils.results import format_table

BLOCK, FORM = 128, IntegerFormat(4)
FLUSHED = 2**28  # bytes: more than any L2 cache
TIMES = ["half µs ≥", "transform ≥", "product ≥", "times as fast", "transform's share"]

# inputs and outputs; the linears that read one input are one
LINEARS = {
    "7b": {"qkv": (4096, 12288), "o": (4096, 4096), "gate, up": (4096, 22016), "down": (11008, 4096)},
    "70b": {"qkv": (8192, 10240), "o": (8192, 8192), "gate, up": (8192, 57344), "down": (28672, 8192)},
}


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: bytes and dense operations per second, and what a multiprocessor has."""

    capability: int
    bandwidth: float
    half: float
    int8: float
    shared: int
    registers: int = 65536
    threads: int = 2048


GPUS = {
    "a100": Gpu(80, 2.0e12, 312e12, 624e12, 164 * 1024),
    "h100": Gpu(90, 3.35e12, 989e12, 1979e12, 228 * 1024),
}


@dataclass(frozen=True)
class Work:
    """Bytes that go through memory and operations (a multiplication and an addition are two) of one step."""

    bytes: float
    operations: float

    def bound(self, bandwidth: float, peak: float) -> float:
        """Seconds that it takes at least."""
        return max(self.bytes / bandwidth, self.operations / peak)


def half_work(rows: int, inputs: int, outputs: int) -> Work:
    """`F.linear` in half precision."""
    return Work(2 * (inputs * outputs + rows * (inputs + outputs)), 2 * rows * inputs * outputs)


def transform_work(rows: int, inputs: int) -> Work:
    """Two rotations, a permutation and the rounding: x and codes; of float16 halves two products, then three."""
    return Work(rows * inputs * (2 + 1) + 2 * 4 * BLOCK**2 + 8 * inputs, (2 + 3) * 2 * rows * inputs * BLOCK)


def transform_cached(rows: int, inputs: int) -> int:
    """Bytes between the launches of the transform: after each rotation float32 is written and read."""
    return rows * inputs * 2 * (4 + 4)


def product_work(rows: int, inputs: int, outputs: int) -> Work:
    """The product of codes: the weight at two codes a byte."""
    return Work(inputs * outputs / 2 + 8 * outputs + rows * (inputs + 2 * outputs), 2 * rows * inputs * outputs)


def paper_table(models: list[str], all_rows: list[int], gpu: Gpu) -> str:
    """What each step moves and computes, and what it takes at least."""
    lines = []
    for model in models:
        for name, (inputs, outputs) in LINEARS[model].items():
            for rows in all_rows:
                works = [
                    half_work(rows, inputs, outputs),
                    transform_work(rows, inputs),
                    product_work(rows, inputs, outputs),
                ]
                peaks = (gpu.half, gpu.half, gpu.int8)
                times = [each.bound(gpu.bandwidth, peak) for each, peak in zip(works, peaks, strict=True)]
                work = [f"{each.bytes / 1e6:,.1f}" for each in works]
                work.insert(2, f"{transform_cached(rows, inputs) / 1e6:,.1f}")
                work += [f"{each.operations / 1e9:,.1f}" for each in works]
                lines.append([f"{model} {name} {inputs}→{outputs}", str(rows), *work, *shown(times)])
    columns = ["rows", "MB half", "transform", "+ in L2", "product", "Gop half", "transform", "product"]
    return format_table(["linear", *columns, *TIMES], lines)


def shown(times: list[float]) -> list[str]:
    """Columns for the seconds of the half-precision linear, of the transform and of the product."""
    half, transform, product = times
    both = transform + product
    return [*(f"{each * 1e6:,.1f}" for each in times), f"{half / both:.2f}", f"{transform / both:.0%}"]


# the types of kernels' arguments; all others are integers
TYPES = {
    **dict.fromkeys(("x", "w", "codes"), "*u8"),
    **dict.fromkeys(("x_sums", "w_sums", "sums", "parts", "part_sums"), "*i32"),
    **dict.fromkeys(("x_scales", "x_zeros", "w_scales", "w_zeros", "scales", "zeros", "scale", "shift"), "*fp32"),
    **dict.fromkeys(("low_ratio", "high_ratio", "rotation", "ratios"), "*fp32"),
    **dict.fromkeys(("weight", "now", "errors", "zero", "upper"), "*fp32"),
    **dict.fromkeys(("scale_low", "scale_high", "zero_low", "zero_high"), "fp32"),
    "bias": "*fp16",
    "permutation": "*i64",
}


@dataclass(frozen=True)
class Build:
    """A kernel as it is compiled for one configuration: `constants` by name, and types of arguments if not `TYPES`."""

    kernel: object
    constants: dict[str, object]
    warps: int
    stages: int
    types: dict[str, str] = field(default_factory=dict)

    def resources(self, gpu: Gpu) -> tuple[int, int, int]:
        """Registers a thread, bytes of stack (spilled registers) and bytes of shared memory."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        function = self.kernel if isinstance(self.kernel, triton.JITFunction) else self.kernel.fn
        names = function.arg_names
        types = {"y": "*fp16" if "outputs" in names else "*fp32", **TYPES}
        types |= self.types
        signature = {name: "constexpr" if name in self.constants else types.get(name, "i32") for name in names}
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        # what the launcher finds in a model: pointers and sizes that are multiples of 16
        multiples = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if signature[name] not in ("constexpr", "fp32") and name != "rows"
        }
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
        source = ASTSource(function, signature, constants, multiples)
        built = triton.compile(source, target=GPUTarget("cuda", gpu.capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        return int(registers), int(stack), built.metadata.shared

    def row(self, gpu: Gpu) -> list[str]:
        """A line of the table: the configuration, what it takes, and how many programs fit a multiprocessor."""
        registers, stack, shared = self.resources(gpu)
        threads = 32 * self.warps
        resident = min(
            gpu.registers // (registers * threads), gpu.threads // threads, 32, gpu.shared // (shared + 1024)
        )
        tile = " × ".join(str(value) for name, value in self.constants.items() if name.startswith("BLOCK"))
        kernel = self.kernel if isinstance(self.kernel, triton.JITFunction) else self.kernel.fn
        spent = [registers, stack, shared, resident]
        return [kernel.__name__, tile, str(self.warps), *map(str, spent), f"{resident * threads / gpu.threads:.0%}"]


def builds() -> list[Build]:
    """The kernels as a W4A4 linear without groups uses them, in the tile sizes that are launched."""
    rotation = {"B": BLOCK, "SCALED": False, "MATRIX_FACTOR": MATRIX_FACTOR, "BLOCK_T": HALVES[0]}
    first = {**rotation, "x_channel": 1, "y_row": 1, "GATHER": False, "EXACT": True}
    second = {**rotation, "x_row": 1, "y_channel": 1, "GATHER": True, "EXACT": False}
    offsets = {"X_OFFSET": 0, "W_OFFSET": 0, "BITS": 4, "BIASED": False}
    packed = {**offsets, "PER_BYTE": 2, "W_SUMS": True}
    tiled = {**packed, "MASKED": False, "X_SUMS": True, "GROUPED": False, "groups": 1, "x_groups": 1, "w_groups": 1}
    rounding = {"BITS": 4, "SYMMETRIC": False, "SCALED": False, "SHIFTED": False, "PER_BYTE": 1}
    rounding |= {"ROUNDING": ROUNDING, "INVERTED": True}
    fake = {"BITS": 4, "SYMMETRIC": False, "RATIOS": False, "INVERTED": True, "ROUNDING": ROUNDING, "WHOLE": True}
    numbers = {"y": "*fp16", "low_ratio": "fp32", "high_ratio": "fp32"}
    gptq = {"BITS": 4, "ROUNDING": ROUNDING, "BLOCK_O": TILE[0], "BLOCK_B": 64, "w_column": 1}
    gptq |= {"s_row": 1, "s_column": 0, "z_row": 1, "z_column": 0}
    block_t, block_o, *bytes_launched = BYTE_TILE
    row_o, row_w, *row_launched = WORD_TILE
    return [
        Build(rotate_halves, first, *HALVES[1:], {"x": "*fp16"}),
        Build(rotate_halves, second, *HALVES[1:], {"x": "*fp32"}),
        Build(quantize, {**rounding, "BLOCK_V": 1, "BLOCK_C": 4096}, 8, 3),
        Build(fake_quantize, {**fake, "BLOCK_V": 1, "BLOCK_C": 4096}, 8, 3, {"x": "*fp32", **numbers}),
        Build(fake_quantize, {**fake, "BLOCK_V": 32, "BLOCK_C": 128}, 8, 3, {"x": "*fp16", **numbers}),
        Build(fake_quantize, {**fake, "BLOCK_V": 1, "BLOCK_C": 16384}, 16, 3, {"x": "*fp32", **numbers}),
        Build(
            row_words,
            {"BIASED": False, "BLOCK_O": row_o, "BLOCK_W": row_w, "STAGES": row_launched[1]},
            *row_launched,
            {"x": "*u64", "w": "*u32"},
        ),
        *(
            Build(product_few, {**packed, "SPLITS": 2, "BLOCK_T": 16, "BLOCK_O": outputs, "BLOCK_C": 256}, *launched)
            for outputs, *launched in FEW_CONFIGS
        ),
        *(
            Build(product, {**tiled, "BLOCK_T": rows, "BLOCK_O": outputs, "BLOCK_C": 128}, *launched)
            for rows, outputs, *launched in PRODUCT_CONFIGS
        ),
        Build(
            product_bytes,
            {**offsets, "BLOCK_T": block_t, "BLOCK_O": block_o, "BLOCK_C": 128},
            *bytes_launched,
            {"x": "*i8", "w": "*i8"},
        ),
        Build(round_block, gptq, TILE[1], 3),
    ]


def paper(args: argparse.Namespace) -> None:
    """Print what is known without a GPU."""
    gpu = GPUS[args.gpu]
    print(f"Lower bounds on {args.gpu}\n\n{paper_table(args.models, args.rows, gpu)}\n")
    if triton is None:
        print("Triton is not installed: what the kernels occupy is not known")
        return
    columns = ["tile", "warps", "registers", "spilled bytes", "shared bytes", "programs", "threads"]
    print(f"Compiled for {args.gpu}\n\n{format_table(['kernel', *columns], [each.row(gpu) for each in builds()])}")


def seconds(function: Callable[[], Tensor], repeats: int) -> float:
    """The median time of `function` on the GPU, of which nothing is left in the L2 cache, without its launches."""
    function()  # tile sizes are measured outside the graph
    torch.cuda.synchronize()
    graph, flushed = torch.cuda.CUDAGraph(), torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measured(rows: int, inputs: int, outputs: int, dtype: torch.dtype, repeats: int) -> list[float]:
    """Seconds of the half-precision linear, of the transform and of the product, on random numbers.

    Behind them those of fake quantization, of float32 to `dtype`: by the kernel, and by torch's operations.
    """
    make = {"device": "cuda", "generator": torch.Generator("cuda").manual_seed(0)}
    x = torch.randn(rows, inputs, dtype=dtype, **make)
    weight = torch.randn(outputs, inputs, dtype=dtype, **make)
    half = seconds(lambda: F.linear(x, weight), repeats)
    rotations = torch.linalg.qr(torch.randn(2, BLOCK, BLOCK, **make)).Q
    permutations = torch.randperm(inputs, **make)[None]
    values = torch.randint(256, (outputs, inputs // 2), dtype=torch.uint8, **make)
    scale, zero = torch.full((outputs, 1), 0.01, device="cuda"), torch.full((outputs, 1), 8.0, device="cuda")
    packed = PackedCodes(values, scale, zero, inputs)
    sums = code_sums(packed, FORM)

    def transformed() -> tuple[Tensor, ...]:
        return ops.quantize_rows(x, rotations, permutations, low_ratio=0.9, high_ratio=0.9, form=FORM)

    codes = transformed()

    def multiplied() -> Tensor:
        return ops.linear(*codes, packed, FORM, None, dtype, sums_of_weight=sums, input_bits=4)

    wide, quantizer = x.float(), Quantizer(FORM, RatioClip(0.9))
    steps = [
        transformed,
        multiplied,
        lambda: fused.launched(wide, quantizer, dtype),
        lambda: quantizer.computed(wide, dtype),
    ]
    return [half, *(seconds(step, repeats) for step in steps)]


def measure(args: argparse.Namespace) -> None:
    """Print a table for every dtype."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n")
    names = [*(name.removesuffix(" ≥") for name in TIMES), "fake quantization", "by torch"]
    for dtype in args.dtypes:
        lines = []
        for model in args.models:
            for name, (inputs, outputs) in LINEARS[model].items():
                for rows in args.rows:
                    times = measured(rows, inputs, outputs, DTYPES[dtype], args.repeats)
                    fake = [f"{each * 1e6:,.1f}" for each in times[3:]]
                    lines.append([f"{model} {name} {inputs}→{outputs}", str(rows), *shown(times[:3]), *fake])
        print(format_table([dtype, "rows", *names], lines), flush=True)
        print()


def main() -> None:
    """Print times, or what is known without a GPU. Exits with 2 where there is none that the kernels run on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(LINEARS), default=list(LINEARS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 2048, 8 * 2048])
    parser.add_argument("--dtypes", nargs="+", choices=["float16", "bfloat16"], default=["float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--paper", action="store_true", help="no GPU: traffic, operations, bounds, occupancy")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="whose data sheet --paper takes")
    args = parser.parse_args()
    if args.paper:
        paper(args)
    elif torch.cuda.is_available() and ops.available(torch.device("cuda")):
        measure(args)
    else:
        print("no GPU here that Triton's kernels run on; --paper needs none", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
