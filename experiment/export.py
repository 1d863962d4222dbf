"""`--export`: what other engines cannot run is refused, before anything is computed."""

import importlib.util
from collections.abc import Iterator

from duquant.attention import HEAD_ROLES
from duquant.formats import INTEGERS, MxFp4, NvFp4
from duquant.scheme import Scheme
from experiment.options import RunSettings
from experiment.setup import Setup
from models.exported import FORMATS
from models.saved import require_empty
from quantize.build import absorbers
from quantize.rotation_settings import Transform
from quantize.settings import QuantSettings
from quantize.sizes import groups_of
from quantize.spec import SharedRows
from utils.errors import InputError

WEIGHT_BITS, INPUT_BITS = (4,), (4, 8, 16)
EXPRESSIBLE = (Transform.PERMUTE_ROTATE, Transform.ROTATION, Transform.HADAMARD, Transform.NONE)
NEEDED = "compressed_tensors"
# compressed-tensors takes the next power of two from 1¾ on, which is the format's own rule behind a clip of 8/7
CLIPS = {MxFp4.name: 8 / 7, NvFp4.name: None}


def check_export(settings: RunSettings, setup: Setup, quant: QuantSettings) -> None:
    """Raise InputError, with the flag to change, for what the target cannot express or this run cannot verify."""
    output = settings.output
    if output.verify and output.export is None:
        raise InputError("--verify: runs what --export writes; add --export FOLDER, or drop it")
    if output.export is None:
        return
    require_empty(output.export, "--export")
    if output.save_model is not None and output.save_model.resolve() == output.export.resolve():
        raise InputError(f"--export {output.export}: is --save_model's folder too; choose another")
    problem = next(problems(setup, quant), None)
    if problem is not None:
        raise InputError(f"--export: {problem}")
    if not output.verify:
        return
    if not settings.evaluation.perplexity.eval_ppl:
        raise InputError("--verify: compares perplexities; add --eval_ppl")
    if importlib.util.find_spec(NEEDED) is None:
        raise InputError("--verify: needs compressed-tensors; pip install compressed-tensors==0.20.0, or drop the flag")


def problems(setup: Setup, quant: QuantSettings) -> Iterator[str]:
    """What the target cannot express, each with what to do."""
    yield from problems_of_rounding(quant)
    if quant.transform not in EXPRESSIBLE:
        known = ", ".join(EXPRESSIBLE)
        yield f"--transform {quant.transform} permutes activations when it runs; give --transform {known}"
    if setup.spec.experts is not None:
        yield f"mixtures of experts ({setup.config.model_type}) are not written for other engines; give --save_model"
    tied = [name for name in getattr(setup.skeleton, "all_tied_weights_keys", {}) if name.startswith(setup.spec.layers)]
    if tied:
        yield f"{tied[0]} is tied to another tensor, and would have to be rotated with it; give --save_model"
    for group, linears in groups_of(setup.skeleton, setup.spec):
        biased = [path for path, linear in zip(group.linears, linears, strict=True) if linear.bias is not None]
        if biased and quant.transform is not Transform.NONE:
            yield f"{biased[0]} has a bias, and engines transform no biased linears; give --transform none"
        if quant.smooth is not None and not absorbers(group, quant.smooth):
            shared = any(isinstance(each, SharedRows) for each in group.absorbers)
            advice = "give --gqa_smooth fold" if shared else "give --no_smooth"
            yield f"the smoothing scale of {group.linears[0]} is applied when it runs; {advice}"


def problems_of_rounding(quant: QuantSettings) -> Iterator[str]:
    """Of bits, ranges, clips and shifts."""
    scheme = quant.scheme
    heads = {role: getattr(scheme, role) for role in HEAD_ROLES}
    rounded = [f"--{role[0]}bits 16" for role, each in heads.items() if each.quantized]
    if rounded:
        yield f"q, k and v are not rounded there; give {' '.join(rounded)}"
    if scheme.input.quantized and scheme.input.format != scheme.weight.format:
        yield f"inputs have the format of weights there; give --aformat {scheme.weight.format}"
    if quant.extras.channel_shift and scheme.input.quantized:
        yield "inputs are not shifted there; give --no_channel_shift"
    if quant.learns_transform and scheme.input.quantized and not quant.training.fixed_input_clips:
        yield "inputs are not clipped there, and --train transform learns clips; give --fixed_input_clips"
    if scheme.weight.format == INTEGERS:
        yield from problems_of_integers(scheme)
    elif scheme.weight.format not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        yield f"no engine knows {scheme.weight.format}; give --wformat {known}"
    elif scheme.input.quantized and scheme.input.clip != CLIPS[scheme.weight.format]:
        clip = CLIPS[scheme.weight.format] or "none"
        yield f"{scheme.weight.format} inputs have a range of their own there; give --lac {clip}"


def problems_of_integers(scheme: Scheme) -> Iterator[str]:
    """Of bits, ranges and clips of integers."""
    if scheme.weight.bits not in WEIGHT_BITS:
        yield f"weights have {scheme.weight.bits} bits; give --wbits 4"
    if not scheme.weight.symmetric:
        yield "asymmetric weights are not loaded by transformers; give --symmetric"
    if not scheme.weight.full_range or (scheme.input.quantized and scheme.input.symmetric != scheme.input.full_range):
        yield "symmetric codes are −8 … 7 there, in steps of peak/7.5; give --symmetric_range full"
    if not scheme.input.quantized:
        return
    if scheme.input.bits not in INPUT_BITS:
        yield f"inputs have {scheme.input.bits} bits; give --abits {', '.join(map(str, INPUT_BITS))}"
    if not scheme.input.symmetric:
        yield "inputs are symmetric there; give --act_symmetric"
    if scheme.input.group_size is not None:
        yield f"inputs have one range a token there; drop --act_group_size {scheme.input.group_size}"
    if scheme.input.clip is not None:
        yield f"inputs are not clipped there; give --lac none in place of --lac {scheme.input.clip}"
