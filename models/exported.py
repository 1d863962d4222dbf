"""A quantized model as a folder that other engines run: compressed-tensors' integers, scales and rotations.

Every engine reads `config.json`, whose `quantization_config` says for all linears at once what is rounded to what, and
the tensors of a linear:

    weight_packed   int32 [O, ⌈C/8⌉]: codes of 4 bits, the first of eight in the lowest, with a zero point of 8
    weight_scale    [O, 1], or [O, C/g] where groups of g channels have ranges of their own
    weight_shape    int64 [2]: O and C
    <name>_input.weight   float32 [B, B]: √B times the rotation in front of it, the same for all blocks

and of formats of blocks

    weight_packed         uint8 [O, C/2]: two E2M1 patterns, the first in the lower half
    weight_scale          [O, C/block]: the bits of powers of two (MXFP4, uint8), numbers of E4M3 (NVFP4)
    weight_global_scale   float32 [1], NVFP4: 1/base; input_global_scale likewise, of the input

A rotation is told as a transform of type `random-hadamard`, the one whose matrix is read from the file and divided by
√B; which orthogonal matrix that is makes no difference to who applies it. Every group of linears has one of its own.

Nothing of compressed-tensors is needed to write it. What cannot be told is refused by `experiment.export`.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from duquant.attention import QUANTIZER
from duquant.formats import INTEGERS, MxFp4, NvFp4
from duquant.linear import QuantLinear
from duquant.packing import unpack
from duquant.scheme import Scheme, TensorScheme
from models.saved import ModelWriter
from quantize.settings import QuantSettings
from quantize.spec import DecoderSpec

FORMATS = {INTEGERS: "pack-quantized", MxFp4.name: "mxfp4-pack-quantized", NvFp4.name: "nvfp4-pack-quantized"}
SCALES = {MxFp4.name: "torch.uint8", NvFp4.name: "torch.float8_e4m3fn"}  # of formats of blocks
PER_WORD = 8  # codes of 4 bits


@dataclass(frozen=True)
class RotatedGroup:
    """A rotation's name, and the full names of the linears it is in front of; `size` of its blocks."""

    name: str
    linears: tuple[str, ...]
    size: int


class ExportWriter(ModelWriter):
    """`ModelWriter` for other engines. What was left online, or is not of 4 bits, must not come here."""

    FLAG, DONE = "--export", "exported"

    def __init__(self, folder: Path, spec: DecoderSpec, layers: int):
        super().__init__(folder, spec, layers)
        self.rotated: list[RotatedGroup] = []

    def visit(self, index: int, layer: nn.Module) -> None:
        """Write `layer`, number `index`, which is quantized."""
        spec, prefix = self.spec.at(index), f"{self.spec.layers}.{index}."
        paths = [path for group in spec.groups for path in group.linears]
        ours = (*(f"{path}." for path in paths), f"{spec.attention}.{QUANTIZER}.")
        tensors = {name: tensor for name, tensor in layer.state_dict().items() if not name.startswith(ours)}
        for group in spec.groups:
            linears = {path: layer.get_submodule(path) for path in group.linears}
            rotations = next(iter(linears.values())).group.transform.rotations
            name = f"layer_{index}_{group.name}"
            for path, linear in linears.items():
                own = linear_tensors(linear)
                if len(rotations):
                    own[f"{name}_input.weight"] = rotations[0].float() * math.sqrt(len(rotations[0]))
                tensors |= {f"{path}.{part}": tensor for part, tensor in own.items()}
            if len(rotations):
                full = tuple(prefix + path for path in group.linears)
                self.rotated.append(RotatedGroup(name, full, len(rotations[0])))
        self._write(index, {prefix + name: tensor for name, tensor in tensors.items()})

    def description(self, settings: QuantSettings) -> dict:
        """The `quantization_config`, as compressed-tensors has it."""
        return export_config(settings.scheme, self.rotated)


def linear_tensors(linear: QuantLinear) -> dict[str, Tensor]:
    """The tensors of a linear by their names in it."""
    packed = linear.packed_codes
    if packed.zero is None:
        return block_tensors(linear)
    codes = unpack(packed, linear.format).values.flatten(1)
    scale = packed.scale if packed.scale.dim() == 2 else packed.scale[..., 0]
    shape = torch.tensor([linear.out_features, linear.in_features])
    tensors = {"weight_packed": packed_words(codes), "weight_scale": scale, "weight_shape": shape}
    return tensors if linear.bias is None else {**tensors, "bias": linear.bias}


def block_tensors(linear: QuantLinear) -> dict[str, Tensor]:
    """The tensors of a linear whose weight has a format of blocks."""
    packed, base = linear.packed_codes, getattr(linear.group.quantizer, "base", None)
    tensors = {"weight_packed": packed.values, "weight_scale": packed.scale.squeeze(-1)}
    if packed.base is not None:
        tensors["weight_scale"] = tensors["weight_scale"].view(torch.float8_e4m3fn)
        tensors["weight_global_scale"] = 1 / packed.base.float()
    if base is not None:
        tensors["input_global_scale"] = 1 / base.float()
    return tensors if linear.bias is None else {**tensors, "bias": linear.bias}


def packed_words(codes: Tensor) -> Tensor:
    """Codes [O, C] of 4 bits, uint8, eight in a word: int32 [O, ⌈C/8⌉], the first in the lowest bits."""
    codes = nn.functional.pad(codes, (0, -codes.shape[1] % PER_WORD)).unflatten(1, (-1, PER_WORD // 2, 2))
    # bytes, the lowest first: as integers of torch lie in memory, see `duquant.formats.unpack_last`
    return (codes[..., 0] | codes[..., 1] << 4).flatten(1).contiguous().view(torch.int32)


def export_config(scheme: Scheme, rotated: list[RotatedGroup]) -> dict:
    """The `quantization_config` of a model, all of whose linears but the head are quantized as `scheme` says."""
    inputs = tensor_config(scheme.input, "token") if scheme.input.quantized else None
    named = FORMATS[scheme.weight.format]
    group = {"targets": ["Linear"], "weights": tensor_config(scheme.weight, "channel"), "format": named}
    config = {
        "quant_method": "compressed-tensors",
        "format": named,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "input_activations": inputs, "output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return config if not rotated else {**config, "transform_config": {"config_groups": dict(map(told, rotated))}}


def tensor_config(scheme: TensorScheme, vector: str) -> dict:
    """Bits and ranges of a tensor; where no groups have them, each `vector` has one. A token's are found live."""
    if scheme.format != INTEGERS:
        return block_config(scheme, vector == "token")
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.group_size else vector,
        "group_size": scheme.group_size,
        "dynamic": vector == "token",
    }


def block_config(scheme: TensorScheme, live: bool) -> dict:
    """The same of a format of blocks; `live`: scales are found as a tensor comes, but for NVFP4's base."""
    based = scheme.format == NvFp4.name
    config = {"num_bits": scheme.bits, "type": "float", "symmetric": True, "group_size": scheme.group_size}
    config["strategy"] = "tensor_group" if based else "group"
    config["dynamic"] = live and ("local" if based else True)
    config |= dict.fromkeys(("scale_dtype", "zp_dtype"), SCALES[scheme.format])
    return {**config, "observer": "static_minmax"} if based and live else config


def told(group: RotatedGroup) -> tuple[str, dict]:
    """A rotation's name, and the transform as compressed-tensors has it."""
    applied = {"targets": list(group.linears), "location": "input", "inverse": False, "ignore": []}
    return group.name, {"type": "random-hadamard", "head_dim": group.size, "apply": [applied]}
