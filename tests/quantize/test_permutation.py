"""The zigzag permutation."""

import pytest
import torch

from quantize.permutation import permute_rows_, zigzag_permutation
from quantize.spec import SharedRows

SHAPES = [(4, 2), (12, 4), (48, 16), (80, 8), (15, 5), (16, 16), (6, 1)]


def random_peaks(channels: int, seed: int = 0) -> torch.Tensor:
    """Channel peaks, sorted: the worst arrangement for blocks of neighbours."""
    peaks = torch.rand(channels, generator=torch.Generator().manual_seed(seed)).add(0.1)
    return peaks.sort().values


@pytest.mark.parametrize(("channels", "block_size"), SHAPES)
def test_every_channel_is_dealt_once(channels, block_size):
    permutation = zigzag_permutation(random_peaks(channels), block_size)
    assert permutation.dtype == torch.int64
    assert permutation.sort().values.tolist() == list(range(channels))


def test_dealing_goes_up_and_back_down_with_two_in_a_row_at_the_turns():
    # peaks 12, 11, … 1 at shuffled places; three blocks of four
    peaks = torch.tensor([3.0, 12, 7, 1, 9, 5, 11, 2, 8, 6, 10, 4])
    permutation = zigzag_permutation(peaks, 4)
    assert peaks[permutation].view(3, 4).tolist() == [[12, 7, 6, 1], [11, 8, 5, 2], [10, 9, 4, 3]]


def test_equal_peaks_keep_their_order():
    assert zigzag_permutation(torch.ones(6), 3).tolist() == [0, 3, 4, 1, 2, 5]


@pytest.mark.parametrize(("channels", "block_size"), SHAPES)
def test_channels_fall_inside_a_block(channels, block_size):
    peaks = random_peaks(channels)
    blocks = peaks[zigzag_permutation(peaks, block_size)].view(-1, block_size)
    assert (blocks.diff(dim=1) <= 0).all()


@pytest.mark.parametrize(("channels", "block_size"), [(48, 16), (80, 10), (1024, 128), (640, 32)])
def test_block_means_come_as_close_as_dealing_allows(channels, block_size):
    peaks = random_peaks(channels).double()

    def unevenness(ordered: torch.Tensor) -> float:
        means = ordered.view(-1, block_size).mean(dim=1)
        return (means.max() - means.min()).item()

    # between two blocks the rounds' differences alternate in sign and lie in disjoint ranges, so they sum to less
    # than the whole range
    bound = (peaks.max() - peaks.min()).item() / block_size
    assert unevenness(peaks[zigzag_permutation(peaks, block_size)]) <= bound
    assert unevenness(peaks) > 4 * bound


def test_peaks_are_left_as_they_are():
    peaks = random_peaks(12)
    before = peaks.clone()
    zigzag_permutation(peaks, 4)
    assert torch.equal(peaks, before)


def test_a_block_size_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="10 channels do not divide by block size 4"):
        zigzag_permutation(torch.ones(10), 4)


def test_channels_of_heads_stay_inside_them_alike_for_the_query_heads_that_share_one():
    """Two kv heads of 8 channels, read by three query heads each, in blocks of 4."""
    rows = SharedRows("v", 0, heads=3, head_dim=8)
    peak = torch.rand(48, generator=torch.Generator().manual_seed(0))
    order = rows.permutation(peak, 4)
    assert torch.equal(order.sort().values, torch.arange(48))
    inside = order.view(2, 3, 8) - 8 * torch.arange(6).view(2, 3, 1)
    assert ((inside >= 0) & (inside < 8)).all()
    assert torch.equal(inside, inside[:, :1].expand(2, 3, 8))
    shared = rows.share(peak)
    before, after = (each.view(-1, 2, 4).amax(dim=2).diff(dim=1).abs().sum() for each in (shared, shared[order]))
    two_largest = shared.view(-1, 8).topk(2).values
    assert torch.allclose(after, two_largest.diff(dim=1).abs().sum()), "each block of a head has one of its two largest"
    assert after <= before


def test_channels_stay_where_a_head_is_within_one_block():
    rows = SharedRows("v", 0, heads=2, head_dim=8)
    for block_size in (8, 16, 32):
        assert torch.equal(rows.permutation(torch.rand(32), block_size), torch.arange(32))


def test_rows_from_a_start_on_are_put_into_order_and_the_others_are_left():
    linear = torch.nn.Linear(3, 10)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    order = torch.tensor([2, 0, 3, 1])
    permute_rows_(linear, order, start=5)
    expected = [0, 1, 2, 3, 4, 7, 5, 8, 6, 9]
    assert torch.equal(linear.weight, weight[expected])
    assert torch.equal(linear.bias, bias[expected])
