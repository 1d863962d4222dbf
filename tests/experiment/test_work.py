"""How long a run takes, against the operations it computes and the steps it searches."""

from dataclasses import replace

import pytest
import torch
from best_settings import EXTRAS, best
from conftest import random_tokens, tiny_config
from medium_model import MEDIUM, medium_model
from torch.utils.flop_counter import FlopCounterMode

from experiment.estimate import Plan
from experiment.work import Rates, forward_operations, measure_rates, stage_seconds, work_of
from models import decoder_spec
from models.load import load_skeleton
from quantize import transforms
from quantize.bits import BitSettings
from quantize.quantization import quantize_model
from quantize.refinements import Trained
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import QuantSettings, SmoothSettings, TrainingSettings
from quantize.statistics import channel_statistics

CPU = torch.device("cpu")
QUANT = QuantSettings(BitSettings(4, 4), smooth=SmoothSettings(0.5), rotation=RotationSettings(64, steps=2))
TRAINED = replace(QUANT, training=TrainingSettings(epochs=1))
PLAN = Plan(torch.float32, False, (8, 256), ((4, 256),))
BEST = best(transform=Transform.TWO_HADAMARD, rotation=RotationSettings(64), extras=EXTRAS["all"])


def quantized(model, settings, plan):
    spec, tokens = decoder_spec(model.config), random_tokens(*plan.calibration)
    peaks = channel_statistics(model, spec, tokens, CPU).scales
    quantize_model(model, spec, tokens, peaks, settings, CPU)


@pytest.mark.parametrize("training", [None, TrainingSettings(Trained.TRANSFORM, epochs=2)], ids=["best", "trained"])
def test_products_of_what_samples_decide_are_about_those_that_torch_counts(training):
    config, plan = tiny_config(**MEDIUM), replace(PLAN, calibration=(4, 128), windows=(), statistics=False)
    settings = replace(BEST, training=training)
    model = medium_model(attn_implementation="eager")
    spec, tokens = decoder_spec(config), random_tokens(*plan.calibration)
    with FlopCounterMode(display=False) as counter:
        quantize_model(model, spec, tokens, None, settings, CPU)
    work = work_of(load_skeleton(config), decoder_spec(config), settings, plan)
    assert 0.7 < (work.layers + work.samples + work.training) / counter.get_total_flops() < 1.4


def test_operations_are_those_that_torch_counts():
    model, length = medium_model(attn_implementation="eager"), 64  # the counter knows no fused attention
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    config = tiny_config(**MEDIUM)
    found = forward_operations(load_skeleton(config), decoder_spec(config), length, head=True)
    assert found * length == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("transform", Transform)
def test_greedy_steps_are_those_that_are_searched(transform, times, monkeypatch):
    settings = replace(QUANT, transform=transform, rotation=RotationSettings(16, 2, times))
    searched, search = {}, transforms.greedy_rotation

    def counting(x, step, steps, rule, most):
        searched[x.shape[-1]] = searched.get(x.shape[-1], 0) + steps
        return search(x, step, steps, rule)

    monkeypatch.setattr(transforms, "greedy_rotation", counting)
    config, plan = tiny_config(**MEDIUM), replace(PLAN, calibration=(2, 8), windows=())
    model = medium_model()
    quantized(model, settings, plan)
    assert work_of(load_skeleton(config), decoder_spec(config), settings, plan).steps == searched


def test_what_is_not_done_takes_no_time():
    config = tiny_config()
    shapes = load_skeleton(config), decoder_spec(config)
    untouched = work_of(*shapes, replace(QUANT, bits=BitSettings(16, 16)), PLAN)
    saved = work_of(*shapes, QUANT, replace(PLAN, calibration=(0, 256), saved=True))
    for work in (untouched, saved):
        parts = (work.statistics, work.layers, work.samples, work.training, work.steps, work.moved)
        assert parts == (0, 0, 0, 0, {}, 0)
    assert work_of(*shapes, QUANT, PLAN).samples == 0 < work_of(*shapes, best(), PLAN).samples
    assert untouched.evaluation == saved.evaluation > 0
    compared = replace(PLAN, compared=PLAN.windows)
    assert work_of(*shapes, QUANT, compared).evaluation == 2 * saved.evaluation
    joining = replace(PLAN, joining=PLAN.windows)
    assert 1.5 < work_of(*shapes, QUANT, joining).evaluation / saved.evaluation < 2, "half of the layers, and the head"
    assert work_of(*shapes, QUANT, replace(PLAN, statistics=False)).statistics == 0
    assert work_of(*shapes, TRAINED, PLAN).training > 7 * work_of(*shapes, QUANT, PLAN).statistics * 0.99


def test_seconds_are_work_over_rates():
    config = tiny_config()
    work = work_of(load_skeleton(config), decoder_spec(config), QUANT, replace(PLAN, on_gpu=True))
    steps = dict.fromkeys(work.steps, 0.5)
    slow, fast = (stage_seconds(work, Rates(rate, steps, 1e6)) for rate in (1e9, 2e9))
    assert slow["activation statistics"] == 2 * fast["activation statistics"] > 0
    assert slow["search, at most"] == fast["search, at most"] == sum(work.steps.values()) / 2
    assert slow["copying to the GPU and back"] == work.moved / 1e6 > 0


def test_rates_are_measured_on_this_machine():
    rates = measure_rates(CPU, torch.float32, [128, 192], 32, QUANT.rotation)
    assert rates.operations > 1e6
    assert set(rates.step) == {128, 192}
    assert rates.copied == float("inf")


def test_a_step_on_very_large_blocks_is_not_tried_out():
    rates = measure_rates(CPU, torch.float32, [30000], 32, RotationSettings(block_size=-1))
    assert rates.step[30000] == pytest.approx((2 * 32 * 30000**2 + 4 * 30000**3) / rates.operations)


def test_what_stays_on_a_gpu_does_not_travel():
    config, plan = tiny_config(), replace(PLAN, on_gpu=True)
    shapes = load_skeleton(config), decoder_spec(config), QUANT, plan
    nothing, states, everything = (work_of(*shapes, *kept).moved for kept in ((), (True,), (True, True)))
    assert nothing > states == 2 * everything > 0
