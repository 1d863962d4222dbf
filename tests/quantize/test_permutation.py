"""The zigzag permutation."""

import pytest
import torch

from quantize.permutation import zigzag_permutation

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
