"""Large tensors in small pieces."""

import pytest
import torch

from duquant.tensors import row_parts


@pytest.mark.parametrize("shape", [(10, 6), (1, 100), (7, 2, 3), (0, 4), (3,)])
def test_row_parts_cover_every_row_once_and_are_small(shape, monkeypatch):
    monkeypatch.setattr("duquant.tensors.PART_ELEMENTS", 20)
    weight = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [weight[part] for part in row_parts(weight)]
    assert torch.equal(torch.cat([*parts, weight[:0]]), weight)
    assert all(part.numel() <= 20 or len(part) == 1 for part in parts)
