"""How much memory a model takes at the bits it is quantized to."""

import math

import torch
from torch import nn

from duquant.scheme import UNQUANTIZED_BITS
from quantize.build import absorbers
from quantize.settings import QuantSettings, Transform
from quantize.spec import DecoderSpec

HALF, INDEX = 2, 4  # bytes of a float16, and of an index of a permutation


def memory_footprint(model: nn.Module, spec: DecoderSpec, config: QuantSettings) -> dict[str, float]:
    """Bytes of `model` (shapes are enough) packed at `config`'s bits, against all of it in float16.

    `linears`: quantized weights at `--wbits`, with a float16 scale per range, and without `--symmetric` a zero point of
    `--wbits` bits. `transforms`: rotations and online scales in float16, permutations in int32. `rest`: everything else
    in float16. `ratio` is float16 over quantized. What this repository's fake quantization occupies while it runs is
    more.
    """
    everything = sum(parameter.numel() for parameter in model.parameters())
    quantized, linears, transforms = 0, 0, 0
    for index, layer in enumerate(spec.decoder_layers(model)):
        for group in spec.at(index).groups:
            weights = [layer.get_submodule(path).weight for path in group.linears]
            quantized += sum(weight.numel() for weight in weights)
            linears += sum(packed_bytes(*weight.shape, config) for weight in weights)
            online = config.smooth is not None and not absorbers(group, config.smooth)
            transforms += transform_bytes(weights[0].shape[1], config) + HALF * weights[0].shape[1] * online
    rest = HALF * (everything - quantized)
    total = linears + transforms + rest
    found = {"quantized_bytes": total, "linears_bytes": linears, "transforms_bytes": transforms, "rest_bytes": rest}
    return {"float16_bytes": HALF * everything, **found, "ratio": HALF * everything / total}


def packed_bytes(outputs: int, inputs: int, config: QuantSettings) -> int:
    """Bytes of one weight [outputs, inputs]: codes, scales and zero points; float16 if it is not quantized."""
    bits = config.bits
    if bits.weight >= UNQUANTIZED_BITS:
        return HALF * outputs * inputs
    ranges = outputs * (inputs // (bits.group_size or inputs))
    zero_points = 0 if bits.symmetric else ranges
    return math.ceil(bits.weight * (outputs * inputs + zero_points) / 8) + HALF * ranges


def transform_bytes(width: int, config: QuantSettings) -> int:
    """Bytes of one group's rotations and permutations; 0 without a transform."""
    if config.transform is Transform.NONE:
        return 0
    times = config.rotation.permutation_times
    return HALF * (times + 1) * config.rotation.block_size_for(width) ** 2 + INDEX * times * width


def checkpoint_bytes(model: nn.Module, spec: DecoderSpec, config: QuantSettings) -> int:
    """About how large a checkpoint becomes, from the model's shapes (it may be on the meta device)."""
    total = 0
    for index, layer in enumerate(spec.decoder_layers(model)):
        for group in spec.at(index).groups:
            linears = [layer.get_submodule(path) for path in group.linears]
            channels = linears[0].in_features
            if config.transform is not Transform.NONE:
                permutations = config.transform.permutations(config.rotation.permutation_times)
                total += 4 * (permutations + 1) * config.rotation.block_size_for(channels) ** 2
                total += 4 * permutations * channels
            total += 4 * channels if config.smooth else 0
            if config.training is not None:
                groups = channels // (config.bits.group_size or channels)
                total += 8 * groups * sum(linear.out_features for linear in linears)
    return total + 2**16 * len(spec.decoder_layers(model))


def model_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of all parameters of `model` (shapes are enough) in `dtype`."""
    return dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
