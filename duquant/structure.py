"""What modules a quantized model has and of what shapes: enough to make them, empty, before their tensors are read.

It is kept in a saved model's config.json. Most layers are alike, so every kind of layer is described once.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TypeVar

from torch import nn

from duquant.attention import QUANTIZER
from duquant.linear import GroupInput, QuantLinear

Part = TypeVar("Part")


@dataclass(frozen=True)
class GroupStructure:
    """The linears (paths inside their decoder layer) that share one `GroupInput`, and what that has.

    `readers`: how many of them read the same tensor. `block_size`: B of the `rotations` matrices [B, B], which stand
    around `permutations` permutations. `scale`, `shift` and `ratios`: whether there is an online scale, a shift of the
    transformed input, a clip of the input that was searched or trained. `biases` and `plain`: the linears that have a
    bias, and those whose weight is not quantized. `base`: whether the input's format has one that was calibrated.
    """

    name: str
    linears: tuple[str, ...]
    readers: int
    block_size: int
    rotations: int
    permutations: int
    scale: bool
    shift: bool
    ratios: bool
    biases: tuple[str, ...]
    plain: tuple[str, ...]
    base: bool = False

    def __post_init__(self) -> None:
        for path in (*self.linears, *self.biases, *self.plain):
            _require(isinstance(path, str) and path in self.linears, f"group {self.name}: {path!r} is no linear of it")
        counts = (self.readers, self.block_size, self.rotations, self.permutations)
        whole = all(type(count) is int and count >= 0 for count in counts)
        _require(whole and self.readers and self.block_size, f"group {self.name}: its counts are {counts}")
        switches = (self.scale, self.shift, self.ratios, self.base)
        _require(all(type(each) is bool for each in switches), f"group {self.name}: its switches are {switches}")
        _require(len(self.linears) > 0, f"group {self.name}: has no linears")


@dataclass(frozen=True)
class LayerStructure:
    """A decoder layer: its groups, and the shapes of its attention quantizer's tensors by their `state_dict` names."""

    groups: tuple[GroupStructure, ...]
    attention: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        for name, shape in self.attention.items():
            _require(all(type(size) is int and size >= 0 for size in shape), f"attention's {name} has shape {shape}")


@dataclass(frozen=True)
class ModelStructure:
    """A model: where its decoder layers are, and inside each the attention and the mixture's experts, if there are any.

    `kinds`: the layers that differ. `layer_kinds`: for every layer, in order, which of them it is.
    """

    layers: str
    attention: str
    experts: str | None
    kinds: tuple[LayerStructure, ...]
    layer_kinds: tuple[int, ...]

    def __post_init__(self) -> None:
        paths = (self.layers, self.attention, self.experts or "")
        _require(all(isinstance(path, str) for path in paths), f"its paths are {paths}")
        known = range(len(self.kinds))
        _require(all(kind in known for kind in self.layer_kinds), f"it has no kind {max(self.layer_kinds, default=0)}")

    def at(self, index: int) -> LayerStructure:
        """Layer `index`."""
        return self.kinds[self.layer_kinds[index]]

    def to_dict(self) -> dict:
        """Plain values, as JSON has them."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, values: dict) -> "ModelStructure":
        """The inverse of `to_dict`. Raises ValueError for what that does not write."""
        try:
            kinds = [
                LayerStructure(
                    tuple(_part(GroupStructure, group) for group in kind["groups"]),
                    {name: tuple(shape) for name, shape in kind["attention"].items()},
                )
                for kind in values["kinds"]
            ]
            return _part(cls, {**values, "kinds": kinds})
        except KeyError as error:
            raise ValueError(f"structure: lacks {error}") from None
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"structure: {error}") from None


def describe_layer(layer: nn.Module, attention: str, names: Mapping[str, str]) -> LayerStructure:
    """The structure of a quantized decoder layer; `attention`: path of that, `names`: a linear's path → its group's."""
    linears: dict[GroupInput, dict[str, QuantLinear]] = {}
    for path, module in layer.named_modules():
        if isinstance(module, QuantLinear):
            linears.setdefault(module.group, {})[path] = module
    groups = tuple(_describe_group(group, own, names[next(iter(own))]) for group, own in linears.items())
    heads = getattr(layer.get_submodule(attention), QUANTIZER)
    return LayerStructure(groups, {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()})


def _describe_group(group: GroupInput, linears: Mapping[str, QuantLinear], name: str) -> GroupStructure:
    transform = group.transform
    return GroupStructure(
        name=name,
        linears=tuple(linears),
        readers=group.readers,
        block_size=transform.rotations.shape[-1],
        rotations=len(transform.rotations),
        permutations=len(transform.permutations),
        scale=transform.scale is not None,
        shift=group.shift is not None,
        ratios="clip.ratios" in group.quantizer.state_dict(),
        biases=tuple(path for path, linear in linears.items() if linear.bias is not None),
        plain=tuple(path for path, linear in linears.items() if linear.plain is not None),
        base=getattr(group.quantizer, "base", None) is not None,
    )


def _part(cls: type[Part], values: dict) -> Part:
    """A dataclass from JSON's values; lists become tuples. What has a default may be missing."""
    names = {field.name for field in fields(cls)}
    needed = {field.name for field in fields(cls) if field.default is MISSING}
    odd = min((needed - set(values)) | (set(values) - names), default=None)
    _require(odd is None, f"{'lacks' if odd in names else 'does not know'} {odd!r}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _plain(value: object) -> object:
    """Tuples as lists."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
