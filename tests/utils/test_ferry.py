"""Host tensors that visit a device part by part."""

import pytest
import torch

from tools.fake_device import fake_device
from utils.ferry import Ferry

CPU = torch.device("cpu")
PARTS = [range(2), range(2, 4), range(4, 5)]


def test_a_part_of_what_is_there_already_is_a_view_and_a_result_is_written_at_once():
    tensor = torch.arange(15.0).view(5, 3)
    expected = tensor * 2
    with Ferry(CPU) as ferry:
        for part in PARTS:
            brought = ferry.bring(tensor, part)
            assert brought.data_ptr() == tensor[part.start].data_ptr()
            ferry.give_back(tensor, part, brought * 2)
            assert torch.equal(tensor[: part.stop], expected[: part.stop])


def test_every_part_travels_once_each_way_and_nobody_waits_but_for_what_is_behind():
    with fake_device() as gpu:
        tensor = torch.empty(5, 3)
        with Ferry(gpu.device) as ferry:
            for part in PARTS:
                brought = ferry.bring(tensor, part)
                assert (brought.device, brought.shape) == (gpu.device, (len(part), 3))
                ferry.give_back(tensor, part, brought * 2)
        counted = gpu.traffic
    assert (counted.bytes_to_device, counted.copies_to_device) == (tensor.nbytes, len(PARTS))
    assert (counted.bytes_to_host, counted.copies_to_host) == (tensor.nbytes, len(PARTS))
    assert (counted.launches, counted.waits, counted.bytes_held) == (len(PARTS), 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_result_may_have_another_width_and_dtype_than_what_was_brought(dtype):
    with fake_device() as gpu:
        tensor, results = torch.empty(5, 3), torch.empty(5, 7, dtype=dtype)
        with Ferry(gpu.device) as ferry:
            for part in PARTS:
                ferry.bring(tensor, part)
                ferry.give_back(results, part, torch.empty(len(part), 7, dtype=dtype, device=gpu.device))
        assert gpu.traffic.bytes_to_host == results.nbytes
