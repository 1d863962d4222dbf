"""How many bytes things take, from shapes alone: every quantity is counted here and nowhere else.

A model may be on the meta device. `dtype` is always that in which what is not quantized is held.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from duquant.formats import number_format
from duquant.scheme import TensorScheme
from quantize.build import absorbers
from quantize.settings import QuantSettings
from quantize.spec import DecoderSpec, InputGroup

HALF, WIDE = 2, 4  # bytes of a float16 and of a float32
INDEX, HELD_INDEX = 4, 8  # of a permutation's index in a file, and in a model
LAYER_FILE = 2**16  # what a layer's checkpoint file has beside its tensors: header, digest, figures


def count(tensors: Iterable[torch.Tensor]) -> int:
    """Numbers in all of them."""
    return sum(tensor.numel() for tensor in tensors)


def model_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """All parameters of `model`, or of one of its layers, in full precision."""
    return dtype.itemsize * count(model.parameters())


def hidden_bytes(tokens: int, model: nn.Module, dtype: torch.dtype) -> int:
    """The hidden states of so many tokens between two layers of `model`."""
    return dtype.itemsize * tokens * model.get_input_embeddings().weight.shape[-1]


def sample_copies(settings: QuantSettings, statistics: bool) -> int:
    """How often the calibration samples' hidden states travel through the layers at the same time.

    Once for the `statistics`, if they are computed; once to make the probe, and with training as teacher and student.
    """
    if settings.bits.untouched:
        return 0
    return statistics + (1 if settings.training is None else 2)


def groups_of(model: nn.Module, spec: DecoderSpec) -> Iterator[tuple[InputGroup, list[nn.Module]]]:
    """Every input group of every layer, with its linears."""
    for index, layer in enumerate(spec.decoder_layers(model)):
        yield from layer_groups(layer, spec.at(index))


def layer_groups(layer: nn.Module, spec: DecoderSpec) -> Iterator[tuple[InputGroup, list[nn.Module]]]:
    """Every input group of a layer, whose spec is `spec`, with its linears."""
    for group in spec.groups:
        yield group, [layer.get_submodule(path) for path in group.linears]


def ranges(outputs: int, inputs: int, scheme: TensorScheme) -> int:
    """How many ranges a weight [outputs, inputs] has; none if it is not quantized."""
    return outputs * (inputs // (scheme.group_size or inputs)) if scheme.quantized else 0


def packed_bytes(outputs: int, inputs: int, scheme: TensorScheme) -> int:
    """A weight [outputs, inputs] packed: codes, a float16 scale per range, and zero points of as many bits as codes.

    Symmetric ranges need no zero point. A weight that is not quantized is in float16.
    """
    if not scheme.quantized:
        return HALF * outputs * inputs
    scales = ranges(outputs, inputs, scheme)
    zeros = 0 if scheme.symmetric else scales
    return math.ceil(scheme.bits * (outputs * inputs + zeros) / 8) + HALF * scales


def codes_bytes(outputs: int, inputs: int, scheme: TensorScheme, dtype: torch.dtype) -> int:
    """A weight [outputs, inputs] as a quantized linear holds it: integers of whole bytes, scales and zeros in float32.

    One that is not quantized is in `dtype`.
    """
    if not scheme.quantized:
        return dtype.itemsize * outputs * inputs
    return number_format(scheme).dtype.itemsize * outputs * inputs + 2 * WIDE * ranges(outputs, inputs, scheme)


def transform_bytes(width: int, settings: QuantSettings, number: int = HALF, index: int = INDEX) -> int:
    """The rotations and permutations of a group of `width` channels, at so many bytes a number and an index.

    0 where nothing is quantized.
    """
    if settings.bits.untouched:
        return 0
    times = settings.rotation.permutation_times
    rotations, permutations = settings.transform.rotations(times), settings.transform.permutations(times)
    return number * rotations * settings.rotation.block_size_for(width) ** 2 + index * permutations * width


def online_bytes(group: InputGroup, width: int, settings: QuantSettings, number: int = HALF) -> int:
    """The smoothing scale that a group of `width` channels keeps; none if it goes upstream."""
    smoothed = settings.smooth is not None and not settings.bits.untouched
    return number * width if smoothed and not absorbers(group, settings.smooth) else 0


def memory_footprint(model: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> dict[str, float]:
    """Bytes of `model` packed at its bits, against all of it in float16.

    `linears`: quantized weights (`packed_bytes`). `transforms`: rotations and online scales in float16, permutations in
    int32. `rest`: everything else in float16. `ratio` is float16 over quantized. The model holds whole bytes and
    float32 while it runs, which is more (`quantized_bytes`).
    """
    everything, linears, transforms, quantized = count(model.parameters()), 0, 0, 0
    for group, members in groups_of(model, spec):
        width = members[0].in_features
        quantized += count(linear.weight for linear in members)
        linears += sum(packed_bytes(*linear.weight.shape, settings.scheme.weight) for linear in members)
        transforms += transform_bytes(width, settings) + online_bytes(group, width, settings)
    rest = HALF * (everything - quantized)
    total = linears + transforms + rest
    parts = {"quantized_bytes": total, "linears_bytes": linears, "transforms_bytes": transforms, "rest_bytes": rest}
    return {"float16_bytes": HALF * everything, **parts, "ratio": HALF * everything / total}


def quantized_layer_bytes(layer: nn.Module, spec: DecoderSpec, settings: QuantSettings, dtype: torch.dtype) -> int:
    """A quantized layer, whose spec is `spec`, as it is held and saved: codes, transforms, and the rest in `dtype`."""
    total = model_bytes(layer, dtype)
    for group, members in layer_groups(layer, spec):
        width = members[0].in_features
        total -= dtype.itemsize * count(linear.weight for linear in members)
        total += sum(codes_bytes(*linear.weight.shape, settings.scheme.weight, dtype) for linear in members)
        total += transform_bytes(width, settings, WIDE, HELD_INDEX) + online_bytes(group, width, settings, WIDE)
    return total


def quantized_bytes(model: nn.Module, spec: DecoderSpec, settings: QuantSettings, dtype: torch.dtype) -> int:
    """The whole quantized model as it is held, and as `--save_model` writes it."""
    layers = list(spec.decoder_layers(model))
    shell = model_bytes(model, dtype) - sum(model_bytes(layer, dtype) for layer in layers)
    held = (quantized_layer_bytes(layer, spec.at(index), settings, dtype) for index, layer in enumerate(layers))
    return shell + sum(held)


def state_bytes(layer: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> int:
    """The tensors of a layer's state as a checkpoint keeps them: float32, permutations in int32."""
    total = 0
    for _, members in layer_groups(layer, spec):
        width = members[0].in_features
        total += transform_bytes(width, settings, WIDE, INDEX)
        total += WIDE * width if settings.smooth is not None else 0
        if settings.training is not None:  # two logits a range
            total += 2 * WIDE * sum(ranges(*linear.weight.shape, settings.scheme.weight) for linear in members)
    return total


def checkpoint_bytes(model: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> int:
    """About how large a checkpoint (`--save_dir`) becomes."""
    if settings.bits.untouched:
        return 0
    layers = enumerate(spec.decoder_layers(model))
    return sum(state_bytes(layer, spec.at(index), settings) + LAYER_FILE for index, layer in layers)
