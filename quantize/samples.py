"""What calibration samples show of a layer: energies and heads in full precision, and the rows that enter a group."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from duquant.attention import attach_
from duquant.linear import expanded
from duquant.tensors import widen
from quantize.observe import batches_of, capture_rows
from quantize.spec import DecoderSpec, InputGroup
from utils.distributed import gather, sum_, world_size
from utils.memory import Allocate

HEAD_TOKENS = 4096  # tokens of all samples whose q, k and v are looked at
ROWS_AT_ONCE = 8192  # rows that are transformed and rounded at a time


@dataclass
class LayerView:
    """What calibration samples show of a layer in full precision.

    `energies` and `peaks` [C] of every group's input, the root of the mean square and the largest magnitude; `query`,
    `key` [n, heads, head_dim] (behind RoPE) and `value` of some tokens; `outputs` [heads, head_dim, head_dim], the second
    moments of what each query head gives o_proj; `rows` [m, C] of every group on this process, if they were to be kept.
    """

    energies: dict[str, Tensor] = field(default_factory=dict)
    peaks: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    outputs: Tensor | None = None
    rows: dict[str, Tensor] = field(default_factory=dict)


class _GroupWatch:
    """Counts and keeps what enters the linears of one group; `head_dim`: by head too, where it comes from heads."""

    def __init__(self, keep: bool, head_dim: int | None):
        self.total, self.count, self.peak, self.head_dim, self.moments = None, 0, None, head_dim, None
        self.rows: list[Tensor] | None = [] if keep else None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        squares = x.double().square().sum(dim=0) if x.device.type == "cuda" else x.float().square().sum(dim=0).double()
        self.total = squares if self.total is None else self.total + squares
        peak = x.abs().amax(dim=0).float() if len(x) else torch.zeros_like(squares).float()
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self.count += len(x)
        if self.head_dim is not None:
            heads = x.float().unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
            moments = (heads.transpose(1, 2) @ heads).double()
            self.moments = moments if self.moments is None else self.moments + moments
        if self.rows is not None:
            self.rows.append(x.cpu())


class _HeadWatch(nn.Module):
    """Stands for an attention quantizer: keeps some tokens of q, k and v, and changes nothing."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride, self.kept = stride, {"query": [], "key": [], "value": []}

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for name, x in (("query", query), ("key", key), ("value", value)):
            tokens = x.detach()[:, :, self.stride // 2 :: self.stride].transpose(1, 2).flatten(0, 1)
            self.kept[name].append(tokens.float().cpu())
        return query, key, value


@contextmanager
def viewed(layer: nn.Module, spec: DecoderSpec, tokens: int, keep_rows: bool = False) -> Iterator[LayerView]:
    """Inside the block `layer`, in full precision, is run on samples of so many `tokens` in all; then the view is full.

    All processes look at their own samples and have the view of all, but for the rows, which are their own.
    """
    view, attention = LayerView(), layer.get_submodule(spec.attention)
    sizes = {"o": attention.head_dim}
    watches = {group.name: _GroupWatch(keep_rows, sizes.get(group.name)) for group in spec.groups}
    heads = _HeadWatch(max(1, tokens // HEAD_TOKENS))
    handles = [
        layer.get_submodule(path).register_forward_pre_hook(watches[group.name])
        for group in spec.groups
        for path in group.inputs
    ]
    attach_(attention, heads)
    try:
        yield view
    finally:
        attach_(attention, None)
        for handle in handles:
            handle.remove()
    device = next(layer.parameters()).device
    for name, watch in watches.items():
        parts = [part for part in gather((watch.total, watch.count, watch.peak, watch.moments)) if part[0] is not None]
        total, count = sum(part[0].cpu() for part in parts), sum(part[1] for part in parts)
        view.energies[name] = (total / max(1, count)).sqrt().float().to(device)
        view.peaks[name] = torch.stack([part[2].cpu() for part in parts]).amax(dim=0).to(device)
        if watch.moments is not None:
            view.outputs = (sum(part[3].cpu() for part in parts) / count).to(device)
        if watch.rows is not None:
            view.rows[name] = torch.cat(watch.rows)
    for name, kept in heads.kept.items():
        view.heads[name] = torch.cat([part for part in gather(torch.cat(kept))]).to(device)


class GroupRows:
    """The rows [n, C] that enter a group of a layer as it is now, from this process's samples [N, T, C] of `hidden`.

    They are on the host, and moved to `device`, that of the layer, some at a time.
    """

    def __init__(
        self,
        layer: nn.Module,
        group: InputGroup,
        hidden: Tensor,
        kwargs: dict,
        device: torch.device,
        allocate: Allocate,
    ):
        self.device, pieces, filled = device, [], 0
        with expanded(layer):
            for batch in batches_of(hidden):
                x = capture_rows(layer, group.inputs, batch.to(device), kwargs).flatten(0, -2)
                if len(group.inputs) > 1:  # how many rows an expert is given is not known before
                    pieces.append(x.cpu())
                    continue
                if not pieces:
                    pieces.append(allocate((hidden.shape[0] * hidden.shape[1], x.shape[-1]), x.dtype))
                pieces[0][filled : filled + len(x)] = x
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
        rows = torch.cat(gather(own)).to(self.device)
        return rows[peaks(rows).topk(min(count, len(rows))).indices]

    def some(self, count: int) -> Tensor:
        """About `count` rows of all processes, evenly spread over the samples, in float32."""
        own = self.rows[:: max(1, len(self.rows) * world_size() // count)]
        return torch.cat(gather(own)).to(self.device).float()

    def peak(self) -> Tensor:
        """The largest magnitude of every channel [C] on all processes."""
        own = torch.stack([part.abs().amax(dim=0) for part in self.parts()]).amax(dim=0)
        return torch.stack([part.to(own.device) for part in gather(own.cpu())]).amax(dim=0)


def parts_of(rows: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Rows [n, C], some at a time, on `device` and in at least float32."""
    for part in rows.split(ROWS_AT_ONCE):
        yield widen(part.to(device))


def mean_of(parts: Iterable[Tensor]) -> Tensor:
    """The mean [C], float32, of the rows of all processes, given some [n, C] at a time."""
    return _mean((part.double().sum(dim=0), len(part)) for part in parts).float()


def moment_of(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ a bᵀ / n [C, C], float64, over pairs of rows of all processes, given some (a, b) [n, C] at a time."""
    return _mean(((a.T @ b).double(), len(a)) for a, b in parts)


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
