"""The greedy search for a rotation, on the few rows of an activation that can hold its extremes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantize.rotation import exchange_index
from quantize.settings import SearchRule
from utils.device import cpu_threads

SMALL_PRODUCT = 2**22  # multiply-adds of one step below which it runs on one thread of the CPU
STEPS_PER_CHECK = 16  # steps between two looks at whether more rows are needed: each look waits for the device


@dataclass(frozen=True)
class GreedySearch:
    """What a greedy search found.

    `rotation` [B, B] float32; `exchanges` [kept steps] the index each kept step exchanged (row numbers, to be taken
    modulo B, under the row rule); `peaks` [steps + 1] max − min of the activation at the start and after every step.
    """

    rotation: Tensor
    exchanges: Tensor
    peaks: Tensor


def greedy_rotation(x: Tensor, step: Tensor, steps: int, rule: SearchRule, lazy: bool = True) -> GreedySearch:
    """Rotate `x` step by step, each time where its outlier is, and keep the prefix of steps with the smallest peak.

    `x` [..., C] is read as rows [N, B] with B = len(step) dividing C. Each step finds the entry of largest magnitude,
    takes d = its channel (or its row number modulo B), and multiplies x by S = `step` with rows 0 ↔ d and columns 0 ↔ d
    exchanged. Computed in float32, or float64 if `x` is; the rotation is multiplied up in float64 and rounded once.

    `lazy` leaves out rows that cannot matter: a rotation keeps a row's norm, so while the norm is below both the
    largest entry and minus the smallest, the row holds neither. Rows are sorted by norm; they join when the extremes
    have come down to them, and leave when these have moved far above; the trajectory is that of the plain search.
    Sources: DuQuant, algorithm 1; the lazy rows are ours.
    """
    rows = x.detach().reshape(-1, len(step))
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norms, row_numbers = rows.norm(dim=1).sort(descending=True, stable=True)
    margin = 1 - 64 * torch.finfo(rows.dtype).eps  # norms and extremes are rounded: let a row join a little early

    def needed(*floors: Tensor) -> list[int]:
        """How many rows can hold an extreme, for each floor; all are read in one wait for the device."""
        if not lazy:
            return [len(rows)] * len(floors)
        return (norms >= margin * torch.stack(floors)[:, None]).sum(dim=1).tolist()

    search = _Search(rows, row_numbers, step.to(rows.device), rule)
    state = search.start()
    # an entry of size m is at least m/√B somewhere after any rotation: an early guess, checked like every other
    (active,) = needed(torch.maximum(state.floor, rows.abs().max() / len(step) ** 0.5))
    for done in range(0, steps, STEPS_PER_CHECK):
        count = min(STEPS_PER_CHECK, steps - done)
        state = search.resize(state, active)
        ahead = search.advance(state, count)
        at_least, active = needed(ahead.least_floor, ahead.floor)
        while at_least > len(state.rows):
            state = search.resize(state, at_least)
            ahead = search.advance(state, count)
            at_least, active = needed(ahead.least_floor, ahead.floor)
        state = ahead
    peaks = torch.stack(state.peaks).cpu()
    exchanges = torch.stack(state.exchanges).cpu() if state.exchanges else torch.empty(0, dtype=torch.int64)
    return GreedySearch(state.best.float(), exchanges[: int(peaks.argmin())], peaks)


@dataclass(frozen=True)
class _State:
    """The search after some steps. All tensors stay on the device; nothing but `rows` is larger than [B, B].

    `rows` [active, B] as rotated so far; `exchange`, the index that the next step exchanges; `product` of all steps and
    `best`, the product at the smallest peak (float64); `floor`, min(largest entry, −smallest entry) now, and
    `least_floor`, the least it was since the last check: a row whose norm is below it held no extreme.
    """

    rows: Tensor
    exchange: Tensor
    product: Tensor
    best: Tensor
    floor: Tensor
    least_floor: Tensor
    exchanges: tuple[Tensor, ...]
    peaks: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Search:
    """The fixed data of one search: all rows [N, B], their numbers by falling norm [N], the step matrix, the rule."""

    all_rows: Tensor
    row_numbers: Tensor
    step: Tensor
    rule: SearchRule

    def start(self) -> _State:
        """The state before the first step: what all rows hold, and none of them active yet."""
        exchange, low, high = self._outlier(
            self.all_rows, torch.arange(len(self.all_rows), device=self.all_rows.device)
        )
        identity = torch.eye(len(self.step), dtype=torch.float64, device=self.step.device)
        floor = torch.minimum(high, -low)
        return _State(self.all_rows[:0], exchange, identity, identity, floor, floor, (), (high - low,))

    def resize(self, state: _State, active: int) -> _State:
        """Bring in rows up to `active`, rotated as far as the others; drop rows if fewer than half are needed."""
        if active > len(state.rows):
            joining = self.all_rows[self.row_numbers[len(state.rows) : active]]
            joining = joining @ state.product.to(joining.dtype)
            return replace(state, rows=torch.cat([state.rows, joining]))
        return replace(state, rows=state.rows[:active]) if 2 * active < len(state.rows) else state

    def advance(self, state: _State, steps: int) -> _State:
        """Take `steps` greedy steps on the active rows without waiting for the device."""
        # few rows are a matter of latency: waking threads for products of microseconds costs more than it gives
        with cpu_threads(1 if state.rows.numel() * len(self.step) < SMALL_PRODUCT else None):
            return self._advance(state, steps)

    def _advance(self, state: _State, steps: int) -> _State:
        rows, exchange, product, best = state.rows, state.exchange, state.product, state.best
        exchanges, peaks, least = list(state.exchanges), list(state.peaks), torch.full_like(state.floor, torch.inf)
        smallest = torch.stack(peaks).min()
        # written in turn, and never into the rows of `state`: fresh memory for every product takes half its time
        buffers = (torch.empty_like(rows), torch.empty_like(rows))
        for number in range(steps):
            index = exchange_index(len(self.step), exchange % len(self.step))
            rotation = self.step[index][:, index]
            rows = torch.mm(rows, rotation.to(rows.dtype), out=buffers[number % 2])
            product = product @ rotation
            exchanges.append(exchange)
            exchange, low, high = self._outlier(rows, self.row_numbers)
            peaks.append(high - low)
            best = torch.where(peaks[-1] < smallest, product, best)
            smallest = torch.minimum(smallest, peaks[-1])
            floor = torch.minimum(high, -low)
            least = torch.minimum(least, floor)
        return _State(rows, exchange, product, best, floor, least, tuple(exchanges), tuple(peaks))

    def _outlier(self, rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to exchange for the entry of largest magnitude, the smallest entry, the largest entry; all 0-dim.

        `numbers` are those of the rows, or of more rows that begin with them.
        """
        # torch.aminmax along a dimension takes over ten times as long on a CPU
        low, lowest = rows.amin(dim=1).min(dim=0)
        high, highest = rows.amax(dim=1).max(dim=0)
        row = torch.where(high >= -low, highest, lowest).view(1)
        if self.rule is SearchRule.ROW:
            return numbers.index_select(0, row)[0], low, high
        return rows.index_select(0, row)[0].abs().argmax(), low, high
