"""The greedy search against an independent, plain implementation of METHOD §4, and its promises."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from conftest import run_script
from torch import Tensor

from quantize import greedy
from quantize.greedy import STEPS_PER_CHECK, greedy_rotation
from quantize.rotation import random_orthogonal, step_rotation
from quantize.rotation_settings import RotationOrder, SearchRule

BLOCKS = 3  # blocks of channels in every probe


def plain_steps(x: Tensor, step: Tensor, rule: SearchRule) -> Iterator[tuple[int | None, Tensor, Tensor]]:
    """METHOD §4 word by word on all rows in float64: the start, then every step's (index exchanged, rows, product)."""
    size = len(step)
    rows, product, d = x.double().reshape(-1, size), torch.eye(size, dtype=torch.float64), None
    while True:
        yield d, rows, product
        place = rows.argmax() if rows.max() >= -rows.min() else rows.argmin()
        row, channel = divmod(int(place), size)
        d = channel if rule is SearchRule.CHANNEL else row % size
        swap = torch.eye(size, dtype=torch.float64)
        swap[[0, d]] = swap[[d, 0]]
        rotation = swap @ step @ swap
        rows, product = rows @ rotation, product @ rotation


def plain_search(x: Tensor, step: Tensor, steps: int, rule: SearchRule) -> tuple[list[int], Tensor, Tensor]:
    """Indices exchanged by the kept steps, peaks [steps + 1], the kept product."""
    taken = list(itertools.islice(plain_steps(x, step, rule), steps + 1))
    peaks = torch.stack([rows.max() - rows.min() for _, rows, _ in taken])
    kept = int(peaks.argmin())
    return [d for d, _, _ in taken[1 : kept + 1]], peaks, taken[kept][2]


def make_probe(kind: str, block_size: int, seed: int, tokens: int = 40) -> Tensor:
    """Activations [tokens, BLOCKS · block_size], float64, with the outliers that `kind` says."""
    generator = torch.Generator().manual_seed(seed)
    channels = BLOCKS * block_size
    x = torch.randn(tokens, channels, dtype=torch.float64, generator=generator)
    if kind == "normal":
        x[:, torch.randperm(channels, generator=generator)[:2]] *= 30
    elif kind == "massive":
        x[3, 1], x[3, block_size + 2], x[17, 5] = 2000, -1500, 900
    elif kind == "massive, one sign":
        x[3, 1], x[17, 5] = 2000, 900
    elif kind == "one-sided":
        x = x.abs() + 0.1
    elif kind == "negative":
        x = -x.abs() - 0.1
    elif kind == "duplicated":
        # whole periods of rows are repeated, so that the row rule sees the same index whichever copy it takes
        period = x.reshape(-1, block_size)[:block_size]
        period[2] *= 8
        x = period.repeat(3 * BLOCKS, 1).reshape(-1, channels)
    else:
        assert kind == "none"
    return x


KINDS = ("none", "normal", "massive", "massive, one sign", "one-sided", "negative", "duplicated")


def make_step(block_size: int, seed: int, order: RotationOrder = RotationOrder.RQ) -> Tensor:
    return step_rotation(random_orthogonal(block_size, torch.Generator().manual_seed(100 + seed)), order)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "all rows"])
@pytest.mark.parametrize("rule", SearchRule)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("block_size", "order"), [(8, RotationOrder.RQ), (12, RotationOrder.QR), (32, RotationOrder.RQ)]
)
def test_search_takes_the_plain_search_s_trajectory(kind, block_size, order, rule, lazy):
    for seed in range(3):
        x, step = make_probe(kind, block_size, seed), make_step(block_size, seed, order)
        exchanges, peaks, rotation = plain_search(x, step, 37, rule)
        found = greedy_rotation(x, step, 37, rule, lazy=lazy)
        assert (found.exchanges % block_size).tolist() == exchanges
        torch.testing.assert_close(found.peaks, peaks, atol=0, rtol=1e-11)
        torch.testing.assert_close(found.rotation, rotation.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", SearchRule)
@pytest.mark.parametrize("kind", ["none", "normal", "massive"])
def test_lazy_rows_do_not_change_a_float32_search(kind, rule):
    for seed in range(4):
        x, step = make_probe(kind, 16, seed, tokens=200).float(), make_step(16, seed)
        lazy, plain = (greedy_rotation(x, step, 96, rule, lazy=lazy) for lazy in (True, False))
        assert torch.equal(lazy.exchanges, plain.exchanges)
        torch.testing.assert_close(lazy.peaks, plain.peaks, atol=0, rtol=1e-4)
        assert torch.equal(lazy.rotation, plain.rotation)


@pytest.mark.parametrize("rule", SearchRule)
def test_a_search_on_more_rows_than_can_hold_an_extreme_is_that_on_all(rule):
    x, step = make_probe("massive", 16, 0, tokens=200), make_step(16, 0)
    chosen, exact = (greedy_rotation(x, step, 96, rule, most) for most in (60, None))
    assert torch.equal(chosen.exchanges, exact.exchanges)
    assert torch.equal(chosen.rotation, exact.rotation)
    assert torch.equal(chosen.peaks, exact.peaks)


@pytest.mark.parametrize("rule", SearchRule)
@pytest.mark.parametrize("kind", ["none", "normal"])
@pytest.mark.parametrize("most", [1, 8, 40])
def test_a_search_on_chosen_rows_keeps_the_steps_that_are_best_on_all(most, kind, rule):
    better = 0
    for seed in range(4):
        x, step = make_probe(kind, 16, seed), make_step(16, seed)
        rows = x.reshape(-1, 16)
        longest = rows[rows.norm(dim=1).sort(descending=True, stable=True).indices[:most]]
        found = greedy_rotation(x, step, 64, rule, most)

        def peak(rows: Tensor, rotation: Tensor) -> float:
            return (rows @ rotation.double()).amax().item() - (rows @ rotation.double()).amin().item()

        assert found.peaks.shape == (65,)
        assert peak(rows, found.rotation) == pytest.approx(found.peaks[len(found.exchanges)].item(), rel=1e-5)
        assert peak(rows, found.rotation) <= found.peaks[0].item() * (1 + 1e-5)
        if rule is SearchRule.CHANNEL:  # under the row rule the rows left out would move its numbers
            alone = greedy_rotation(longest, step, 64, rule)
            assert peak(longest, found.rotation) >= alone.peaks.min().item() * (1 - 1e-5)
            better += peak(rows, found.rotation) < peak(rows, alone.rotation) * (1 - 1e-5)
    assert better or most > 1 or rule is SearchRule.ROW, "nothing was shown"


def test_where_all_rows_are_alike_few_of_them_find_nearly_the_peak_that_all_do():
    few, every = [], []
    for seed in range(8):
        x, step = make_probe("none", 16, seed, tokens=1000), make_step(16, seed)
        for found, most in ((few, 100), (every, None)):
            rotated = x.reshape(-1, 16) @ greedy_rotation(x, step, 128, SearchRule.CHANNEL, most).rotation.double()
            found.append((rotated.max() - rotated.min()).item())
    assert few != every
    assert sum(few) < 1.01 * sum(every)


@pytest.mark.parametrize(
    "steps", [1, STEPS_PER_CHECK - 1, STEPS_PER_CHECK, STEPS_PER_CHECK + 1, 2 * STEPS_PER_CHECK + 5]
)
def test_every_number_of_steps_is_taken_exactly(steps):
    x, step = make_probe("normal", 8, 0), make_step(8, 0)
    found = greedy_rotation(x, step, steps, SearchRule.CHANNEL)
    _, peaks, _ = plain_search(x, step, steps, SearchRule.CHANNEL)
    assert found.peaks.shape == (steps + 1,)
    torch.testing.assert_close(found.peaks, peaks, atol=0, rtol=1e-11)


@pytest.mark.parametrize("most", [None, 1])
def test_no_steps_give_the_identity(most):
    x = make_probe("massive", 8, 0)
    found = greedy_rotation(x, make_step(8, 0), 0, SearchRule.CHANNEL, most)
    assert torch.equal(found.rotation, torch.eye(8))
    assert found.exchanges.numel() == 0
    assert found.peaks.tolist() == [x.max() - x.min()]


def test_a_search_that_never_improves_keeps_the_start():
    x = torch.ones(4, 8)  # max − min is 0 and can only grow
    found = greedy_rotation(x, make_step(8, 0), 20, SearchRule.CHANNEL)
    assert torch.equal(found.rotation, torch.eye(8))
    assert found.exchanges.numel() == 0


def test_an_activation_of_zeros_is_no_special_case():
    found = greedy_rotation(torch.zeros(4, 8), make_step(8, 0), 20, SearchRule.CHANNEL)
    assert torch.equal(found.rotation, torch.eye(8))
    assert not found.peaks.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rotation_is_orthogonal_after_hundreds_of_steps_from_any_dtype(dtype):
    kept = []
    for seed in range(4):
        x = make_probe("normal", 32, seed, tokens=64).to(dtype)
        found = greedy_rotation(x, make_step(32, seed), 256, SearchRule.CHANNEL)
        rotation = found.rotation.double()
        assert found.rotation.dtype == torch.float32
        assert (rotation @ rotation.T - torch.eye(32, dtype=torch.float64)).abs().max() < 1e-6
        kept.append(len(found.exchanges))
    assert max(kept) > 100, "none of these searches kept many steps: nothing was shown"


@pytest.mark.parametrize("kind", KINDS)
def test_rotated_probe_has_the_smallest_recorded_peak(kind):
    x, step = make_probe(kind, 16, 1), make_step(16, 1)
    found = greedy_rotation(x, step, 64, SearchRule.CHANNEL)
    rows = x.reshape(-1, 16) @ found.rotation.double()
    assert (rows.max() - rows.min()).item() == pytest.approx(found.peaks.min().item(), rel=1e-6)
    assert found.peaks.argmin().item() == len(found.exchanges)


def test_the_search_leaves_its_input_and_step_alone():
    x, step = make_probe("normal", 8, 0).float(), make_step(8, 0)
    before = x.clone(), step.clone()
    greedy_rotation(x, step, 8, SearchRule.CHANNEL)
    assert torch.equal(x, before[0])
    assert torch.equal(step, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_probe_is_searched_in_float32(dtype):
    x, step = make_probe("normal", 8, 0).to(dtype), make_step(8, 0)
    found, widened = (greedy_rotation(probe, step, 32, SearchRule.CHANNEL) for probe in (x, x.float()))
    assert torch.equal(found.rotation, widened.rotation)
    assert torch.equal(found.peaks, widened.peaks)


@pytest.fixture
def active_rows(monkeypatch) -> list[int]:
    """Numbers of rows that steps were taken on, batch of steps by batch of steps."""
    counts = []
    original = greedy.take_steps

    def counting(columns, *others, **options):
        counts.append(columns.shape[1])
        return original(columns, *others, **options)

    monkeypatch.setattr(greedy, "take_steps", counting)
    return counts


@pytest.mark.parametrize("kind", ["massive", "massive, one sign"])
def test_lazy_search_steps_on_few_rows_when_outliers_are_massive(kind, active_rows):
    x, step = make_probe(kind, 32, 0, tokens=400), make_step(32, 0)
    greedy_rotation(x, step, 64, SearchRule.CHANNEL, lazy=False)
    assert set(active_rows) == {400 * BLOCKS}
    active_rows.clear()
    greedy_rotation(x, step, 64, SearchRule.CHANNEL)
    assert max(active_rows) < 400 * BLOCKS / 25


def test_rows_join_a_lazy_search_when_the_extremes_have_come_down_to_them(active_rows):
    x, step = make_probe("none", 16, 0, tokens=200), make_step(16, 0)
    x = x * torch.logspace(0, 1.5, 200, dtype=x.dtype)[:, None]  # rows of every size, so some are close to the extremes
    found = greedy_rotation(x, step, 64, SearchRule.CHANNEL)
    assert active_rows == sorted(active_rows)
    assert active_rows[0] < active_rows[-1] < 200 * BLOCKS
    torch.testing.assert_close(found.peaks, plain_search(x, step, 64, SearchRule.CHANNEL)[1], atol=0, rtol=1e-11)


@pytest.mark.parametrize("rule", SearchRule)
def test_a_row_whose_turn_comes_after_many_steps_is_rotated_as_far_as_the_others(rule):
    """A small row made to point along one channel just when the large one's extremes are lowest.

    Up to then it is below both extremes, whatever it points to; at that step it holds one of them.
    """
    shown = 0
    for seed in range(8):
        step = make_step(16, seed)
        large = 10 * torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        taken = list(itertools.islice(plain_steps(large, step, rule), 49))
        floors = torch.stack([torch.minimum(rows.max(), -rows.min()) for _, rows, _ in taken])
        late = STEPS_PER_CHECK + 1 + int(floors[STEPS_PER_CHECK + 1 :].argmin())
        norm = (floors[late] + floors[:late].min()) / 2
        if not floors[late] < 0.98 * floors[:late].min():
            continue
        shown += 1
        _, rows, product = taken[late]
        small = norm * product[:, [1]].T * (1 if rows.max() < -rows.min() else -1)
        # under the row rule it must not change which row number the large one has
        x = torch.cat([large, torch.zeros(15, 16, dtype=torch.float64), small])
        exchanges, peaks, rotation = plain_search(x, step, 48, rule)
        assert peaks[late] > plain_search(large, step, 48, rule)[1][late]
        found = greedy_rotation(x, step, 48, rule)
        torch.testing.assert_close(found.peaks, peaks, atol=0, rtol=1e-11)
        assert (found.exchanges % 16).tolist() == exchanges
        torch.testing.assert_close(found.rotation, rotation.float(), atol=1e-6, rtol=0)
    assert shown > 1, "no search came down late: nothing was shown"


@pytest.mark.parametrize("rule", SearchRule)
def test_rows_leave_and_come_back_as_the_extremes_rise_and_fall(rule, active_rows):
    """One row four times as long as all others: as it turns, its largest entry goes above and below their length."""
    changes = []
    for seed in range(3):
        x = make_probe("none", 16, seed, tokens=100).view(-1, 16)
        x /= x.norm(dim=1, keepdim=True)
        x[17] *= 4
        step = make_step(16, seed)
        exchanges, peaks, rotation = plain_search(x, step, 96, rule)
        active_rows.clear()
        found = greedy_rotation(x, step, 96, rule)
        changes += [later - earlier for earlier, later in itertools.pairwise(active_rows)]
        assert (found.exchanges % 16).tolist() == exchanges
        torch.testing.assert_close(found.peaks, peaks, atol=0, rtol=1e-11)
        torch.testing.assert_close(found.rotation, rotation.float(), atol=1e-6, rtol=0)
    assert min(changes) < 0 < max(changes)


@pytest.mark.parametrize("steps", [5, 64, 100])
@pytest.mark.parametrize("most", [None, 1, 40])
@pytest.mark.parametrize("kind", ["none", "normal", "massive"])
def test_a_search_that_looks_for_no_more_rows_when_all_are_there_finds_the_same(kind, most, steps, monkeypatch):
    x, step = make_probe(kind, 16, 0), make_step(16, 0)
    expected = greedy_rotation(x, step, steps, SearchRule.CHANNEL, most)
    monkeypatch.setattr(greedy._Search, "unchecked", lambda search, state: state.columns.shape[1] == search.most)
    found = greedy_rotation(x, step, steps, SearchRule.CHANNEL, most)
    assert torch.equal(found.exchanges, expected.exchanges)
    assert torch.equal(found.rotation, expected.rotation)
    torch.testing.assert_close(found.peaks, expected.peaks, atol=0, rtol=1e-12)


@pytest.mark.parametrize("rule", SearchRule)
def test_no_step_waits_for_the_device(rule):
    """On the meta device there are no values, so nothing that a step looks at can be read on the host."""
    rows = torch.empty(40, 16, device="meta")
    numbers = torch.empty(40, dtype=torch.int64, device="meta")
    search = greedy._Search(rows, numbers, make_step(16, 0).to("meta"), rule, 40)
    ahead = search.advance(search.resize(search.start(), 24), 5)
    assert ahead.columns.shape == (16, 24)
    assert len(ahead.exchanges) == 5


def test_steps_leave_the_rows_they_started_from_as_they_were():
    rows = make_probe("normal", 16, 0).reshape(-1, 16)
    search = greedy._Search(rows, torch.arange(len(rows)), make_step(16, 0), SearchRule.CHANNEL, len(rows))
    state = search.resize(search.start(), len(rows))
    state = search.advance(state, 3)
    before = state.columns.clone()
    first, again = (search.advance(state, 4) for _ in range(2))
    assert torch.equal(state.columns, before)
    assert torch.equal(first.columns, again.columns)
    assert not torch.equal(first.columns, before)


def test_the_benchmark_of_the_search_finds_the_same_trajectories(tmp_path):
    few = ("--tokens", 64, "--channels", 256, "--block_size", 16, "--steps", 20, "--repeats", 1)
    done = run_script("benchmarks/search.py", *few, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if "yes" in line]
    assert [row[1] for row in rows] == ["gaussian", "normal", "massive"]
