"""A model's quantized modules without their tensors, and whether files hold exactly the tensors they need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from duquant.attention import AttentionQuantizer, attach_, install, make_attention_quantizer
from duquant.experts import unfuse_experts_
from duquant.formats import BlockFormat
from duquant.hadamard import hadamard
from duquant.linear import GroupInput, QuantLinear
from duquant.packing import PackedCodes, packed_width
from duquant.quantizer import FoundClip, make_quantizer
from duquant.scheme import Scheme, number_format
from duquant.structure import GroupStructure, LayerStructure, ModelStructure
from duquant.transform import DualTransform

META = torch.device("meta")
# as safetensors calls them
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}


def make_quantized_(model: nn.Module, structure: ModelStructure, scheme: Scheme) -> None:
    """Put the modules of a quantized model, on the meta device, into `model`, which has its full-precision ones there.

    Raises ValueError if the structure does not fit the model.
    """
    try:
        layers = model.get_submodule(structure.layers)
    except AttributeError:
        message = f"{type(model).__name__} has no {structure.layers}; load the model as AutoModelForCausalLM does"
        raise ValueError(message) from None
    if len(layers) != len(structure.layer_kinds):
        raise ValueError(f"structure: of {len(structure.layer_kinds)} layers, and the model has {len(layers)}")
    unfuse_experts_(layers, structure.experts)
    install(model)
    for index, layer in enumerate(layers):
        try:
            make_layer_(layer, structure.at(index), structure.attention, scheme)
        except (ValueError, AttributeError) as error:  # torch's for a path that is not there
            raise ValueError(f"structure: layer {index} of the model does not fit it ({error})") from None


def make_layer_(layer: nn.Module, structure: LayerStructure, attention: str, scheme: Scheme) -> None:
    """Put the quantized modules of one decoder layer in the place of its own."""
    for group in structure.groups:
        linears = {path: layer.get_submodule(path) for path in group.linears}
        for path, linear in linears.items():
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{path} is a {type(linear).__name__}, not a linear")
        shared = _group_input(group, next(iter(linears.values())).in_features, scheme)
        for path, linear in linears.items():
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, _quant_linear(linear, path, group, shared, scheme))
    module = layer.get_submodule(attention)
    found = {name: _empty(*shape) for name, shape in structure.attention.items()}
    with torch.device("cpu"):  # whatever device the surrounding block makes tensors on
        quantizer = make_attention_quantizer(scheme, module.head_dim, META, found)
    if set(quantizer.state_dict()) != set(found):
        raise ValueError(f"its attention has no {min(set(quantizer.state_dict()) ^ set(found))}")
    attach_(module, quantizer)


def _group_input(group: GroupStructure, channels: int, scheme: Scheme) -> GroupInput:
    size = group.block_size
    if group.rotations and channels % size:
        raise ValueError(f"{channels} channels of {group.linears[0]} do not divide by blocks of {size}")
    rotations = _empty(group.rotations, size, size)
    permutations = _empty(group.permutations, channels, dtype=torch.int64)
    transform = DualTransform(rotations, permutations, _empty(channels) if group.scale else None)
    if scheme.input.group_size and channels % scheme.input.group_size:
        raise ValueError(f"inputs of {channels} channels do not divide by groups of {scheme.input.group_size}")
    clip, base = FoundClip(_empty(2)) if group.ratios else None, _empty(1) if group.base else None
    quantizer = make_quantizer(scheme.input, clip, base=base)
    return GroupInput(transform, quantizer, group.readers, _empty(channels) if group.shift else None)


def _quant_linear(
    linear: nn.Linear, path: str, group: GroupStructure, shared: GroupInput, scheme: Scheme
) -> QuantLinear:
    outputs, channels = linear.out_features, linear.in_features
    form, size, dtype = number_format(scheme.weight), scheme.weight.group_size, linear.weight.dtype
    bias = _empty(outputs, dtype=dtype) if path in group.biases else None
    if path in group.plain:
        return QuantLinear(_empty(outputs, channels, dtype=dtype), form, bias, shared)
    if size is not None and channels % size:
        raise ValueError(f"{channels} channels of {path} do not divide by groups of {size}")
    ranges = (outputs, 1) if size is None else (outputs, channels // size, 1)
    values = _empty(outputs, packed_width(channels, form), dtype=form.dtype)
    if isinstance(form, BlockFormat):
        base = _empty(1) if form.has_base else None
        packed = PackedCodes(values, _empty(*ranges, dtype=torch.uint8), None, channels, base)
    else:
        packed = PackedCodes(values, _empty(*ranges), _empty(*ranges), channels)
    return QuantLinear(packed, form, bias, shared)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def set_matrices_(model: nn.Module, device: torch.device | None = None) -> None:
    """Make the matrices of q and k that follow from the scheme, so that no file has them; None: where they are now."""
    for module in model.modules():
        if isinstance(module, AttentionQuantizer) and module.key_matrix is None and module.matrix is not None:
            module.matrix = hadamard(module.matrix.shape[-1]).to(device or module.matrix.device)


def name_shared_once_(model: nn.Module) -> None:
    """From now on `state_dict` has what the linears of a group share under the name of the first of them alone."""
    model.register_state_dict_post_hook(drop_repeated_)


def drop_repeated_(model: nn.Module, tensors: dict[str, Tensor], prefix: str = "", metadata: object = None) -> None:
    """Take out of a `state_dict` of `model` what the linears of a group share, under all names but the first.

    It can be a hook, which is why it takes `metadata`.
    """
    seen: set[GroupInput] = set()
    repeated = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, GroupInput):
            if module in seen:
                repeated.append(f"{prefix}{path}.")
            seen.add(module)
    for name in [name for name in tensors if name.startswith(tuple(repeated))]:
        del tensors[name]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that no tensor here has


def read_headers(files: Sequence[str]) -> dict[str, Stored]:
    """Name → shape and dtype of every tensor in some safetensors files; no data are read.

    Raises ValueError for a file that is missing or damaged.
    """
    stored: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    piece = file.get_slice(name)
                    stored[name] = Stored(tuple(piece.get_shape()), DTYPES.get(piece.get_dtype()))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    return stored


def fit_(model: nn.Module, stored: Mapping[str, Stored], optional: set[str], folder: Path) -> None:
    """Give the empty buffers of `model` the dtypes that its files in `folder` have; its parameters keep their own.

    `optional`: names that may be missing. Raises ValueError for a tensor that is missing, of another shape or not
    known, and for codes or permutations of another dtype.
    """
    expected = model.state_dict()
    known = set(expected)
    drop_repeated_(model, expected)
    for name, tensor in expected.items():
        if name not in stored and name not in optional:
            raise ValueError(f"{folder}: lacks {name}; save the model again")
        if name in stored and not _fits(stored[name].shape, tuple(tensor.shape)):
            shapes = f"{list(stored[name].shape)}, and the model needs {list(tensor.shape)}"
            raise ValueError(f"{folder}: {name} is {shapes}; is it another model's?")
    # earlier versions wrote tensors without elements under all their names
    unknown = min(set(stored) - known, default=None)
    if unknown is not None:
        raise ValueError(f"{folder}: holds {unknown}, for which the model has no place; is it another model's?")
    for path, module in model.named_modules():
        for leaf, tensor in module._buffers.items():
            name = f"{path}.{leaf}" if path else leaf
            if tensor is None or name not in stored or name not in expected:
                continue
            dtype = stored[name].dtype
            if dtype is None or dtype.is_floating_point != tensor.dtype.is_floating_point:
                raise ValueError(f"{folder}: {name} is not {tensor.dtype}; save the model again")
            if dtype is not tensor.dtype and not dtype.is_floating_point:
                raise ValueError(f"{folder}: {name} is {dtype}, not {tensor.dtype}; save the model again")
            if leaf != "plain":  # a weight that is not quantized has the dtype that the caller wants
                module._buffers[leaf] = _empty(*stored[name].shape, dtype=dtype)


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a tensor's shape is as expected: ranges [O, 1, 1] of one group of all channels may be [O, 1] too."""
    return shape == expected or (expected[1:] == (1, 1) and shape == expected[:-1])
