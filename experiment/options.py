"""The command line: flags in groups, and what they make."""

import argparse
from pathlib import Path

from quantize.settings import (
    BitSettings,
    ClipSettings,
    GqaSmooth,
    Probe,
    QuantSettings,
    RotationOrder,
    RotationSettings,
    SearchRule,
    SmoothSettings,
    TrainingSettings,
    Transform,
    WeightPeak,
)
from utils.errors import InputError


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Which model, and where and how it runs."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=required, help="local folder or hub id of a Hugging Face model")
    group.add_argument("--net", help="short name of the model, for files and folders (default: last part of --model)")
    group.add_argument(
        "--cache_dir", type=Path, default=Path("cache"), help="folder for token caches; hub files keep to HF_HOME"
    )
    group.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="of weights and activations; auto is float32 on a CPU and the checkpoint's own elsewhere",
    )
    group.add_argument("--device", help="such as cuda, cuda:1 or cpu (default: the first GPU, else the CPU)")
    group.add_argument(
        "--attn_implementation", choices=["sdpa", "eager"], default="sdpa", help="attention of transformers to build on"
    )
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the model (off: never)"
    )


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """How much of the model is there at once."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="read one decoder layer at a time from the safetensors files, quantize and measure it, and drop it; "
        "perplexity only (default: where the model does not fit into the host's memory)",
    )


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """Which text the method looks at."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calib_dataset",
        default="wikitext2",
        help="wikitext2, ptb, c4, pile, mix; NAME=PATH for a local copy of one; or any .txt, .jsonl, .parquet, "
        "folder saved by datasets, or .safetensors with token ids in the tensor `calibration`",
    )
    group.add_argument("--nsamples", type=int, help="calibration samples (default: 128, or all rows of a token file)")
    group.add_argument(
        "--seqlen",
        type=int,
        help="tokens per sample and per test window (default: 2048 or the model's maximum if less; the width of a "
        "token file)",
    )
    group.add_argument("--seed", type=int, default=2, help="of the samples drawn and of the random rotations")


def add_quantization_options(parser: argparse.ArgumentParser) -> None:
    """Bits, granularity and clipping."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--wbits", type=int, default=4, help="bits of weights, 2 to 16; 16 leaves them alone")
    group.add_argument("--abits", type=int, default=16, help="bits of activations, q, k and v, 2 to 16")
    group.add_argument("--group_size", type=int, help="weights per scale (default: a whole output channel)")
    group.add_argument("--symmetric", action="store_true", help="symmetric weight quantization")
    group.add_argument("--lac", type=float, help="clip ratio of activations in (0, 1] (default: no clipping)")
    group.add_argument("--swc", type=float, help="clip ratio of weights in (0, 1] (default: no clipping)")

    group = parser.add_argument_group("learned weight clipping")
    group.add_argument("--lwc", action="store_true", help="train the clipping of weights, layer by layer")
    group.add_argument("--epochs", type=int, default=20, help="passes over the calibration samples per layer")
    group.add_argument("--lwc_lr", type=float, default=1e-2, help="learning rate")
    group.add_argument("--wd", type=float, default=0.0, help="weight decay")
    group.add_argument("--batch_size", type=int, default=1, help="samples per step")
    group.add_argument(
        "--aug_loss", action="store_true", help="also compare with the full-precision layer on the quantized input"
    )
    group.add_argument(
        "--offload_calibration", action="store_true", help="keep the samples on the host, even if the GPU has room"
    )


def add_smoothing_options(parser: argparse.ArgumentParser) -> None:
    """Smoothing and its statistics."""
    group = parser.add_argument_group("smoothing")
    group.add_argument("--smooth", action="store_true", help="move activation peaks into the weights first")
    group.add_argument("--alpha", type=float, default=0.5, help="how much of a peak moves, 0 to 1")
    group.add_argument(
        "--smooth_weight_peak",
        type=WeightPeak,
        choices=list(WeightPeak),
        default=WeightPeak.REPRESENTATIVE,
        help="weights whose peaks enter the scale: of q_proj and up_proj, or of all linears of a group",
    )
    group.add_argument(
        "--gqa_smooth",
        type=GqaSmooth,
        choices=list(GqaSmooth),
        default=GqaSmooth.ONLINE,
        help="o_proj's scale where query heads share kv heads: online divides the activation, fold lets the heads of "
        "one kv head share it, so that v_proj takes it",
    )
    group.add_argument("--act-scales", type=Path, help="statistics file to use (default: act_scales/<net>.safetensors)")
    group.add_argument("--act-shifts", type=Path, help="file for the shifts when statistics are computed")


def add_transform_options(parser: argparse.ArgumentParser) -> None:
    """The transform, and how it is searched."""
    group = parser.add_argument_group("rotation and permutation")
    group.add_argument(
        "--transform",
        type=Transform,
        choices=list(Transform),
        default=Transform.DUAL,
        help="dual is DuQuant; rotation_permutation, rotation and permutation are parts of it, hadamard is a Hadamard "
        "matrix with random signs per block, none nothing at all",
    )
    add_search_options(group)


def add_search_options(group: argparse._ArgumentGroup) -> None:
    """How a transform is searched."""
    group.add_argument(
        "--block_size", type=_block_size, default=128, help="channels per block; -1: the whole width; auto: at most 128"
    )
    group.add_argument("--max_rotation_step", type=int, default=256, help="greedy steps per rotation")
    group.add_argument("--permutation_times", type=int, default=1, help="(rotation, permutation) pairs before the last")
    group.add_argument(
        "--rotation_search",
        type=SearchRule,
        choices=list(SearchRule),
        default=SearchRule.CHANNEL,
        help="what a step exchanges: the outlier's channel (paper) or its row number (the original code)",
    )
    group.add_argument(
        "--rotation_order",
        type=RotationOrder,
        choices=list(RotationOrder),
        default=RotationOrder.RQ,
        help="base rotation times random rotation (paper), or the reverse",
    )
    group.add_argument(
        "--probe",
        type=Probe,
        choices=list(Probe),
        default=Probe.MEAN,
        help="activation to search on: the mean of the samples, or a few samples",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where results go."""
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=Path, default=Path("output"), help="results go to <net>_w4a4/ in here")
    group.add_argument("--save_model", type=Path, help="folder for the quantized model; main.py --model loads it again")
    group.add_argument("--save_dir", type=Path, help="folder for a checkpoint, written layer by layer")
    group.add_argument(
        "--resume",
        type=Path,
        help="go on with such a checkpoint (with the flags it was made with), or reapply a duquant_parameters.pth",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything and say what the run would do and need (memory, disk, time), without loading weights; "
        "exit code 2 with the reason if it cannot work here",
    )
    add_track_option(group)


def add_track_option(group: argparse._ArgumentGroup) -> None:
    """`--track`, of main.py and of compare.py."""
    group.add_argument(
        "--track",
        choices=["none", "tensorboard", "wandb"],
        default="none",
        help="also give settings and figures to TensorBoard or Weights & Biases, layer by layer as they are found",
    )


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """The page with figures."""
    group = parser.add_argument_group("report")
    group.add_argument(
        "--report",
        action="store_true",
        help="write report/index.html: what quantization did, layer by layer, in figures; the full-precision model is "
        "measured too (not on MT-Bench)",
    )
    add_report_layers(group)


def add_report_layers(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--report_layers`, of main.py and of report.py."""
    parser.add_argument(
        "--report_layers",
        type=_layer_numbers,
        metavar="N,N,…",
        help="layers to draw one by one, as 0,1,15,31 (default: the five with the largest output error)",
    )


def make_quant_config(args: argparse.Namespace) -> QuantSettings:
    """The method's settings from the flags. Raises InputError, naming the flag, for values that cannot be."""
    if args.act_scales is not None and not args.smooth:
        raise InputError("--act-scales is for smoothing: add --smooth, or leave it out")
    if args.save_dir is not None and args.resume is not None:
        raise InputError("--save_dir begins a checkpoint and --resume goes on with one: give one of them")
    smooth = SmoothSettings(args.alpha, args.smooth_weight_peak, args.gqa_smooth)
    return QuantSettings(
        bits=BitSettings(args.wbits, args.abits, args.group_size, args.symmetric),
        clip=ClipSettings(args.lac, args.swc, args.lwc),
        smooth=smooth if args.smooth else None,
        transform=args.transform,
        rotation=RotationSettings(
            args.block_size, args.max_rotation_step, args.permutation_times, args.rotation_search, args.rotation_order
        ),
        probe=args.probe,
        training=TrainingSettings(
            args.epochs, args.lwc_lr, args.wd, args.batch_size, args.aug_loss, args.offload_calibration
        ),
        seed=args.seed,
    )


def _layer_numbers(text: str) -> list[int]:
    """The numbers of a comma-separated list of layers, each once."""
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layer numbers like 0,1,15,31")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def _block_size(text: str) -> int | None:
    if text != "auto" and not text.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")
    return None if text == "auto" else int(text)
