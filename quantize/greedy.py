"""The greedy search for a rotation, on the few rows of an activation that can hold its extremes."""

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from duquant.tensors import extremes
from quantize import greedy_kernel
from quantize.rotation import exchange_indices
from quantize.rotation_settings import SearchRule
from utils.captured import Captured
from utils.device import cpu_threads

SMALL_PRODUCT = 2**22  # multiply-adds of one step below which it runs on one thread of the CPU
STEPS_PER_CHECK = 16  # steps between two looks at whether more rows are needed: each look waits for the device
STEPS_UNCHECKED = 64  # steps that are launched as one, where no more rows can join
PREFIXES_CHECKED = 4  # of a search on chosen rows, how many of the best prefixes are looked at on all rows
FACTOR_ELEMENTS = 2**22  # of the matrices that are multiplied up at once
# On a GPU so many rows take a step as fast as few, and numbers of rows are powers of two: each is captured once.
LEAST_CAPTURED = 512
MOST_CAPTURED = 2**25  # elements, three copies of which a captured graph keeps: 176,128 rows of 128 are fewer


@dataclass(frozen=True)
class GreedySearch:
    """What a greedy search found.

    `rotation` [B, B] float32; `exchanges` [kept steps] the index each kept step exchanged; `peaks` [steps + 1]
    max − min of the activation at the start and after every step; of a search on chosen rows theirs alone, but for the
    prefixes that were looked at on all of them.
    """

    rotation: Tensor
    exchanges: Tensor
    peaks: Tensor


def greedy_rotation(
    x: Tensor, step: Tensor, steps: int, rule: SearchRule, most: int | None = None, *, lazy: bool = True
) -> GreedySearch:
    """Rotate `x` step by step, each time where its outlier is, and keep the prefix of steps with the smallest peak.

    `x` [..., C] is read as rows [N, B] with B = len(step) dividing C. Each step finds the entry of largest magnitude,
    takes d = its channel (or its row number modulo B), and multiplies x by S = `step` with rows 0 ↔ d and columns 0 ↔ d
    exchanged. Computed in float32, or float64 if `x` is; the rotation is multiplied up in float64 and rounded once.

    `lazy` leaves out rows that cannot matter: a rotation keeps a row's norm, so while the norm is below both the
    largest entry and minus the smallest, the row holds neither. Rows are sorted by norm; they join when the extremes
    have come down to them, and leave when these have moved far above; the trajectory is that of the plain search.

    `most`: steps are taken on so many rows at most, the longest. Where that leaves out rows that could have held an
    extreme, the best prefixes are looked at on all rows, and the one with the smallest peak there is kept.
    Sources: DuQuant, algorithm 1; the lazy and the chosen rows are ours.
    """
    rows = x.detach().reshape(-1, len(step))
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    most = len(rows) if most is None else min(most, len(rows))
    norms, numbers = rows.norm(dim=1).sort(descending=True, stable=True)
    margin = 1 - 64 * torch.finfo(rows.dtype).eps  # norms and extremes are rounded: let a row join a little early
    search, exact = _Search(rows, numbers, step.to(rows.device), rule, most), True

    def needed(*floors: Tensor) -> list[int]:
        """How many rows can hold an extreme, for each floor; all are read in one wait for the device."""
        if not lazy:
            return [len(rows)] * len(floors)
        return (norms >= margin * torch.stack(floors)[:, None]).sum(dim=1).tolist()

    state = search.start()
    # an entry of size m is at least m/√B somewhere after any rotation: an early guess, checked like every other
    (active,) = needed(torch.maximum(state.floor, rows.abs().max() / len(step) ** 0.5))
    done = 0
    while done < steps:
        state = search.resize(state, active)
        if search.unchecked(state):
            break
        count = min(STEPS_PER_CHECK, steps - done)
        ahead = search.advance(state, count)
        at_least, active = needed(ahead.least_floor, ahead.floor)
        while min(at_least, most) > state.columns.shape[1]:
            state = search.resize(state, at_least)
            ahead = search.advance(state, count)
            at_least, active = needed(ahead.least_floor, ahead.floor)
        exact = exact and at_least <= state.columns.shape[1]
        state, done = ahead, done + count
    floors = [state.floor]
    while done < steps:  # in two sizes, for each of which a graph is captured
        count = STEPS_UNCHECKED if steps - done >= STEPS_UNCHECKED else min(STEPS_PER_CHECK, steps - done)
        state, done = search.advance(state, count), done + count
        floors.append(state.least_floor)
    if most < len(rows):
        exact = exact and needed(torch.stack(floors).amin())[0] <= most
    return search.best(state) if exact else search.best_on_all_rows(state)


@dataclass(frozen=True)
class _State:
    """The search after some steps. All tensors stay on the device.

    `columns` [B, active] are rows as rotated so far; `exchange` [1], the index that the next step exchanges;
    `exchanges` [steps] and `peaks` [steps + 1] until now; `product` [B, B] of the first `multiplied` steps, float64;
    `floor`, min(largest entry, −smallest entry) now, and `least_floor`, the least it was since the last check: a row
    whose norm is below it held no extreme.
    """

    columns: Tensor
    exchange: Tensor
    exchanges: Tensor
    peaks: Tensor
    product: Tensor
    multiplied: int
    floor: Tensor
    least_floor: Tensor


@dataclass(frozen=True)
class _Search:
    """The fixed data of one search: all rows [N, B], their numbers by falling norm [N], the step matrix, the rule.

    At `most` so many rows take steps.
    """

    all_rows: Tensor
    row_numbers: Tensor
    step: Tensor
    rule: SearchRule
    most: int

    def captures(self, rows: int) -> bool:
        """Whether steps of so many rows are launched as one."""
        return self.all_rows.device.type == "cuda" and rows * len(self.step) <= MOST_CAPTURED

    def start(self) -> _State:
        """The state before the first step: what all rows hold, and none of them active yet."""
        numbers = torch.arange(len(self.all_rows), device=self.all_rows.device) % len(self.step)
        exchange, low, high = _outlier(self.all_rows.T, numbers, self.rule)
        low, high, none = low.amin(), high.amax(), exchange[:0]
        identity = torch.eye(len(self.step), dtype=torch.float64, device=self.step.device)
        floor = torch.minimum(high, -low)
        return _State(self.all_rows[:0].T, exchange, none, (high - low)[None], identity, 0, floor, floor)

    def resize(self, state: _State, active: int) -> _State:
        """Bring in rows up to `active`, rotated as far as the others; drop rows if fewer than half are needed."""
        if self.captures(active):
            active = 1 << max(active - 1, LEAST_CAPTURED - 1).bit_length()
        active, present = min(active, self.most), state.columns.shape[1]
        if active > present:
            product = state.product @ product_of(self.step, state.exchanges[state.multiplied :])
            joining = self.all_rows[self.row_numbers[present:active]] @ product.to(self.all_rows.dtype)
            # laid out as rows, which a CPU multiplies faster; a GPU copies them to how its graph has them
            columns = torch.cat([state.columns.T, joining]).T
            return replace(state, columns=columns, product=product, multiplied=len(state.exchanges))
        return replace(state, columns=state.columns[:, :active]) if 2 * active < present else state

    def unchecked(self, state: _State) -> bool:
        """Whether the remaining steps are taken without a look: on a GPU, where no more rows can join.

        To wait for it costs more than that a few could leave; as it is, the host prepares what comes next meanwhile.
        """
        present = state.columns.shape[1]
        return present == self.most and self.captures(present)

    def advance(self, state: _State, steps: int) -> _State:
        """Take `steps` greedy steps on the active rows without waiting for the device."""
        columns = state.columns
        numbers = self.row_numbers[: columns.shape[1]] % len(self.step)
        take = partial(take_steps, rule=self.rule, count=steps)
        if self.captures(columns.shape[1]):
            take = captured_steps(tuple(columns.shape), columns.dtype, columns.device, self.rule, steps)
        # few rows are a matter of latency: waking threads for products of microseconds costs more than it gives
        with cpu_threads(1 if columns.numel() * len(self.step) < SMALL_PRODUCT else None):
            columns, exchanges, low, high = take(columns, state.exchange, numbers, self.step.to(columns.dtype))
        floors = torch.minimum(high, -low)
        return _State(
            columns,
            exchanges[-1:],
            torch.cat([state.exchanges, exchanges[:-1]]),
            torch.cat([state.peaks, high - low]),
            state.product,
            state.multiplied,
            floors[-1],
            floors.amin(),
        )

    def best(self, state: _State) -> GreedySearch:
        """The prefix with the smallest peak."""
        peaks = state.peaks.cpu()
        exchanges = state.exchanges[: int(peaks.argmin())]
        return GreedySearch(product_of(self.step, exchanges).float(), exchanges.cpu(), peaks)

    def best_on_all_rows(self, state: _State) -> GreedySearch:
        """Of the start and the prefixes that are best on the active rows, the one with the smallest peak on all."""
        peaks = state.peaks.cpu()
        prefixes = 1 + peaks[1:].topk(min(PREFIXES_CHECKED, len(peaks) - 1), largest=False).indices.sort().values
        prefixes = torch.cat([prefixes.new_zeros(1), prefixes])
        product = torch.eye(len(self.step), dtype=torch.float64, device=self.step.device)
        rotations, found, rotated = [], [], torch.empty_like(self.all_rows)
        for before, prefix in itertools.pairwise([0, *prefixes.tolist()]):
            product = product @ product_of(self.step, state.exchanges[before:prefix])
            rotations.append(product.float())
            torch.mm(self.all_rows, product.to(self.all_rows.dtype), out=rotated)
            found.append(torch.stack(torch.aminmax(rotated)).diff())
        found = torch.cat(found).cpu()
        best = int(found.argmin())
        return GreedySearch(
            rotations[best], state.exchanges[: int(prefixes[best])].cpu(), peaks.scatter(0, prefixes, found)
        )


def take_steps(
    columns: Tensor, exchange: Tensor, numbers: Tensor, step: Tensor, *, rule: SearchRule, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`count` greedy steps on rows, given as `columns` [B, A], the first of which exchanges the index `exchange` [1].

    Returns the columns, the indices exchanged and the next one [count + 1], and the smallest and the largest entry
    after every step [count] each. `numbers` [A] are those of the rows, modulo B.
    """
    if rule is SearchRule.CHANNEL and greedy_kernel.serves(columns):
        return greedy_kernel.take_steps(columns, exchange, step, count)
    exchanges, lows, highs = [exchange], [], []
    step, indices = step.T.contiguous(), exchange_indices(len(step), columns.device)
    # written in turn, and never into the columns given: fresh memory for every product takes half its time
    buffers = (torch.empty_like(columns), torch.empty_like(columns))
    for number in range(count):
        index = indices.index_select(0, exchanges[-1])[0]
        rotation = step.index_select(0, index).index_select(1, index)
        columns = torch.mm(rotation, columns, out=buffers[number % 2])
        exchange, low, high = _outlier(columns, numbers, rule)
        exchanges.append(exchange)
        lows.append(low)
        highs.append(high)
    return columns, torch.cat(exchanges), torch.stack(lows).amin(dim=1), torch.stack(highs).amax(dim=1)


def _outlier(columns: Tensor, numbers: Tensor, rule: SearchRule) -> tuple[Tensor, Tensor, Tensor]:
    """What to exchange for the entry of largest magnitude [1]; the least and largest entries by channel, or by row.

    `columns` [B, A] are rows with these `numbers`, modulo B, which the row rule asks for.
    """
    low, high = extremes(columns, dim=1 if rule is SearchRule.CHANNEL else 0)
    place = torch.maximum(high, -low).argmax().view(1)
    return (place if rule is SearchRule.CHANNEL else numbers.index_select(0, place)), low, high


@lru_cache(maxsize=32)
def captured_steps(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, rule: SearchRule, count: int
) -> Captured:
    """`take_steps` on a GPU as one launch."""
    size, active = shape
    columns, whole = torch.zeros(shape, dtype=dtype, device=device), {"dtype": torch.int64, "device": device}
    if greedy_kernel.serves(columns):  # which reads them as rows
        columns = columns.new_zeros(active, size).T
    examples = (columns, torch.zeros(1, **whole), torch.zeros(active, **whole), columns.new_zeros(size, size))
    return Captured(partial(take_steps, rule=rule, count=count), *examples)


def product_of(step: Tensor, exchanges: Tensor) -> Tensor:
    """S(d₁) S(d₂) … of `exchanges` [n], S(d) being `step` [B, B] with rows and columns 0 ↔ d exchanged: float64."""
    size, table = len(step), exchange_indices(len(step), step.device)
    product = torch.eye(size, dtype=torch.float64, device=step.device)
    at_once = max(1, FACTOR_ELEMENTS // size**2)
    if step.device.type == "cpu":  # whose caches they are to fit
        at_once = min(STEPS_PER_CHECK, at_once)
    for start in range(0, len(exchanges), at_once):
        indices = table.index_select(0, exchanges[start : start + at_once])
        factors = step[indices[:, :, None], indices[:, None, :]]
        while len(factors) > 1:  # in pairs, all at once
            pairs = factors[:-1:2] @ factors[1::2]
            factors = torch.cat([pairs, factors[len(factors) // 2 * 2 :]])
        product = product @ factors[0]
    return product
