"""What the method must know of a decoder layer. A model family is one `DecoderSpec`; see `models/`."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class InputGroup:
    """The linears of one decoder layer that read the same activation, and therefore share one transform.

    All paths are relative to the decoder layer. `representative` is the linear whose statistics and weight stand for
    the group in smoothing. `absorber` is the module upstream that takes 1/s exactly: a norm (its weight) or a linear
    (its output rows); None keeps the scale online, and the activation is divided before the linears.
    """

    name: str
    linears: tuple[str, ...]
    representative: str
    absorber: str | None


@dataclass(frozen=True)
class DecoderSpec:
    """One family of decoder-only models: its input groups in forward order and where its parts are.

    `layers` is a path inside the model, `attention` a path inside a decoder layer.
    """

    groups: tuple[InputGroup, ...]
    layers: str = "model.layers"
    attention: str = "self_attn"

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of `model`, in order."""
        return model.get_submodule(self.layers)

    def linear_key(self, layer_index: int, path: str) -> str:
        """Name of one linear inside the whole model: the key of statistics files and error messages."""
        return f"{self.layers}.{layer_index}.{path}"
