"""On a real accelerator: half precision quantizes there as float32 does on the CPU."""

import copy

import pytest
import torch
from conftest import random_tokens, tiny_model
from torch import nn

from duquant.formats import IntegerFormat, MxFp4, NvFp4, Parameters
from duquant.linear import GroupInput
from duquant.quantizer import Quantizer, RatioClip
from duquant.transform import DualTransform
from evaluation.perplexity import perplexity
from models import decoder_spec
from quantize.bits import BitSettings
from quantize.gptq import gptq_codes
from quantize.greedy import greedy_rotation
from quantize.quantization import quantize_model
from quantize.rotation import random_orthogonal, step_rotation
from quantize.rotation_settings import RotationOrder, RotationSettings, SearchRule
from quantize.samples import product
from quantize.settings import QuantSettings, SmoothSettings, TrainingSettings
from quantize.statistics import channel_statistics
from utils.ferry import Ferry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CALIBRATION, TEST = random_tokens(8, 32, seed=1), random_tokens(6, 32, seed=2)


def quantized(model: nn.Module, bits: int, device: torch.device) -> nn.Module:
    model = copy.deepcopy(model)
    spec = decoder_spec(model.config)
    config = QuantSettings(
        bits=BitSettings(bits, bits), smooth=SmoothSettings(0.6), rotation=RotationSettings(block_size=16, steps=24)
    )
    peaks = channel_statistics(model, spec, CALIBRATION, device).scales
    quantize_model(model, spec, CALIBRATION, peaks, config, device)
    return model


def nats(model: nn.Module, device: torch.device) -> float:
    return perplexity(model, decoder_spec(model.config), TEST, device).nats


def places(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in model.state_dict().values()}


def logits(model: nn.Module, device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).to(device)(TEST.to(device), use_cache=False).logits.cpu().float()


@pytest.mark.parametrize(("bits", "nats_apart"), [(8, 0.01), (4, 0.08)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_quantized_on_the_gpu_is_as_good_as_on_the_cpu(dtype, bits, nats_apart):
    # a code that falls on the other side of a rounding moves on, so no two precisions agree to the last digit
    model = tiny_model()
    full, on_cpu, on_gpu = model, quantized(model, bits, CPU), quantized(copy.deepcopy(model).to(dtype), bits, CUDA)
    assert places(on_gpu) == {"cpu"}
    assert {parameter.dtype for parameter in on_gpu.parameters()} == {dtype}
    expected, found = ((logits(m, d) - logits(full, CPU)).norm() for m, d in ((on_cpu, CPU), (on_gpu, CUDA)))
    assert found < 1.5 * expected
    assert nats(on_gpu, CUDA) == pytest.approx(nats(on_cpu, CPU), rel=nats_apart)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_full_precision_perplexity_is_the_cpu_s(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    assert nats(copy.deepcopy(model), CUDA) == pytest.approx(nats(model, CPU), rel=1e-3)


def test_quantizing_on_the_gpu_twice_gives_the_same_to_the_bit():
    first, second = (quantized(tiny_model().half(), 4, CUDA).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_that_stays_on_the_gpu_gets_the_bits_of_one_that_visits_it():
    visiting, staying = quantized(tiny_model().half(), 4, CUDA), quantized(tiny_model().half().to(CUDA), 4, CUDA)
    assert (places(visiting), places(staying)) == ({"cpu"}, {"cuda"})
    found = staying.state_dict()
    assert all(torch.equal(tensor, found[name].cpu()) for name, tensor in visiting.state_dict().items())


def test_hidden_states_that_travel_beside_the_work_are_those_that_are_copied_before_it():
    states = torch.randn(24, 512, 256)
    expected = (states.to(CUDA).cumsum(dim=1) @ torch.eye(256, device=CUDA)).cpu()
    with Ferry(CUDA) as ferry:
        for part in (range(start, start + 2) for start in range(0, 24, 2)):
            ferry.give_back(states, part, ferry.bring(states, part).cumsum(dim=1) @ torch.eye(256, device=CUDA))
    torch.testing.assert_close(states, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_half_precision_lowers_the_loss_and_leaves_codes_on_the_host(dtype):
    model = tiny_model(dtype)
    spec, training = decoder_spec(model.config), TrainingSettings(epochs=8, batch_size=2)
    settings = QuantSettings(BitSettings(3, 8), rotation=RotationSettings(16, 4), training=training)
    layers = quantize_model(model, spec, CALIBRATION, None, settings, CUDA)
    before, after = (sum(layer["training"][f"loss_{when}"] for layer in layers) for when in ("before", "after"))
    assert after < before
    assert places(model) == {"cpu"}
    assert model.model.layers[0].mlp.down_proj.codes.dtype is torch.uint8


def test_a_recorded_training_step_does_what_its_operations_do(monkeypatch):
    spec, training = decoder_spec(tiny_model().config), TrainingSettings(epochs=4, batch_size=3)  # a last batch of two
    settings = QuantSettings(BitSettings(3, 8), rotation=RotationSettings(16, 4), training=training)
    found = []
    for most in (2**26, 0):
        monkeypatch.setattr("quantize.training.MOST_RECORDED", most)
        layers = quantize_model(tiny_model(torch.float16), spec, CALIBRATION, None, settings, CUDA)
        found.append([loss for layer in layers for loss in layer["training"]["losses"]])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rule", SearchRule)
def test_lazy_search_on_the_gpu_takes_the_cpu_s_trajectory(rule, exact):
    x = torch.randn(200, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[3, 1], x[5, 20] = 2000, -1500
    step = step_rotation(random_orthogonal(16, torch.Generator().manual_seed(1)), RotationOrder.RQ)
    most = None if exact else 64
    expected = greedy_rotation(x, step, 70, rule, most)
    found = greedy_rotation(x.to(CUDA), step, 70, rule, most)
    assert found.exchanges.tolist() == expected.exchanges.tolist()
    torch.testing.assert_close(found.rotation.cpu(), expected.rotation, atol=1e-6, rtol=0)
    assert found.rotation.device.type == "cuda"


@pytest.mark.parametrize("most", [None, 700])
def test_a_search_by_the_kernel_takes_the_cpu_s_trajectory(most):
    x = torch.randn(3000, 128, generator=torch.Generator().manual_seed(2))
    x[:, 7] *= 40
    x[3, 1], x[5, 20] = 900, -700
    step = step_rotation(random_orthogonal(128, torch.Generator().manual_seed(3)), RotationOrder.RQ)
    expected = greedy_rotation(x.double(), step, 300, SearchRule.CHANNEL, most)
    found = greedy_rotation(x.to(CUDA), step, 300, SearchRule.CHANNEL, most)
    assert found.exchanges.tolist() == expected.exchanges.tolist()
    torch.testing.assert_close(found.peaks.double(), expected.peaks, atol=0, rtol=300 * 2**-22)
    torch.testing.assert_close(found.rotation.cpu(), expected.rotation, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inputs_rounded_by_kernels_are_the_cpu_s_but_where_a_code_lies_on_a_tie(dtype):
    generator = torch.Generator().manual_seed(4)
    rotations = torch.linalg.qr(torch.randn(2, 64, 64, generator=generator)).Q
    transform = DualTransform(rotations, torch.randperm(192, generator=generator)[None], torch.rand(192) + 0.5)
    group = GroupInput(transform, Quantizer(IntegerFormat(4), RatioClip(0.9)), shift=torch.randn(192) / 4)
    x = torch.randn(3, 50, 192, generator=generator).to(dtype)
    expected, found = group(x).float(), copy.deepcopy(group).to(CUDA)(x.to(CUDA)).cpu().float()
    step = (transform(x) - group.shift).abs().amax(dim=-1, keepdim=True) / 15
    assert ((found - expected).abs() > 0.1 * step).float().mean() < 1e-3


def test_a_product_of_three_of_tf32_is_nearly_that_of_float32():
    a, b = (torch.randn(16, 96, generator=torch.Generator().manual_seed(seed)).exp() for seed in (1, 2))
    exact = a.double().T @ b.double()  # of few rows: tensor cores cut off the sums of many
    assert ((product(a.to(CUDA), b.to(CUDA)).cpu() - exact).abs() < 2**-19 * exact).all()


@pytest.mark.parametrize("form", [IntegerFormat(4), IntegerFormat(4, symmetric=True), MxFp4(), NvFp4()], ids=str)
def test_gptq_finds_there_the_codes_that_it_finds_on_the_cpu(form):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 40, generator=generator) @ torch.randn(40, 160, generator=generator)
    x, weight = x + torch.randn(1000, 160, generator=generator), torch.randn(90, 160, generator=generator)
    vectors = weight if form.block is None else weight.unflatten(1, (-1, form.block))
    base = form.base_of(weight.abs().max()[None]) if form.has_base else None
    own = form.parameters(*torch.aminmax(vectors, dim=-1, keepdim=True), base)
    hessian = (x.T @ x / len(x)).double()
    there = Parameters(*(each.to(CUDA) for each in own))
    for _ in range(2):  # what is recorded, and what is launched again
        found = gptq_codes(weight.to(CUDA), hessian.to(CUDA), there, form, 0.01, "").values.cpu()
        same = (found == gptq_codes(weight, hessian, own, form, 0.01, "").values).flatten(1).all(dim=1)
        assert same.double().mean() > 0.9  # behind a weight on a tie a row is another
