"""How many bytes things take, from shapes alone: every quantity is counted here and nowhere else.

A model may be on the meta device. `dtype` is always that in which what is not quantized is held.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from duquant.formats import BLOCK_FORMATS
from duquant.packing import packed_width
from duquant.scheme import SEARCHED, TensorScheme, number_format
from quantize.build import absorbers
from quantize.refinements import HeadTransform
from quantize.settings import QuantSettings
from quantize.spec import DecoderSpec, InputGroup

HALF, WIDE = 2, 4  # bytes of a float16 and of a float32
INDEX, HELD_INDEX = 4, 8  # of a permutation's index in a file, and in a model
ROUNDING_COPIES = 5  # of a linear's input in float32, while it is transformed and rounded, and of what stands beside it
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

    Once for the `statistics`, if they are computed; once to make the probe, and as what the quantized network is given
    where samples decide anything; once more in the full-precision network, where that is aimed at.
    """
    if settings.bits.untouched:
        return 0
    return statistics + 1 + settings.needs_teacher


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

    A scale of a format of blocks has 8 bits. Symmetric ranges need no zero point. A weight that is not quantized is in
    float16.
    """
    if not scheme.quantized:
        return HALF * outputs * inputs
    scales = ranges(outputs, inputs, scheme)
    zeros = 0 if scheme.symmetric else scales
    codes = math.ceil(scheme.bits * (outputs * inputs + zeros) / 8)
    return codes + (1 if scheme.format in BLOCK_FORMATS else HALF) * scales


def codes_bytes(outputs: int, inputs: int, scheme: TensorScheme, dtype: torch.dtype) -> int:
    """A weight [outputs, inputs] as a quantized linear holds it: packed codes, scales and zeros in float32.

    Scales of a format of blocks are bytes. One that is not quantized is in `dtype`.
    """
    if not scheme.quantized:
        return dtype.itemsize * outputs * inputs
    form = number_format(scheme)
    codes = form.dtype.itemsize * outputs * packed_width(inputs, form)
    return codes + (1 if form.block else 2 * WIDE) * ranges(outputs, inputs, scheme) + WIDE * form.has_base


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


def input_extras(width: int, settings: QuantSettings, number: int = HALF) -> int:
    """What rounds a group's input beside its transform: the shift of its channels, the clip's two ratios, the base."""
    scheme = settings.scheme.input
    if not scheme.quantized:
        return 0
    base = number_format(scheme).has_base
    return number * (width * settings.extras.channel_shift + 2 * (scheme.clip == SEARCHED) + base)


def added_biases(members: Iterable[nn.Module], settings: QuantSettings) -> int:
    """Numbers in the biases that linears without one are given by the shift of their input."""
    if not (settings.extras.channel_shift and settings.scheme.input.quantized):
        return 0
    return sum(len(linear.weight) for linear in members if linear.bias is None)


def head_numbers(layer: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> int:
    """Numbers in what is kept of q, k and v: their matrices, means and clip ratios."""
    attention, scheme, extras = layer.get_submodule(spec.attention), settings.scheme, settings.extras
    heads, size = attention.config.num_key_value_heads, attention.head_dim
    balanced = extras.head_transform is HeadTransform.BALANCED and scheme.turns_heads
    means = extras.key_mean * scheme.key.quantized + extras.value_mean * scheme.value.quantized
    roles = (scheme.query, scheme.key, scheme.value)
    ratios = 2 * sum(role.quantized and role.clip == SEARCHED for role in roles)
    return heads * (2 * balanced * size**2 + means * size) + ratios


def memory_footprint(model: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> dict[str, float]:
    """Bytes of `model` packed at its bits, against all of it in float16.

    `linears`: quantized weights (`packed_bytes`). `transforms`: rotations, online scales, shifts and what is done to
    heads in float16, permutations in int32. `rest`: everything else in float16. `ratio` is float16 over quantized. The
    model holds scales and transforms in float32 and codes of 3 and of 5 to 7 bits in half or whole bytes while it runs,
    which is more (`quantized_bytes`).
    """
    everything, linears, transforms, quantized, added = count(model.parameters()), 0, 0, 0, 0
    for group, members in groups_of(model, spec):
        width = members[0].in_features
        quantized += count(linear.weight for linear in members)
        linears += sum(packed_bytes(*linear.weight.shape, settings.scheme.weight) for linear in members)
        transforms += transform_bytes(width, settings) + online_bytes(group, width, settings)
        transforms += input_extras(width, settings)
        added += added_biases(members, settings)
    if not settings.bits.untouched:
        layers = enumerate(spec.decoder_layers(model))
        transforms += HALF * sum(head_numbers(layer, spec.at(index), settings) for index, layer in layers)
    rest = HALF * (everything - quantized + added)
    total = linears + transforms + rest
    parts = {"quantized_bytes": total, "linears_bytes": linears, "transforms_bytes": transforms, "rest_bytes": rest}
    return {"float16_bytes": HALF * everything, **parts, "ratio": HALF * everything / total}


def quantized_layer_bytes(layer: nn.Module, spec: DecoderSpec, settings: QuantSettings, dtype: torch.dtype) -> int:
    """A quantized layer, whose spec is `spec`, as it is held and saved: codes, transforms, and the rest in `dtype`."""
    total = model_bytes(layer, dtype) + WIDE * head_numbers(layer, spec, settings) * (not settings.bits.untouched)
    for group, members in layer_groups(layer, spec):
        width = members[0].in_features
        total -= dtype.itemsize * count(linear.weight for linear in members)
        total += sum(codes_bytes(*linear.weight.shape, settings.scheme.weight, dtype) for linear in members)
        total += transform_bytes(width, settings, WIDE, HELD_INDEX) + online_bytes(group, width, settings, WIDE)
        total += input_extras(width, settings, WIDE) + dtype.itemsize * added_biases(members, settings)
    return total


def quantized_bytes(model: nn.Module, spec: DecoderSpec, settings: QuantSettings, dtype: torch.dtype) -> int:
    """The whole quantized model as it is held, and as `--save_model` writes it."""
    layers = list(spec.decoder_layers(model))
    shell = model_bytes(model, dtype) - sum(model_bytes(layer, dtype) for layer in layers)
    held = (quantized_layer_bytes(layer, spec.at(index), settings, dtype) for index, layer in enumerate(layers))
    return shell + sum(held)


def state_bytes(layer: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> int:
    """The tensors of a layer's state as a checkpoint keeps them: float32, permutations in int32, codes as they are."""
    total = WIDE * head_numbers(layer, spec, settings)
    if settings.extras.value_rotation:
        attention = layer.get_submodule(spec.attention)
        total += WIDE * attention.config.num_key_value_heads * attention.head_dim**2
    for group, members in layer_groups(layer, spec):
        width = members[0].in_features
        total += transform_bytes(width, settings, WIDE, INDEX)
        total += WIDE * width if settings.smooth is not None else 0
        total += INDEX * width * (settings.transform.orders_channels and bool(group.ordered))
        total += input_extras(width, settings, WIDE)
        if settings.rounds_by_data:
            shapes, scheme = [linear.weight.shape for linear in members], settings.scheme.weight
            total += sum(codes_bytes(*shape, scheme, torch.float32) + INDEX for shape in shapes)  # how many channels
        if settings.training is not None:  # two logits a range
            total += 2 * WIDE * sum(ranges(*linear.weight.shape, settings.scheme.weight) for linear in members)
    return total


def checkpoint_bytes(model: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> int:
    """About how large a checkpoint (`--save_dir`) becomes."""
    if settings.bits.untouched:
        return 0
    layers = enumerate(spec.decoder_layers(model))
    return sum(state_bytes(layer, spec.at(index), settings) + LAYER_FILE for index, layer in layers)


def widest(members: Iterable[nn.Module]) -> int:
    """Channels of the widest activation that enters or leaves one of these linears."""
    return max(max(linear.in_features, linear.out_features) for linear in members)


def activation_bytes(tokens: int, width: int, held: int, rounded: bool) -> int:
    """What so many tokens take while they go through a layer whose widest activation is `width` channels.

    Gate, up, their product and its successor, at `held` bytes a number; where linears are `rounded`, one of them and
    its float32 copies.
    """
    return tokens * width * (held + max(3 * held, ROUNDING_COPIES * WIDE if rounded else 0))
