"""Learned weight clipping: what training a layer does, and what it never does."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_tokens, tiny_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from duquant.attention import install
from duquant.linear import QuantLinear
from duquant.transform import DualTransform
from models import decoder_spec
from quantize.bits import BitSettings, ClipSettings
from quantize.descent import Descent
from quantize.layer import decide
from quantize.observe import layer_output
from quantize.quantization import Flow, quantize_model
from quantize.rotation_settings import RotationSettings
from quantize.settings import QuantSettings, SmoothSettings, TrainingSettings
from quantize.statistics import channel_statistics
from quantize.training import (
    INITIAL_LOGIT,
    Batch,
    Gradients,
    LearnedClip,
    Samples,
    TrainingReport,
    clips,
    placed,
    train_clipping_,
    train_step,
)

CPU = torch.device("cpu")
SAMPLES, EPOCHS = 4, 3
LINEARS = 7  # of a Llama layer


def settings(bits: BitSettings | None = None, learned: bool = True, **training) -> QuantSettings:
    return QuantSettings(
        bits or BitSettings(4, 4),
        ClipSettings(0.95),
        SmoothSettings(),
        rotation=RotationSettings(16, 8),
        training=TrainingSettings(**{"epochs": EPOCHS, **training}) if learned else None,
    )


@dataclass
class Case:
    """A layer as it is handed to training: transforms attached, clips at their initial logits."""

    layer: nn.Module
    samples: Samples
    kwargs: dict
    config: TrainingSettings

    def train(self, **changes) -> TrainingReport:
        """Train the layer as it is now, with some settings changed."""
        with torch.no_grad():
            return train_clipping_(self.layer, self.samples, self.kwargs, replace(self.config, **changes))

    @property
    def logits(self) -> list[Tensor]:
        clips = [module for module in self.layer.modules() if isinstance(module, LearnedClip)]
        return [logit.clone() for clip in clips for logit in clip.logits()]

    @torch.no_grad()
    def loss(self) -> float:
        """The mean squared error over all samples, computed here."""
        output = layer_output(self.layer, self.samples.inputs, self.kwargs)
        return sum(F.mse_loss(output, target).item() for target in self.samples.targets)


class Reached(Exception):
    """Carries the arguments of the training that was about to begin."""


@torch.no_grad()
def make_case(
    patch: pytest.MonkeyPatch,
    config: QuantSettings,
    layer_index: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Quantize a tiny model up to the training of the layer `layer_index`."""
    model = tiny_model(dtype, seed)
    spec, tokens = decoder_spec(model.config), random_tokens(SAMPLES, 16)
    peaks = channel_statistics(model, spec, tokens, CPU).scales
    install(model)
    flow = Flow(model, spec, tokens, config, CPU)
    layers = spec.decoder_layers(model)
    for index in range(layer_index):
        decide(layers[index], index, spec, flow.inputs(index), peaks, config)

    def stop(*arguments):
        raise Reached(*arguments)

    with patch.context() as inner:
        inner.setattr("quantize.layer.train_clipping_", stop)
        with pytest.raises(Reached) as reached:
            decide(layers[layer_index], layer_index, spec, flow.inputs(layer_index), peaks, config)
    return Case(*reached.value.args)


@pytest.mark.parametrize(
    "bits",
    [
        BitSettings(4, 4),
        BitSettings(4, 4, group_size=16),
        BitSettings(3, 4, symmetric=True),
        BitSettings(3, 4, group_size=8, symmetric=True),
        BitSettings(2, 4),
        BitSettings(3, 16),
    ],
    ids=str,
)
def test_training_lowers_the_loss_over_all_samples(bits, monkeypatch):
    case = make_case(monkeypatch, settings(bits, epochs=10))
    before = case.loss()
    report = case.train()
    assert report.loss_before == pytest.approx(before, rel=1e-4)
    assert report.loss_after == pytest.approx(case.loss(), rel=1e-4)
    assert report.loss_after < report.loss_before
    assert len(report.losses) == len(report.gradient_norms) == 10
    assert all(norm > 0 for norm in report.gradient_norms)
    assert report.restored == 0


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_never_ends_above_where_it_began(seed, monkeypatch):
    case = make_case(monkeypatch, settings(BitSettings(4, 4, symmetric=True), epochs=2, learning_rate=0.1), seed=seed)
    before = case.loss()
    report = case.train()
    assert report.loss_after <= report.loss_before
    assert case.loss() <= before


def test_every_range_has_a_pair_of_logits_and_starts_at_the_initial_value(monkeypatch):
    case = make_case(monkeypatch, settings(BitSettings(4, 4, group_size=16)))
    assert len(case.logits) == 2 * LINEARS
    linear = case.layer.get_submodule("mlp.down_proj")
    assert linear.clip.low_logit.shape == (48, 5, 1)
    assert all((logit == INITIAL_LOGIT).all() for logit in case.logits)


@pytest.mark.parametrize("batch_size", [3, 4])
def test_samples_are_weighted_alike_whatever_the_batch_size(batch_size, monkeypatch):
    case = make_case(monkeypatch, settings())
    before = case.loss()
    report = case.train(batch_size=batch_size)
    assert report.loss_before == pytest.approx(before, rel=1e-4)
    assert report.loss_after == pytest.approx(case.loss(), rel=1e-4)


def test_a_final_loss_above_the_initial_one_brings_the_initial_logits_back(monkeypatch):
    case = make_case(monkeypatch, settings())
    report = case.train(learning_rate=1e3, epochs=1)
    assert report.losses[-1] > 2 * report.loss_before, "the case must really diverge"
    assert report.loss_after == report.loss_before
    assert all((logit == INITIAL_LOGIT).all() for logit in case.logits)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_is_counted_and_the_others_are_trained_on(value, monkeypatch):
    case = make_case(monkeypatch, settings())
    case.samples.targets[0][2, 5, 7] = value
    report = case.train()
    assert report.restored == EPOCHS
    assert all(math.isfinite(loss) for loss in report.losses)
    assert all(logit.isfinite().all() for logit in case.logits)
    assert any((logit != INITIAL_LOGIT).any() for logit in case.logits)
    kept = [0, 1, 3]
    case.samples = Samples(case.samples.inputs[kept], (case.samples.targets[0][kept],), len(kept))
    assert report.loss_after == pytest.approx(case.loss(), rel=1e-4)
    assert report.loss_after < report.loss_before


def test_an_input_that_is_not_finite_leaves_finite_logits(monkeypatch):
    case = make_case(monkeypatch, settings())
    case.samples.inputs[1, 3] = math.nan
    report = case.train()
    assert report.restored == EPOCHS
    assert all(logit.isfinite().all() for logit in case.logits)


def test_with_no_finite_sample_at_all_the_initial_logits_stay(monkeypatch):
    case = make_case(monkeypatch, settings())
    case.samples.targets[0].fill_(math.nan)
    report = case.train()
    assert report.restored == EPOCHS * SAMPLES
    assert report.losses == report.gradient_norms == (None,) * EPOCHS
    assert all((logit == INITIAL_LOGIT).all() for logit in case.logits)


def change_gradients(case: Case, change: Callable[[int, Tensor], Tensor]) -> list[list[Tensor]]:
    """Every logit's gradient becomes `change(step, gradient)`; by logit, the list is its value at every step."""
    values = []
    for clip in (module for module in case.layer.modules() if isinstance(module, LearnedClip)):
        for logit in clip.parameters():
            values.append(seen := [])

            def hook(gradient: Tensor, logit: Tensor = logit, seen: list = seen) -> Tensor:
                seen.append(logit.detach().clone())
                return change(len(seen) - 1, gradient)

            logit.requires_grad_(True).register_hook(hook)
    return values


def test_a_gradient_that_overflows_leaves_its_step_out_and_undoes_none(monkeypatch):
    case = make_case(monkeypatch, settings())
    values = change_gradients(case, lambda step, gradient: gradient * math.inf if step == 2 else gradient)
    report = case.train(epochs=1)
    assert any(not torch.equal(seen[2], seen[1]) for seen in values)
    assert all(torch.equal(seen[3], seen[2]) for seen in values)
    assert report.restored == 1
    assert report.losses[0] == pytest.approx(report.loss_before, rel=0.2)


def test_a_layer_that_ends_above_its_start_keeps_its_best_epoch(monkeypatch):
    case = make_case(monkeypatch, settings(BitSettings(3, 4)), seed=2)
    change_gradients(case, lambda step, gradient: gradient if step < 6 * SAMPLES else -gradient)
    report = case.train(epochs=20, learning_rate=0.1)
    gain = report.loss_before - min(report.losses)
    assert report.losses[-1] > report.loss_before, "the case must really diverge"
    assert report.loss_before - report.loss_after > 0.8 * gain > 0
    assert report.loss_after == pytest.approx(case.loss(), rel=1e-4)


def test_a_last_epoch_that_ends_best_is_kept_although_its_mean_is_not_the_least(monkeypatch):
    case = make_case(monkeypatch, settings(BitSettings(4, 4)), seed=0)
    ends = []

    def at_the_end_of_an_epoch(values: list[float]) -> float:
        ends.append(case.logits)
        return sum(values) / len(values)

    monkeypatch.setattr("quantize.training.mean_or_none", at_the_end_of_an_epoch)
    report = case.train(epochs=10)
    assert report.losses[-1] > min(report.losses), "the case must really have a better mean before"
    assert all(torch.equal(*pair) for pair in zip(case.logits, ends[-1], strict=True))


def test_a_process_without_a_share_takes_part_in_a_scaled_step(monkeypatch):
    case = make_case(monkeypatch, settings())
    monkeypatch.setattr("quantize.descent.world_size", lambda: 2)
    logits = [logit.requires_grad_(True) for clip in clips(case.layer) for logit in clip.parameters()]
    descent = Descent(torch.optim.AdamW(logits, lr=0.01), CPU, scaled=True)
    none = Batch(case.samples.inputs[:0], [target[:0] for target in case.samples.targets], 0.0)
    gradients = Gradients(case.layer, case.kwargs, logits, CPU)
    assert train_step(gradients, none, descent) == (0.0, 0.0)


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_gradients_are_those_of_the_scaled_loss_to_the_bit(monkeypatch, scale):
    case = make_case(monkeypatch, settings())
    logits = [logit.requires_grad_(True) for clip in clips(case.layer) for logit in clip.parameters()]
    batch = Batch(case.samples.inputs[:2], [target[:2] for target in case.samples.targets], 0.5)
    loss = 0.5 * F.mse_loss(layer_output(case.layer, batch.inputs, case.kwargs).float(), batch.targets[0].float())
    (loss * scale).backward()
    found, gradients = Gradients(case.layer, case.kwargs, logits, CPU)(batch, torch.tensor(scale))
    assert torch.equal(found, loss)
    assert len(gradients) == 2 * LINEARS
    assert all(torch.equal(gradient, logit.grad) for gradient, logit in zip(gradients, logits, strict=True))


def test_half_precision_trains_on_when_its_first_scales_overflow(monkeypatch):
    make = torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler", lambda device, enabled: make(device, 2.0**30, enabled=enabled))
    case = make_case(monkeypatch, settings(BitSettings(3, 4)), seed=2, dtype=torch.float16)
    assert case.samples.inputs.dtype is torch.float16
    report = case.train(epochs=10)
    assert 0 < report.restored < 20
    assert None not in report.losses
    assert report.loss_after < report.loss_before


def test_no_epochs_train_nothing(monkeypatch):
    case = make_case(monkeypatch, settings())
    report = case.train(epochs=0)
    assert report.losses == report.gradient_norms == ()
    assert report.loss_before == report.loss_after == pytest.approx(case.loss(), rel=1e-4)
    assert all((logit == INITIAL_LOGIT).all() for logit in case.logits)


def test_augmented_loss_adds_the_full_precision_layer_on_the_students_input(monkeypatch):
    config = settings(BitSettings(2, 4), epochs=0)  # of the layer before: the streams are the same
    usual = make_case(monkeypatch, config, layer_index=1)
    augmented = make_case(monkeypatch, replace(config, training=replace(config.training, augmented=True)), 1)
    assert torch.equal(augmented.samples.targets[0], usual.samples.targets[0])
    assert torch.equal(augmented.samples.inputs, usual.samples.inputs)
    model = tiny_model()
    own = layer_output(model.model.layers[1], augmented.samples.inputs, augmented.kwargs)
    torch.testing.assert_close(augmented.samples.targets[1], own)
    assert not torch.allclose(augmented.samples.targets[1], augmented.samples.targets[0])
    reports = [case.train(epochs=1) for case in (augmented, usual)]
    assert reports[0].loss_before > reports[1].loss_before
    assert reports[0].gradient_norms != reports[1].gradient_norms


def test_training_changes_clip_logits_and_nothing_else(monkeypatch):
    case = make_case(monkeypatch, settings())
    before = copy.deepcopy(case.layer.state_dict())
    inputs, target = case.samples.inputs.clone(), case.samples.targets[0].clone()
    case.train()
    after = case.layer.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("low_logit", "high_logit"))}
    for name, parameter in case.layer.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.grad is None or name.endswith("_logit"), name
    assert torch.equal(case.samples.inputs, inputs)
    assert torch.equal(case.samples.targets[0], target)


def test_a_second_run_gives_bitwise_the_same_logits_and_figures(monkeypatch):
    first, second = (make_case(monkeypatch, settings()) for _ in range(2))
    reports = [case.train() for case in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))
    assert replace(reports[0], seconds=0) == replace(reports[1], seconds=0)


@pytest.mark.parametrize(
    ("spare", "offload", "places"),
    [(0, False, ["cuda:0"] * 3), (-1, False, ["pinned"] * 3), (10**6, True, ["pinned"] * 3)],
    ids=["fits", "does not fit", "offloaded"],
)
def test_samples_go_to_the_gpu_where_half_of_its_free_memory_holds_them(spare, offload, places, monkeypatch):
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    with FakeTensorMode():  # of fake tensors the device is known, and no GPU is needed
        tensors = [torch.empty(2, 3, 4, dtype=torch.float16) for _ in range(3)]
        free = 2 * sum(tensor.nbytes for tensor in tensors) + spare
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
        found = placed(Samples(tensors[0], tuple(tensors[1:]), 2), torch.device("cuda:0"), offload)
    held = [found.inputs, *found.targets]
    is_pinned = [any(tensor is each for each in pinned) for tensor in held]
    assert ["pinned" if kept else str(each.device) for kept, each in zip(is_pinned, held, strict=True)] == places


def quantized(config: QuantSettings, seed: int = 0) -> tuple[nn.Module, list[dict]]:
    model = tiny_model(seed=seed)
    spec, tokens = decoder_spec(model.config), random_tokens(8, 16)
    peaks = channel_statistics(model, spec, tokens, CPU).scales
    return model, quantize_model(model, spec, tokens, peaks, config, CPU)


def test_each_weight_is_transformed_once_however_many_steps_are_trained(monkeypatch):
    calls = []
    transform_weight = DualTransform.transform_weight

    def counted(self, weight):
        calls.append(weight.shape)
        return transform_weight(self, weight)

    monkeypatch.setattr(DualTransform, "transform_weight", counted)
    model, _ = quantized(settings(epochs=2))
    assert len(calls) == LINEARS * len(model.model.layers)


def test_a_model_with_learned_clipping_is_rounded_for_good_and_closer_to_full_precision_than_without():
    errors = {True: [], False: []}
    for seed in range(3):
        for learned in errors:
            model, figures = quantized(settings(BitSettings(3, 8), learned), seed)
            errors[learned] += [layer["output_error"] for layer in figures]
            linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
            assert len(linears) == LINEARS * 2
            assert all(linear.packed_codes is not None for linear in linears)
            assert not any(isinstance(module, LearnedClip) for module in model.modules())
            assert all((layer["training"] is not None) == learned for layer in figures)
    assert sum(errors[True]) < 0.98 * sum(errors[False])


def test_unquantized_weights_have_nothing_to_train():
    model, figures = quantized(settings(BitSettings(16, 4), epochs=1))
    assert model(random_tokens(1, 8)).logits.isfinite().all()
    assert all(layer["training"]["losses"] == () for layer in figures)
