"""A quantized model as a folder that other engines run: compressed-tensors' integers, scales and rotations.

Every engine reads `config.json`, whose `quantization_config` says for all linears at once what is rounded to what, and
the tensors of a linear:

    weight_packed   int32 [O, ⌈C/8⌉]: codes of 4 bits, the first of eight in the lowest, with a zero point of 8
    weight_scale    [O, 1], or [O, C/g] where groups of g channels have ranges of their own
    weight_shape    int64 [2]: O and C
    <name>_input.weight   float32 [B, B]: √B times the rotation in front of it, the same for all blocks

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
from duquant.linear import QuantLinear
from duquant.packing import unpack
from duquant.scheme import Scheme, TensorScheme
from models.saved import ModelWriter
from quantize.settings import QuantSettings
from quantize.spec import DecoderSpec

FORMAT = "pack-quantized"
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
    codes = unpack(packed, linear.format).values.flatten(1)
    scale = packed.scale if packed.scale.dim() == 2 else packed.scale[..., 0]
    shape = torch.tensor([linear.out_features, linear.in_features])
    tensors = {"weight_packed": packed_words(codes), "weight_scale": scale, "weight_shape": shape}
    return tensors if linear.bias is None else {**tensors, "bias": linear.bias}


def packed_words(codes: Tensor) -> Tensor:
    """Codes [O, C] of 4 bits, uint8, eight in a word: int32 [O, ⌈C/8⌉], the first in the lowest bits."""
    codes = nn.functional.pad(codes, (0, -codes.shape[1] % PER_WORD)).unflatten(1, (-1, PER_WORD // 2, 2))
    # bytes, the lowest first: as integers of torch lie in memory, see `duquant.formats.unpack_last`
    return (codes[..., 0] | codes[..., 1] << 4).flatten(1).contiguous().view(torch.int32)


def export_config(scheme: Scheme, rotated: list[RotatedGroup]) -> dict:
    """The `quantization_config` of a model, all of whose linears but the head are quantized as `scheme` says."""
    inputs = tensor_config(scheme.input, "token") if scheme.input.quantized else None
    group = {"targets": ["Linear"], "weights": tensor_config(scheme.weight, "channel"), "format": FORMAT}
    config = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "input_activations": inputs, "output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return config if not rotated else {**config, "transform_config": {"config_groups": dict(map(told, rotated))}}


def tensor_config(scheme: TensorScheme, vector: str) -> dict:
    """Bits and ranges of a tensor; where no groups have them, each `vector` has one. A token's are found live."""
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.group_size else vector,
        "group_size": scheme.group_size,
        "dynamic": vector == "token",
    }


def told(group: RotatedGroup) -> tuple[str, dict]:
    """A rotation's name, and the transform as compressed-tensors has it."""
    applied = {"targets": list(group.linears), "location": "input", "inverse": False, "ignore": []}
    return group.name, {"type": "random-hadamard", "head_dim": group.size, "apply": [applied]}
