"""What calibration samples show of a layer: energies and heads in full precision, and the rows that enter a group."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from duquant.attention import attach_
from duquant.linear import expanded
from duquant.tensors import widen
from quantize.observe import capture_rows, known_outputs, parts_of_samples
from quantize.spec import DecoderSpec, InputGroup
from utils.device import tf32
from utils.distributed import gather, sum_, world_size
from utils.ferry import Ferry
from utils.memory import Allocate

HEAD_TOKENS = 4096  # tokens of all samples whose q, k and v are looked at
ROWS_AT_ONCE = 8192  # rows that are transformed and rounded at a time


@dataclass
class LayerView:
    """What calibration samples show of a layer in full precision.

    `energies` [C] of every group's input: the root of the mean square, every token scaled to length 1, for its ranges
    are its own; about the mean, where that will be subtracted. `outputs` [heads, head_dim, head_dim]: the same second
    moments of what each query head gives o_proj. `query`, `key` [n, heads, head_dim] (behind RoPE) and `value` of some
    tokens. `rows` [m, C] of every group on this process, if they were to be kept.
    """

    energies: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    outputs: Tensor | None = None
    rows: dict[str, Tensor] = field(default_factory=dict)


class _GroupWatch:
    """Sums over what enters the linears of one group: weights w = 1/|x|², w·x, w·x², and w·xᵀx by head."""

    def __init__(self, keep: torch.device | None, head_dim: int | None):
        self.sums: list[Tensor] | None = None
        self.head_dim, self.keep, self.rows = head_dim, keep, None if keep is None else []

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        if self.rows is not None:
            # a copy: a layer without a norm in front is given what will be written over
            self.rows.append(x.to(self.keep, copy=True))
        x = widen(x)
        lengths = x.norm(dim=1, keepdim=True)
        lengths = lengths.masked_fill(lengths < 1e-12, torch.inf)  # a token of zeros has no direction, and no weight
        unit = x / lengths
        sums = [lengths.pow(-2).sum(), (unit / lengths).sum(dim=0), unit.square().sum(dim=0)]
        if self.head_dim is not None:
            heads = unit.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
            sums.append(heads.transpose(1, 2) @ heads)
        sums = [each.double() for each in sums]
        self.sums = sums if self.sums is None else [a + b for a, b in zip(self.sums, sums, strict=True)]


class _HeadWatch(nn.Module):
    """Stands for an attention quantizer: keeps some tokens of q, k and v, and changes nothing."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride, self.kept = stride, {"query": [], "key": [], "value": []}

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for name, x in (("query", query), ("key", key), ("value", value)):
            stride = min(self.stride, x.shape[2])  # of a sample that is shorter, one token
            tokens = x.detach()[:, :, stride // 2 :: stride].transpose(1, 2).flatten(0, 1)
            self.kept[name].append(tokens.float())
        return query, key, value


@contextmanager
def viewed(
    layer: nn.Module, spec: DecoderSpec, tokens: int, centered: bool, keep_rows: torch.device | None = None
) -> Iterator[LayerView]:
    """Inside the block `layer`, in full precision, is run on samples of so many `tokens` in all; then the view is full.

    `centered`: energies are about the mean. `keep_rows`: on which device, if at all.

    All processes look at their own samples and have the view of all, but for the rows, which are their own.
    """
    view, attention = LayerView(), layer.get_submodule(spec.attention)
    sizes = {"o": attention.head_dim}
    watches = {group.name: _GroupWatch(keep_rows, sizes.get(group.name)) for group in spec.groups}
    heads_watch = _HeadWatch(max(1, tokens // HEAD_TOKENS))
    handles = [
        layer.get_submodule(path).register_forward_pre_hook(watches[group.name])
        for group in spec.groups
        for path in group.inputs
    ]
    attach_(attention, heads_watch)
    try:
        yield view
    finally:
        attach_(attention, None)
        for handle in handles:
            handle.remove()
    device = next(layer.parameters()).device
    for name, watch in watches.items():
        parts = [part for part in gather(watch.sums and [each.cpu() for each in watch.sums]) if part is not None]
        weight, first, second, *moments = (torch.stack(each).sum(dim=0).to(device) for each in zip(*parts, strict=True))
        weight = weight.clamp(min=torch.finfo(weight.dtype).tiny)  # of zeros alone
        mean = first / weight if centered else torch.zeros_like(first)
        view.energies[name] = (second / weight - mean.square()).clamp(min=0).sqrt().float()
        for moment in moments:
            heads = mean.unflatten(0, (len(moment), -1))
            view.outputs = moment / weight - heads[:, :, None] * heads[:, None, :]
        if watch.rows is not None:
            view.rows[name] = torch.cat(watch.rows)
            watch.rows.clear()  # or all of them would be there twice
    for name, kept in heads_watch.kept.items():
        view.heads[name] = everywhere(torch.cat(kept))


class KnownOutputs:
    """What modules of a partly quantized layer, whose inputs will not change any more, give for the student's samples.

    `attention`: the path of the layer's attention, whose output is a pair.
    """

    def __init__(self, attention: str, allocate: Allocate):
        self.attention, self.allocate, self.outputs = attention, allocate, {}

    def close_(self, layer: nn.Module, group: InputGroup, rows: "GroupRows", samples: tuple[int, int]) -> None:
        """Keep what the module gives that the group closes; `rows` enter its linear, of `samples`: N of T tokens."""
        linear, output = layer.get_submodule(group.linears[0]), None
        inputs = rows.rows.view(*samples, -1)
        with Ferry(rows.device) as ferry:
            for part in parts_of_samples(inputs):
                own = linear(ferry.bring(inputs, part))
                output = self.allocate((*samples, own.shape[-1]), own.dtype) if output is None else output
                ferry.give_back(output, part, own)
        self.outputs[group.closes] = output

    def batches(self, layer: nn.Module, hidden: Tensor, ferry: Ferry) -> Iterator[tuple[range, Tensor]]:
        """Parts of `hidden` [N, T, C] and what they are on the device, in order.

        While one is used, the modules of `layer` give what is known.
        """
        for part in parts_of_samples(hidden):
            known = {path: ferry.bring(output, part) for path, output in self.outputs.items()}
            with known_outputs(layer, known, self.attention):
                yield part, ferry.bring(hidden, part)


class GroupRows:
    """The rows [n, C] that enter a group of a layer as it is now, from this process's samples [N, T, C] of `hidden`.

    They are where `hidden` is, and moved to `device`, that of the layer, some at a time.
    """

    def __init__(
        self,
        layer: nn.Module,
        group: InputGroup,
        hidden: Tensor,
        kwargs: dict,
        device: torch.device,
        allocate: Allocate,
        known: "KnownOutputs | None" = None,
    ):
        self.device, pieces, filled = device, [], 0
        known = known or KnownOutputs("", allocate)
        with expanded(layer), Ferry(device) as ferry:
            for _, batch in known.batches(layer, hidden, ferry):
                x = capture_rows(layer, group.inputs, batch, kwargs).flatten(0, -2)
                if len(group.inputs) > 1:  # how many rows an expert is given is not known before
                    pieces.append(x.to(hidden.device))
                    continue
                if not pieces:
                    pieces.append(allocate((hidden.shape[0] * hidden.shape[1], x.shape[-1]), x.dtype))
                ferry.give_back(pieces[0], range(filled, filled + len(x)), x)
                filled += len(x)
        self.rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def parts(self) -> Iterator[Tensor]:
        """All rows, some at a time, on the device and in at least float32."""
        return parts_of(self.rows, self.device)

    def largest(self, count: int, scale: Tensor | None) -> Tensor:
        """The `count` rows of all processes with the largest magnitudes behind division by `scale` [C]: [count, C]."""

        def peaks(rows: Tensor) -> Tensor:
            return (rows if scale is None else rows / scale).abs().amax(dim=1)

        found = torch.cat([peaks(part) for part in self.parts()])
        own = self.rows[found.topk(min(count, len(found))).indices.to(self.rows.device)]
        rows = everywhere(own.to(self.device))
        return rows[peaks(rows).topk(min(count, len(rows))).indices]

    def some(self, count: int) -> Tensor:
        """About `count` rows of all processes, evenly spread over the samples, in float32."""
        own = self.rows[:: max(1, len(self.rows) * world_size() // count)]
        return everywhere(own.to(self.device)).float()

    def peak(self) -> Tensor:
        """The largest magnitude of every channel [C] on all processes."""
        return peak_of(self.parts())


def parts_of(rows: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Rows [n, C], some at a time, on `device` and in at least float32."""
    for part in rows.split(ROWS_AT_ONCE):
        yield widen(part.to(device))


def peak_of(parts: Iterable[Tensor]) -> Tensor:
    """The largest magnitude of every channel [C] of the rows of all processes, given some [n, C] at a time."""
    own = torch.stack([part.abs().amax(dim=0) for part in parts]).amax(dim=0)
    return everywhere(own[None]).amax(dim=0)


def everywhere(own: Tensor) -> Tensor:
    """The rows of all processes where the `own` are: none could use what is on another one's GPU. Alone the `own`."""
    return own if world_size() == 1 else torch.cat([each.to(own.device) for each in gather(own.cpu())])


def mean_of(parts: Iterable[Tensor]) -> Tensor:
    """The mean [C], float32, of the rows of all processes, given some [n, C] at a time."""
    return _mean((part.double().sum(dim=0), len(part)) for part in parts).float()


def moment_of(parts: Iterable[tuple[Tensor, ...]]) -> Tensor:
    """Σ bᵀb / n and, of pairs, Σ aᵀb / n, joined [C or 2C, C], float64, over the rows of all processes.

    Some (b,) or (b, a) [n, C] are given at a time.
    """

    def products(rows: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([product(each, rows[0]) for each in rows])

    return _mean((products(rows).double(), len(rows[0])) for rows in parts)


def product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀb of [n, C] and [n, D]: [C, D]. On a GPU of three products of TF32, in three eighths of the time of float32's.

    Factors are sums of two numbers, the first of which TF32 holds whole: only that of the small ones is left out.
    """
    if a.device.type != "cuda" or a.dtype is not torch.float32:
        return a.T @ b
    (a_high, a_low), (b_high, b_low) = in_two(a), in_two(b)
    with tf32(a.device):
        return (a_low.T @ b_high).addmm_(a_high.T, b_low).addmm_(a_high.T, b_high)


def in_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as a number with 10 bits of fraction, and what is left of it."""
    high = (x.view(torch.int32) & -(2**13)).view(torch.float32)
    return high, x - high


def _mean(sums: Iterable[tuple[Tensor, int]]) -> Tensor:
    total, count = None, 0
    for own, number in sums:
        total = own if total is None else total.add_(own)
        count += number
    rows = torch.tensor([float(count)], dtype=torch.float64, device=total.device)
    sum_([total])
    sum_([rows])
    return total / rows


def heads_by_kv(view: Mapping[str, Tensor], role: str) -> Tensor:
    """Vectors of q, k or v in a view's heads by the kv head that they meet: [kv heads, vectors, head_dim]."""
    x, groups = view[role], view["key"].shape[1]
    return x.unflatten(1, (groups, -1)).permute(1, 0, 2, 3).flatten(1, 2)
