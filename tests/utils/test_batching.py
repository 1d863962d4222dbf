"""Batches that back off when memory runs out."""

import pytest
import torch

from utils.batching import AUTO_TOKENS_CPU, BatchSize, is_out_of_memory, share_batches
from utils.errors import InputError

CPU = torch.device("cpu")


def fits(limit: int, seen: list):
    """Work that runs out of memory above `limit` items and records every batch that was done."""

    def work(batch):
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        seen.append(list(batch))
        return sum(batch)

    return work


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_every_item_is_in_one_batch_and_in_order(size):
    seen = []
    assert sum(BatchSize(size).run(list(range(7)), fits(100, seen))) == 21
    assert [item for batch in seen for item in batch] == list(range(7))
    assert all(len(batch) == size for batch in seen[:-1])


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_no_item_is_lost():
    seen, batches = [], BatchSize(8)
    assert sum(batches.run(list(range(19)), fits(3, seen))) == sum(range(19))
    assert [item for batch in seen for item in batch] == list(range(19))
    assert batches.sequences == 2
    assert max(map(len, seen)) == 2


def test_a_size_is_lowered_to_what_there_is_room_for_and_a_given_one_is_not():
    batches, given = BatchSize(32), BatchSize(32, True)
    for each in (batches, given):
        each.fit_(1000.5, 100)
    assert (batches.sequences, given.sequences) == (10, 32)
    batches.fit_(10**9, 100)
    assert batches.sequences == 10
    batches.fit_(0, 100)
    assert batches.sequences == 1


def test_a_last_short_batch_that_fails_is_halved_from_its_own_size():
    seen, batches = [], BatchSize(16)
    list(batches.run(list(range(5)), fits(2, seen)))
    assert [len(batch) for batch in seen] == [2, 2, 1]


def test_a_given_size_is_not_changed_but_named():
    with pytest.raises(InputError, match="--eval_batch_size 8"):
        list(BatchSize(8, given=True).run(list(range(9)), fits(4, [])))


def test_one_sequence_that_does_not_fit_is_an_input_error():
    with pytest.raises(InputError, match="one sequence"):
        list(BatchSize(4).run(list(range(9)), fits(0, [])))


def test_shared_batches_give_a_result_for_every_item_and_each_batch_before_the_next_is_begun():
    seen = []

    def work(batch):
        seen.append(list(batch))
        return [-item for item in batch]

    results = share_batches(BatchSize(3), list(range(7)), work)
    for item in range(7):
        assert next(results) == -item
        assert len(seen) == item // 3 + 1
    assert list(results) == []
    assert list(share_batches(BatchSize(3), [], work)) == []


def test_what_is_shared_is_cut_to_the_size_that_fitted_and_keeps_its_order():
    seen = []
    work = fits(3, seen)

    def each(batch):
        work(batch)
        return [-item for item in batch]

    assert list(share_batches(BatchSize(8), list(range(11)), each)) == [-item for item in range(11)]
    assert [len(batch) for batch in seen] == [2, 2, 2, 2, 2, 1]


def test_other_errors_are_not_swallowed():
    def work(batch):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        list(BatchSize(4).run([1, 2], work))


def test_a_tensor_is_cut_along_its_first_dimension():
    parts = list(BatchSize(2).run(torch.arange(10).view(5, 2), lambda batch: batch.clone()))
    assert [tuple(part.shape) for part in parts] == [(2, 2), (2, 2), (1, 2)]
    assert torch.equal(torch.cat(parts), torch.arange(10).view(5, 2))


def test_auto_begins_with_a_number_of_tokens_and_a_given_number_is_taken():
    assert BatchSize.choose(None, 512, CPU) == BatchSize(AUTO_TOKENS_CPU // 512)
    assert BatchSize.choose(None, 10**6, CPU) == BatchSize(1)
    assert BatchSize.choose(3, 512, CPU) == BatchSize(3, given=True)


def test_out_of_memory_on_the_host_is_recognised():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(1 << 50)
    assert is_out_of_memory(failure.value)
    assert not is_out_of_memory(ValueError("out of memory"))
