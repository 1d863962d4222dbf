"""What the method must know of a decoder layer. A model family is one `DecoderSpec`; see `models/`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quantize.permutation import permute_rows_, zigzag_permutation
from quantize.smoothing import divide_norm_, divide_rows_


@dataclass(frozen=True)
class Norm:
    """Absorbs 1/s in a norm with gain `offset` + weight: an offset of 0 is Llama's norm, 1 is Gemma's."""

    path: str
    offset: float = 0.0

    def absorb_(self, layer: nn.Module, scale: Tensor) -> Tensor:
        """Divide the gain by `scale` [C]; return the scale that was really divided out."""
        return divide_norm_(layer.get_submodule(self.path), scale, self.offset)

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Rows:
    """Absorbs 1/s in output rows of a linear, from row `start` on: of v_proj, of up_proj, or of a part of a fused one.

    Exact where the group's input is linear in those rows: attention averages v, and up only multiplies act(gate).
    """

    path: str
    start: int = 0

    def absorb_(self, layer: nn.Module, scale: Tensor) -> Tensor:
        """Divide the rows by `scale` [C], and return it."""
        return divide_rows_(layer.get_submodule(self.path), scale, self.start)

    def permutation(self, peak: Tensor, block_size: int) -> Tensor:
        """An order [C] of the group's channels that these rows can take, and that spreads `peak` [C] over blocks."""
        return zigzag_permutation(peak, block_size)

    def order_(self, layer: nn.Module, permutation: Tensor) -> None:
        """Put the rows into the order `permutation` [C]."""
        permute_rows_(layer.get_submodule(self.path), permutation, self.start)

    def __str__(self) -> str:
        return f"{self.path}[{self.start}:]" if self.start else self.path


@dataclass(frozen=True)
class SharedRows(Rows):
    """Absorbs 1/s in the rows of v under grouped-query attention, where `heads` query heads read one kv head.

    The input of o_proj holds one kv head's channels `heads` times, once per query head; they can be divided upstream
    only if the copies of a channel have one scale. `share` sees to that. Without it the scale stays online.
    """

    heads: int = 1
    head_dim: int = 1

    def share(self, peak: Tensor) -> Tensor:
        """For channel peaks [C] of o_proj's input: the largest over the query heads of each kv head, in all of them."""
        by_head = peak.view(-1, self.heads, self.head_dim)
        return by_head.amax(dim=1, keepdim=True).expand_as(by_head).reshape(-1)

    def tie(self, scale: Tensor) -> Tensor:
        """`scale` [C] with the geometric mean over the query heads of each kv head in all of them."""
        by_head = scale.view(-1, self.heads, self.head_dim)
        return by_head.log().mean(dim=1, keepdim=True).exp().expand_as(by_head).reshape(-1)

    def absorb_(self, layer: nn.Module, scale: Tensor) -> Tensor:
        """Divide the rows by `scale` [C], which is the same for the copies of a channel; return it."""
        super().absorb_(layer, scale.view(-1, self.heads, self.head_dim)[:, 0].reshape(-1))
        return scale

    def permutation(self, peak: Tensor, block_size: int) -> Tensor:
        """As that of `Rows`, inside heads, and alike for the query heads of a kv head.

        Where a head has several blocks they share its channels; where a block has several heads it has them anyhow.
        """
        size = math.gcd(block_size, self.head_dim)
        if size == self.head_dim:  # a head is within one block: nothing to spread
            return torch.arange(peak.numel(), device=peak.device)
        peaks = self.share(peak).view(-1, self.heads, self.head_dim)[:, 0]
        inside = torch.stack([zigzag_permutation(each, size) for each in peaks])
        starts = torch.arange(0, peak.numel(), self.head_dim, device=peak.device).view(-1, self.heads, 1)
        return (starts + inside[:, None]).flatten()

    def order_(self, layer: nn.Module, permutation: Tensor) -> None:
        """Put the rows of every kv head into the order that the first of its query heads has in `permutation` [C]."""
        inside = permutation.view(-1, self.heads, self.head_dim)[:, 0] % self.head_dim
        starts = torch.arange(len(inside), device=inside.device)[:, None] * self.head_dim
        super().order_(layer, (starts + inside).flatten())

    def __str__(self) -> str:
        return super().__str__() + (f", shared by {self.heads} heads" if self.heads > 1 else "")


Absorber = Norm | Rows


@dataclass(frozen=True)
class InputGroup:
    """The linears of one decoder layer that read the same activation, and therefore share one transform.

    All paths are relative to the decoder layer. `representative` is the linear whose weight stands for the group in
    smoothing; None: the largest of all its linears does. `absorbers` take 1/s upstream, exactly and each by itself;
    without any the scale stays online, and the activation is divided before the linears. `readers` are other modules
    with a weight [O, C] that read what was divided: their columns are multiplied by s, and they are not quantized.
    `observed` are the modules whose inputs, as rows, are the group's activation: by default the first linear alone.
    `closes`: the module whose output is that of the group's only linear, so that it need not run once that is known.
    `ordered`: all rows upstream that make the group's channels. Where they are known, the channels can be put into
    another order there, exactly; without any they stay in theirs.
    """

    name: str
    linears: tuple[str, ...]
    representative: str | None
    absorbers: tuple[Absorber, ...] = ()
    readers: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    closes: str | None = None
    ordered: tuple[Rows, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The modules to look at for the group's activation."""
        return self.observed or self.linears[:1]


@dataclass(frozen=True)
class DecoderSpec:
    """One family of decoder-only models: its input groups in forward order and where its parts are.

    `layers` is a path inside the model, `attention` a path inside a decoder layer. `special` has the groups of layers
    that differ from the others, by index. `experts` is the path inside a decoder layer of a mixture's experts; see
    `quantize.experts`. `needs_bos`: the model is lost on windows of tokens that do not begin with BOS.
    """

    groups: tuple[InputGroup, ...]
    layers: str = "model.layers"
    attention: str = "self_attn"
    special: Mapping[int, tuple[InputGroup, ...]] = field(default_factory=dict)
    experts: str | None = None
    needs_bos: bool = False

    def at(self, index: int) -> "DecoderSpec":
        """The spec of one layer: its `groups` are those of that layer."""
        return replace(self, groups=self.special.get(index, self.groups), special={})

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of `model`, in order."""
        return model.get_submodule(self.layers)

    def linear_key(self, layer_index: int, path: str) -> str:
        """Name of one linear inside the whole model: the key of statistics files and error messages."""
        return f"{self.layers}.{layer_index}.{path}"
