"""How long a run will take, from the model's shapes and the rates that this machine has now."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from experiment.estimate import Plan, probe_tokens, travelling_bytes
from quantize.greedy import greedy_rotation
from quantize.refinements import Rounding
from quantize.rotation import random_orthogonal, step_rotation
from quantize.rotation_settings import RotationSettings
from quantize.settings import QuantSettings
from quantize.sizes import count, groups_of, model_bytes
from quantize.spec import DecoderSpec
from utils.capacity import best_seconds, copy_rate, product_rate

MEASURED_STEPS = 8
MEASURED_BLOCK = 512  # above it a step is nothing but matrix products, and takes too long to try
OVERHEAD = 1.5  # what is no matrix product (norms, attention's softmax, rounding), seen on a CPU
FACTORING = 3  # cubes of a group's width: two Cholesky factors and an inverse


@dataclass(frozen=True)
class Work:
    """What a run computes: multiplications and additions by stage, `layers` being the probe's passes and the weights.

    `samples`: looking at calibration samples, and rounding by what they show. `steps`: width of the probe → greedy
    steps over the whole run. `moved`: bytes between host and GPU.
    """

    statistics: float
    layers: float
    samples: float
    training: float
    evaluation: float
    steps: dict[int, int]
    moved: float


def work_of(
    skeleton: nn.Module,
    spec: DecoderSpec,
    settings: QuantSettings,
    plan: Plan,
    kept_states: bool = False,
    kept_weights: bool = False,
) -> Work:
    """What a run has to compute; hidden states and weights may be kept on the GPU, where weights go once."""
    samples, length = plan.calibration
    quantizes, learned = plan.quantizes(settings), settings.training
    once = samples * length * forward_operations(skeleton, spec, length)
    tests = plan.windows + plan.compared
    probe, times = probe_tokens(settings, plan), settings.rotation.permutation_times
    operations, steps = 0.0, {}
    for index, layer in enumerate(spec.decoder_layers(skeleton)):
        before = 0
        for group in spec.at(index).groups:
            members = [layer.get_submodule(path) for path in group.linears]
            width, size = members[0].in_features, count(linear.weight for linear in members)
            # the probe runs twice through the layer, and while it is trained up to every group; every weight is rotated
            rotated = settings.transform.rotations(times) * settings.rotation.block_size_for(width)
            operations += 2 * probe * (before * (learned is not None) + 2 * size) + 2 * rotated * size
            steps[width] = steps.get(width, 0) + settings.transform.searches(times) * settings.rotation.steps
            before += size
    layers = len(spec.decoder_layers(skeleton))
    floats = sum(model_bytes(layer, plan.held) for layer in spec.decoder_layers(skeleton))
    _, walking = travelling_bytes(skeleton, settings, plan)
    return Work(
        statistics=once if quantizes and plan.statistics else 0.0,
        layers=operations if quantizes else 0.0,
        samples=sample_operations(skeleton, spec, settings, plan.calibration) if quantizes else 0.0,
        training=training_operations(skeleton, spec, settings, plan.calibration) if quantizes else 0.0,
        evaluation=sum(n * t * forward_operations(skeleton, spec, t, head=True) for n, t in tests)
        + sum(n * t * joining_operations(skeleton, spec, t) for n, t in plan.joining),
        steps={width: number for width, number in steps.items() if number} if quantizes else {},
        moved=floats * (1.0 if kept_weights else 2.0) + 2.0 * layers * walking * (not kept_states)
        if plan.on_gpu
        else 0.0,
    )


def sample_operations(
    skeleton: nn.Module, spec: DecoderSpec, settings: QuantSettings, calibration: tuple[int, int]
) -> float:
    """Of what samples decide: the view of every layer, the rows of every group, moments, GPTQ."""
    tokens, length = calibration[0] * calibration[1], calibration[1]
    once = tokens * forward_operations(skeleton, spec, length)
    # the rows of all groups take a pass, since what is closed is known, and what closes them another one
    total = once * (settings.views_layers + 2 * settings.reads_rows)
    if settings.rounds_by_data:
        for _, members in groups_of(skeleton, spec):
            width = members[0].in_features
            total += 2 * tokens * width**2 * (1 + settings.aims_at_teacher)
            if settings.rounding.rounding is Rounding.GPTQ:
                total += width * count(linear.weight for linear in members) + FACTORING * width**3
    return total


def training_operations(
    skeleton: nn.Module, spec: DecoderSpec, settings: QuantSettings, calibration: tuple[int, int]
) -> float:
    """Of training the layers one by one, and of tuning them together."""
    tokens, length, learned = calibration[0] * calibration[1], calibration[1], settings.training
    total = 0.0
    if learned is not None:
        # forward and twice that backward; teacher, student, loss before and after
        total += (3 * learned.epochs + 4) * tokens * forward_operations(skeleton, spec, length)
        total += matrix_operations(skeleton, spec, settings, calibration[0])
    if settings.tunes:
        # teacher, twice forward, and twice that backward
        tuned = settings.tuning.samples * length
        total += 5 * tuned * forward_operations(skeleton, spec, length, head=True)
    return total


def matrix_operations(skeleton: nn.Module, spec: DecoderSpec, settings: QuantSettings, samples: int) -> float:
    """Of the weights' transforms in every step of `--train transform`, forward and twice that backward."""
    if not settings.learns_transform:
        return 0.0
    steps = settings.training.epochs * -(-samples // settings.training.batch_size)
    rotations = settings.transform.rotations(settings.rotation.permutation_times)
    sizes = [
        settings.rotation.block_size_for(members[0].in_features) * count(linear.weight for linear in members)
        for _, members in groups_of(skeleton, spec)
    ]
    return 3.0 * steps * 2 * rotations * sum(sizes)


def forward_operations(skeleton: nn.Module, spec: DecoderSpec, length: int, head: bool = False) -> float:
    """Operations per token of a forward pass of sequences of `length`: the linears, attention, and the `head`."""
    linears = sum(count(linear.weight for linear in members) for _, members in groups_of(skeleton, spec))
    attention = sum(
        2 * length * layer.get_submodule(spec.at(index).groups[1].linears[0]).in_features
        for index, layer in enumerate(spec.decoder_layers(skeleton))
    )
    return 2.0 * (linears + attention + (skeleton.get_input_embeddings().weight.numel() if head else 0))


def joining_operations(skeleton: nn.Module, spec: DecoderSpec, length: int) -> float:
    """`forward_operations` with the head and half of the layers: what variants need that join at each of them."""
    return forward_operations(skeleton, spec, length, head=True) - forward_operations(skeleton, spec, length) / 2


@dataclass(frozen=True)
class Rates:
    """`operations` of a matrix product per second; seconds of a greedy `step`, all rows active, by the probe's width;
    bytes `copied` per second between host and GPU (infinite without one).
    """

    operations: float
    step: dict[int, float]
    copied: float = float("inf")


def measure_rates(
    device: torch.device, dtype: torch.dtype, widths: Iterable[int], tokens: int, rotation: RotationSettings
) -> Rates:
    """The `Rates` of `device` for weights in `dtype`, and probes [`tokens`, width] of the `widths`: a second's work."""
    operations = product_rate(device, dtype)
    steps = {}
    for width in widths:
        block = rotation.block_size_for(width)
        if block <= MEASURED_BLOCK:
            steps[width] = _step_seconds(device, tokens, width, rotation)
        else:  # the rows', and that of the rotation itself, in float64
            rows = min(tokens * width // block, rotation.rows or tokens * width)
            steps[width] = (2 * rows * block**2 + 2 * 2 * block**3) / operations
    return Rates(operations, steps, copy_rate(device))


def _step_seconds(device: torch.device, tokens: int, width: int, rotation: RotationSettings) -> float:
    """Of one greedy step: the difference of two short searches, so that what comes before the steps is left out."""
    block = rotation.block_size_for(width)
    probe = torch.randn(tokens, width, device=device)
    step = step_rotation(random_orthogonal(block, torch.Generator().manual_seed(0)), rotation.order)
    short, long = (
        best_seconds(
            lambda count=count: greedy_rotation(probe, step, count, rotation.rule, rotation.rows, lazy=False), device
        )
        for count in (1, 1 + MEASURED_STEPS)
    )
    return max(long - short, 0.0) / MEASURED_STEPS


def stage_seconds(work: Work, rates: Rates) -> dict[str, float]:
    """Seconds by stage. The search's are those with all rows active: outliers make it several times faster."""

    def products(operations: float) -> float:
        return OVERHEAD * operations / rates.operations

    return {
        "activation statistics": products(work.statistics),
        "search, at most": sum(rates.step[width] * steps for width, steps in work.steps.items()),
        "probe and weights": products(work.layers),
        "what samples decide": products(work.samples),
        "training": products(work.training),
        "evaluation": products(work.evaluation),
        "copying to the GPU and back": work.moved / rates.copied,
    }
