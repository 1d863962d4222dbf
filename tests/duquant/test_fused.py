"""Fake quantization in one kernel: when it is used, and that it is tried and announced once."""

import logging

import pytest
import torch
from torch import Tensor, nn

from duquant.formats import IntegerFormat
from duquant.ops import fused
from duquant.quantizer import FoundClip, NoClip, Quantizer, RatioClip, quantized
from tools.fake_device import fake_device

FORM, HALF = IntegerFormat(4), torch.float16


class OtherClip(nn.Module):
    """A clip that does more than multiply."""

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low + 1, high


@pytest.fixture
def tried_anew():
    fused.works.cache_clear()
    yield
    fused.works.cache_clear()


@pytest.mark.parametrize("clip", [NoClip(), RatioClip(0.9), FoundClip(torch.ones(2))])
def test_inputs_without_gradients_are_served(clip):
    x = torch.ones(3, 8, dtype=HALF)
    assert fused.served(x, Quantizer(FORM, clip), torch.float32)
    with torch.no_grad():
        assert fused.served(x.clone().requires_grad_(), Quantizer(FORM, clip), HALF)


@pytest.mark.parametrize(
    ("x", "clip", "dtype"),
    [
        (torch.ones(3, 8, requires_grad=True), NoClip(), HALF),
        (torch.ones(3, 8), FoundClip(torch.ones(2, requires_grad=True)), HALF),
        (torch.ones(3, 8), OtherClip(), HALF),
        (torch.ones(3, 8, dtype=torch.float64), NoClip(), HALF),
        (torch.ones(3, 8), NoClip(), torch.float64),
        (torch.ones(0, 8), NoClip(), HALF),
    ],
    ids=["gradient of x", "gradient of ratios", "another clip", "float64", "to float64", "nothing"],
)
def test_what_needs_more_than_the_kernel_does_is_left_to_torch(x, clip, dtype):
    assert not fused.served(x, Quantizer(FORM, clip), dtype)


def test_tensors_without_content_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(fused, "works", None)
    with fake_device() as gpu:
        x = torch.ones(3, 8, device=gpu.device)
        assert Quantizer(FORM)(x).device == gpu.device


def test_a_tensor_on_a_gpu_goes_through_the_kernel_where_that_works(monkeypatch):
    monkeypatch.setattr(fused, "served", lambda *_: True)
    monkeypatch.setattr(fused, "launched", lambda x, quantizer, dtype: ("launched", dtype))
    with fake_device() as gpu:
        x = torch.ones(3, 8, device=gpu.device)
        monkeypatch.setattr(fused, "works", lambda device, form: (device, form) == ("cuda", FORM))
        assert quantized(Quantizer(FORM), x, HALF) == ("launched", HALF)
        assert isinstance(Quantizer(IntegerFormat(5))(x), Tensor)


@pytest.mark.parametrize(
    ("outcome", "level", "message"),
    [
        (True, "INFO", "is one kernel"),
        (False, "WARNING", "not torch's"),
        (RuntimeError("no image"), "WARNING", "no image"),
    ],
)
def test_the_kernel_is_tried_and_announced_once(outcome, level, message, tried_anew, monkeypatch, caplog):
    def trial(device: torch.device, form: IntegerFormat) -> bool:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(fused, "available", lambda device: True)
    monkeypatch.setattr(fused, "trial", trial)
    with caplog.at_level(logging.INFO):
        assert [fused.works("cuda", FORM) for _ in range(2)] == [outcome is True] * 2
    assert [(each.levelname, message in each.message) for each in caplog.records] == [(level, True)]


def test_without_triton_or_a_gpu_for_it_nothing_is_tried(tried_anew, monkeypatch, caplog):
    monkeypatch.setattr(fused, "available", lambda device: False)
    monkeypatch.setattr(fused, "trial", None)
    assert not fused.works("cuda", FORM)
    assert not caplog.records


@pytest.mark.parametrize("quantizer", [Quantizer(FORM), nn.Identity()])
def test_the_dtype_asked_for_is_what_a_cast_afterwards_gives(quantizer):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantized(quantizer, x, HALF), quantizer(x).to(HALF))
