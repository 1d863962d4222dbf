"""Folders that earlier versions of --save_model wrote.

The third says nothing of its modules: their tensors tell. The second has a byte for every code. The first has float
weights, rotated and rounded, in ordinary files, and transforms in a file of their own.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from duquant.attention import QUANTIZER, install
from duquant.formats import Codes, IntegerFormat
from duquant.packing import pack, packed_width
from duquant.skeleton import Stored
from duquant.structure import GroupStructure, LayerStructure, ModelStructure
from models.load import ModelSource, load_model
from quantize.bits import BitSettings, ClipSettings
from quantize.build import build_
from quantize.rotation_settings import Transform
from quantize.settings import QuantSettings, SmoothSettings
from quantize.spec import DecoderSpec, InputGroup
from quantize.state import GroupState, LayerState
from utils.errors import InputError
from utils.io import read_tensors

DESCRIBED_BY_SETTINGS = (2, 3)  # versions of the format that say nothing of modules
FIRST_VERSION_TRANSFORMS = "duquant_transforms.safetensors"
CODES = ".codes"  # how the names of codes end


def structure_of(stored: Mapping[str, Stored], spec: DecoderSpec, layers: int) -> ModelStructure:
    """The modules of a model of versions 2 and 3, from its tensors. Raises ValueError for one that is missing."""
    kinds: list[LayerStructure] = []
    for index in range(layers):
        own, prefix = spec.at(index), f"{spec.layers}.{index}."
        shapes = {name.removeprefix(prefix): each.shape for name, each in stored.items() if name.startswith(prefix)}
        heads = f"{own.attention}.{QUANTIZER}."
        attention = {name.removeprefix(heads): shape for name, shape in shapes.items() if name.startswith(heads)}
        try:
            groups = tuple(group_structure(shapes, group) for group in own.groups)
        except KeyError as error:
            raise ValueError(f"layer {index} lacks {error}; save the model again") from None
        kinds.append(LayerStructure(groups, attention))
    return ModelStructure(spec.layers, spec.attention, spec.experts, tuple(kinds), tuple(range(layers)))


def group_structure(shapes: Mapping[str, tuple[int, ...]], group: InputGroup) -> GroupStructure:
    """A group of one layer, from the shapes of the layer's tensors. Raises KeyError for one that is missing."""
    shared = f"{group.linears[0]}.group."
    rotations, block_size, _ = shapes[f"{shared}transform.rotations"]
    return GroupStructure(
        name=group.name,
        linears=group.linears,
        readers=1 if group.observed else len(group.linears),
        block_size=block_size,
        rotations=rotations,
        permutations=shapes[f"{shared}transform.permutations"][0],
        scale=f"{shared}transform.scale" in shapes,
        shift=f"{shared}shift" in shapes,
        ratios=f"{shared}quantizer.clip.ratios" in shapes,
        biases=tuple(path for path in group.linears if f"{path}.bias" in shapes),
        plain=tuple(path for path in group.linears if f"{path}.plain" in shapes),
    )


def packed_headers(stored: Mapping[str, Stored], form: IntegerFormat) -> dict[str, Stored]:
    """What the tensors of the second version, a byte for every code, are when they are packed."""
    packed = dict(stored)
    for name, each in stored.items():
        if name.endswith(CODES):
            outputs, *channels = each.shape
            packed[name] = Stored((outputs, packed_width(math.prod(channels), form)), each.dtype)
    return packed


def packed_tensors(tensors: Mapping[str, Tensor], form: IntegerFormat) -> dict[str, Tensor]:
    """The tensors of the second version with packed codes."""
    packed = dict(tensors)
    for name, values in tensors.items():
        if name.endswith(CODES):
            scale, zero = (tensors[name.removesuffix(CODES) + part] for part in (".scale", ".zero"))
            packed[name] = pack(Codes(values, scale, zero), form).values
    return packed


def load_first_version(
    source: ModelSource,
    config: PretrainedConfig,
    spec: DecoderSpec,
    settings: QuantSettings,
    dtype: torch.dtype,
    attention: str,
) -> nn.Module:
    """A folder of the first version: weights as floats, rotated and rounded, in ordinary files."""
    path = Path(source.name) / FIRST_VERSION_TRANSFORMS
    tensors, _ = read_tensors(path)
    model = load_model(source, config, dtype, attention)
    install(model)
    for index, layer in enumerate(spec.decoder_layers(model)):
        own, state = spec.at(index), LayerState(stored=True)
        for group in own.groups:
            state.groups[group.name] = first_group(tensors, spec.linear_key(index, group.name), path)
            state.weights |= {each: layer.get_submodule(each).weight.detach() for each in group.linears}
        build_(layer, own, state, settings, dtype)
    return model


def first_group(tensors: dict[str, Tensor], prefix: str, path: Path) -> GroupState:
    """One group's transform in the first version."""
    try:
        parts = tensors[f"{prefix}.rotations"], tensors[f"{prefix}.permutations"].long()
    except KeyError as error:
        raise InputError(f"{path}: lacks {error}; save the model again") from None
    return GroupState(tensors.get(f"{prefix}.scale"), *parts)


def first_settings(saved: dict) -> QuantSettings:
    """Those of the first version, which kept a few only."""
    bits = BitSettings(saved["wbits"], saved["abits"], saved["group_size"], saved["symmetric"])
    smooth = None if saved["alpha"] is None else SmoothSettings(saved["alpha"])
    return QuantSettings(bits, ClipSettings(saved["lac"]), smooth, Transform(saved["transform"]))
