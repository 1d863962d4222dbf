"""What a run needs, against what it allocates, computes and searches."""

import gc
import weakref
from dataclasses import replace
from math import prod

import pytest
import torch
from best_settings import EXTRAS, best
from conftest import tiny_config
from medium_model import MEDIUM, medium_model
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation.perplexity import Windows, score, scores
from evaluation.sensitivity import Variants
from experiment.estimate import (
    CONTEXT_BYTES,
    PROCESS_BYTES,
    Plan,
    estimate,
    logits_bytes,
)
from models import decoder_spec
from models.load import ModelSource, load_skeleton
from models.shards import open_shards
from models.streaming import LayerReader, load_shell
from quantize import observe
from quantize.bits import BitSettings, ClipSettings
from quantize.observe import tokens_at_once
from quantize.quantization import Quantization
from quantize.refinements import Rounding, RoundingSettings, Trained, TuningSettings
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import Probe, QuantSettings, SmoothSettings, TrainingSettings
from quantize.statistics import Observation
from quantize.tuning import Teacher, tune_
from quantize.walk import layers_in_memory, walk

CPU = torch.device("cpu")
QUANT = QuantSettings(BitSettings(4, 4), smooth=SmoothSettings(0.5), rotation=RotationSettings(64, steps=2))
TRAINED = replace(QUANT, training=TrainingSettings(epochs=1))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live, beginning with those it is given, and the most there ever were."""

    def __init__(self, *tensors):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes and not tensor.is_meta:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.see_all(args)
        self.see_all(output)  # where one is given to write into, it was seen when it was made
        return output

    def see_all(self, value):
        if isinstance(value, torch.Tensor):
            self.see(value)
        elif isinstance(value, (tuple, list)):  # pytree's leaves take a third of a test
            for each in value:
                self.see_all(each)


def random_windows(shape):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(prod(shape)))


def visit_all(model, layers, settings, plan):
    """The walk of a run with `plan`, and the scores behind it."""
    spec, tokens = decoder_spec(model.config), random_windows(plan.calibration)
    before, behind = (
        [Windows(model, spec, random_windows(shape), CPU) for shape in shapes]
        for shapes in (plan.compared, plan.windows)
    )
    if plan.joining:
        behind = [Variants(model, spec, random_windows(plan.compared[0]), CPU)]
    first, peaks, tuned = [], None, random_windows((settings.tuning.samples, plan.calibration[1]))
    before += [Teacher(model, spec, tuned, CPU, None) for _ in range(settings.tunes)]
    if plan.statistics:
        first = [Observation(model, spec, tokens, CPU)]
        peaks = first[0].statistics.scales
    how = (peaks, settings, CPU, None, behind if plan.joining else ())
    middle = [] if settings.bits.untouched else [Quantization(model, spec, tokens, *how)]
    walk(layers, [*first, *before, *middle, *(() if settings.tunes else behind)], MEDIUM["num_hidden_layers"])
    if settings.tunes:
        tune_(model, spec, tuned, before[-1].hidden, settings.tuning, CPU)
        walk(layers_in_memory(model, spec, CPU), behind, MEDIUM["num_hidden_layers"])
    del first, middle
    if plan.joining:
        states = [behind[0].quantized.hidden, *behind[0].hidden.values()]
        assert len(states) * plan.compared[0][0] == sum(number for number, _ in plan.windows + plan.joining)
        scores(model, spec, random_windows(plan.compared[0]), states, CPU, before[0].hidden)
        return
    for index, shape in enumerate(plan.windows):
        teacher = before[index].hidden if plan.divergence else None
        score(model, spec, random_windows(shape), behind[index].hidden, CPU, teacher)


def peak_of(model, layers, settings, plan):
    gc.collect()
    with LiveBytes(*model.parameters(), *model.buffers()) as live:
        visit_all(model, layers, settings, plan)
    return live.peak


def needed(settings, plan):
    config = tiny_config(**MEDIUM)
    return estimate(load_skeleton(config), decoder_spec(config), settings, plan)


LEARNED = best(training=TrainingSettings(Trained.TRANSFORM, epochs=1), extras=EXTRAS["all"])
PLAN = Plan(torch.float32, False, (8, 256), ((4, 256),))
VARIANTS = replace(PLAN, windows=((160, 256),), joining=((48, 256),))
RUNS = {
    "weights show": (QUANT, replace(PLAN, calibration=(8, 32), windows=())),
    "samples show": (QUANT, PLAN),
    "windows show": (QUANT, replace(PLAN, calibration=(2, 256), windows=((8, 256), (24, 64)))),
    "both models": (QUANT, replace(PLAN, compared=((4, 256),), divergence=True)),
    "variants": (QUANT, replace(VARIANTS, compared=((16, 256),), divergence=True)),
    "no statistics": (replace(QUANT, smooth=None), replace(PLAN, statistics=False)),
    "four samples": (replace(QUANT, probe=Probe.SAMPLE), PLAN),
    "hadamard": (replace(QUANT, transform=Transform.HADAMARD), replace(PLAN, windows=())),
    "activations left alone": (replace(QUANT, bits=BitSettings(4, 16)), PLAN),
    "trained": (TRAINED, replace(PLAN, calibration=(8, 64))),
    "trained twice": (replace(TRAINED, training=TrainingSettings(epochs=1, augmented=True)), PLAN),
    "best": (best(), PLAN),
    "best, few samples": (best(), replace(PLAN, calibration=(2, 64), windows=())),
    "best without target": (best(rounding=RoundingSettings(Rounding.GPTQ)), replace(PLAN, windows=())),
    "means alone": (replace(QUANT, extras=EXTRAS["key mean"]), PLAN),
    "shift alone": (replace(QUANT, extras=EXTRAS["channel shift"]), PLAN),
    "best, trained": (best(clip=ClipSettings("search"), training=TrainingSettings(epochs=1)), PLAN),
    "transform trained, weights show": (LEARNED, replace(PLAN, calibration=(8, 32), windows=())),
    "transform trained, two Hadamards": (replace(LEARNED, transform=Transform.TWO_HADAMARD), PLAN),
    "tuned, weights show": (best(tuning=TuningSettings(8)), replace(PLAN, calibration=(8, 32), windows=())),
    "tuned, samples show": (replace(QUANT, tuning=TuningSettings(16)), PLAN),
    "16 bits": (replace(QUANT, bits=BitSettings(16, 16)), Plan(torch.float32, False, (0, 256), ((8, 256),), (), False)),
}


@pytest.mark.parametrize(("settings", "plan"), RUNS.values(), ids=RUNS)
def test_a_run_in_memory_allocates_nearly_what_was_estimated_and_no_more(settings, plan):
    model = medium_model()
    peak = peak_of(model, layers_in_memory(model, decoder_spec(model.config), CPU), settings, plan)
    assert 0.7 < peak / (needed(settings, plan).host - PROCESS_BYTES) <= 1


@pytest.mark.parametrize("name", ["weights show", "samples show", "both models", "variants"])
def test_a_streamed_run_allocates_nearly_what_was_estimated_and_no_more(name, tmp_path):
    settings, plan = RUNS[name]
    medium_model().save_pretrained(tmp_path)
    config, source = tiny_config(**MEDIUM), ModelSource(str(tmp_path))
    spec, shards = decoder_spec(config), open_shards(source, config, load_skeleton(config))
    shell = load_shell(source, config, spec, shards, torch.float32, torch.float32, "sdpa")
    with LayerReader(shell, spec, shards, torch.float32, CPU) as reader:
        peak = peak_of(shell, reader.layers(), settings, plan)
    assert 0.6 < peak / (needed(settings, plan).host_streamed - PROCESS_BYTES) <= 1


@pytest.mark.parametrize("divergence", [False, True])
def test_the_logits_of_a_large_vocabulary_are_made_in_parts_and_those_are_what_is_counted(divergence, monkeypatch):
    monkeypatch.setattr(observe, "LOGITS_AT_ONCE", 2**21)
    model, windows = medium_model(vocab_size=2**16), random_windows((1, 128))
    spec, plan = decoder_spec(model.config), replace(PLAN, windows=((1, 128),), divergence=divergence)
    hidden = torch.randn(1, 128, MEDIUM["hidden_size"])
    with LiveBytes(*model.parameters(), *model.buffers()) as live:
        held = live.now
        score(model, spec, windows, hidden, CPU, hidden.clone() if divergence else None)
    assert tokens_at_once(2**16) == 32
    assert 0.9 < (live.peak - held) / logits_bytes(model, plan) <= 1.01


def test_what_a_gpu_holds_is_not_on_the_host():
    plan = replace(PLAN, dtype=torch.float16, on_gpu=True)
    cpu, gpu = needed(QUANT, replace(plan, on_gpu=False)), needed(QUANT, plan)
    assert cpu.device == 0
    assert gpu.weights == cpu.weights == gpu.host - PROCESS_BYTES - CONTEXT_BYTES - gpu.hidden - gpu.pinned
    assert 2 * gpu.hidden == cpu.hidden  # float16, which a CPU widens
    work = gpu.device - CONTEXT_BYTES - gpu.layer_wide
    assert 0 < work < cpu.host - cpu.host_streamed + cpu.layer_wide * 9 // 2


def test_rows_of_moments_are_there_as_sums_of_two_numbers_on_a_gpu():
    plan = replace(PLAN, dtype=torch.float16, on_gpu=True, calibration=(64, 256), windows=())
    nearest = best(rounding=RoundingSettings(), clip=ClipSettings("search", 0.8))
    rows = 8192 * MEDIUM["intermediate_size"] * 4
    assert needed(best(), plan).device - needed(nearest, plan).device == 4 * rows


def test_windows_go_through_a_layer_in_batches_of_what_is_given_or_what_there_is_room_for():
    plan = replace(PLAN, dtype=torch.float16, on_gpu=True, windows=((400, 256),))
    auto, given, small = needed(QUANT, plan), needed(QUANT, replace(plan, batch=100)), needed(QUANT, PLAN)
    assert auto.window_tokens == (4096, 65536)
    assert given.window_tokens == (25600, 25600)
    assert small.window_tokens == (1024, 1024)  # on a CPU; all that there are
    assert given.device - auto.device == (25600 - 4096) * auto.window_token
    assert auto.pinned == 2 * 65536 * MEDIUM["hidden_size"] * 2


def test_statistics_are_gathered_in_batches_as_large_as_test_windows_are():
    plan = replace(PLAN, dtype=torch.float16, on_gpu=True, calibration=(300, 256), windows=())
    row = 2 * MEDIUM["hidden_size"] * 2
    assert needed(QUANT, plan).pinned == 65536 * row
    assert needed(QUANT, replace(plan, statistics=False)).pinned == 4096 * row
    assert needed(QUANT, replace(plan, calibration=(8, 256))).pinned == 8 * 256 * row


def test_an_evaluation_of_the_whole_model_needs_it_on_the_device_as_codes_or_before_as_floats():
    apart = replace(PLAN, dtype=torch.float16, on_gpu=True, calibration=(2, 8), windows=())
    config = tiny_config(num_hidden_layers=80)
    model = load_skeleton(config), decoder_spec(config), replace(QUANT, transform=Transform.NONE)
    layers, codes, floats = (
        estimate(*model, replace(apart, **{name: True} if name else {})) for name in ("", "whole", "whole_compared")
    )
    assert layers.device - CONTEXT_BYTES < codes.quantized < codes.device - CONTEXT_BYTES < codes.weights
    assert floats.device - codes.device == floats.weights - codes.quantized


def test_a_model_that_is_quantized_already_is_held_as_codes():
    plan = replace(PLAN, calibration=(0, 256), saved=True)
    saved, made = needed(QUANT, plan), needed(QUANT, PLAN)
    assert saved.quantized == made.quantized
    assert saved.host - PROCESS_BYTES < made.host - PROCESS_BYTES - (made.weights - made.quantized)
    assert needed(QUANT, replace(PLAN, calibration=(0, 256), windows=(), saved=True)).hidden == 0
