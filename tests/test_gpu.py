"""On a real accelerator: half precision quantizes there as float32 does on the CPU."""

import copy

import pytest
import torch
from conftest import random_tokens, tiny_model
from torch import nn

from evaluation.perplexity import perplexity
from models import decoder_spec
from quantize.config import BitConfig, QuantConfig, RotationConfig, RotationOrder, SearchRule, SmoothConfig
from quantize.greedy import greedy_rotation
from quantize.rotation import random_orthogonal, step_rotation
from quantize.statistics import channel_statistics
from quantize.walk import quantize_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CALIBRATION, TEST = random_tokens(8, 32, seed=1), random_tokens(6, 32, seed=2)


def quantized(model: nn.Module, bits: int, device: torch.device) -> nn.Module:
    model = copy.deepcopy(model)
    spec = decoder_spec(model.config)
    config = QuantConfig(
        bits=BitConfig(bits, bits), smooth=SmoothConfig(0.6), rotation=RotationConfig(block_size=16, steps=24)
    )
    peaks = channel_statistics(model, spec, CALIBRATION, device).scales
    quantize_model(model, spec, CALIBRATION, peaks, config, device)
    return model


def nats(model: nn.Module, device: torch.device) -> float:
    return perplexity(model, decoder_spec(model.config), TEST, device).nats


def soft_model() -> nn.Module:
    """A model whose head is small, so that its losses are moderate."""
    model = tiny_model()
    model.lm_head.weight.mul_(0.02)
    return model


def places(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in model.state_dict().values()}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_quantized_on_the_gpu_is_as_good_as_on_the_cpu(dtype, bits):
    model = soft_model()
    expected = nats(quantized(model, bits, CPU), CPU)
    found = quantized(copy.deepcopy(model).to(dtype), bits, CUDA)
    assert places(found) == {"cpu"}
    with torch.no_grad():
        assert copy.deepcopy(found).to(CUDA)(TEST.to(CUDA), use_cache=False).logits.isfinite().all()
    # a code that falls on the other side of a rounding moves on, so no two precisions agree to the last digit
    assert nats(found, CUDA) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_full_precision_perplexity_is_the_cpu_s(implementation):
    model = soft_model()
    model.set_attn_implementation(implementation)
    assert nats(copy.deepcopy(model), CUDA) == pytest.approx(nats(model, CPU), rel=1e-3)


def test_quantizing_on_the_gpu_twice_gives_the_same_to_the_bit():
    first, second = (quantized(soft_model().half(), 4, CUDA).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rule", SearchRule)
def test_lazy_search_on_the_gpu_takes_the_cpu_s_trajectory(rule):
    x = torch.randn(200, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[3, 1], x[5, 20] = 2000, -1500
    step = step_rotation(random_orthogonal(16, torch.Generator().manual_seed(1)), RotationOrder.RQ)
    expected = greedy_rotation(x, step, 64, rule)
    found = greedy_rotation(x.to(CUDA), step, 64, rule)
    assert found.exchanges.tolist() == expected.exchanges.tolist()
    torch.testing.assert_close(found.rotation.cpu(), expected.rotation, atol=1e-6, rtol=0)
    assert found.rotation.device.type == "cuda"
