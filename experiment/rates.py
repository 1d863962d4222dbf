"""How fast this machine is, measured in about a second, and the seconds that makes of a run's work. Rough: factor 2."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from experiment.estimate import Work
from quantize.greedy import greedy_rotation
from quantize.rotation import random_orthogonal, step_rotation
from quantize.settings import RotationSettings

MATRIX = {"cpu": 1536, "cuda": 8192}  # sides of the matrices multiplied
MEASURED_STEPS = 8
MEASURED_BLOCK = 512  # above it a step is nothing but matrix products, and takes too long to try
COPIED_BYTES = 2**26
OVERHEAD = 1.5  # what is no matrix product (norms, attention's softmax, rounding), seen on a CPU


@dataclass(frozen=True)
class Rates:
    """`operations` of a matrix product per second; seconds of a greedy `step`, all rows active, by the probe's width;
    bytes `copied` per second between host and GPU (infinite without one).
    """

    operations: float
    step: dict[int, float]
    copied: float = float("inf")


def measure_rates(
    device: torch.device, dtype: torch.dtype, widths: Iterable[int], tokens: int, config: RotationSettings
) -> Rates:
    """The `Rates` of `device` for weights in `dtype`, and probes [`tokens`, width] of the `widths`."""
    side, kind = MATRIX[device.type], dtype if device.type == "cuda" else torch.float32
    matrix = torch.randn(side, side, device=device, dtype=kind)
    operations = 2 * len(matrix) ** 3 / _seconds(lambda: matrix @ matrix, device)
    steps = {}
    for width in widths:
        block = config.block_size_for(width)
        if block <= MEASURED_BLOCK:
            steps[width] = _step_seconds(device, tokens, width, config)
        else:  # the rows', and that of the rotation itself, in float64
            steps[width] = (2 * tokens * width * block + 2 * 2 * block**3) / operations
    if device.type != "cuda":
        return Rates(operations, steps)
    host = torch.empty(COPIED_BYTES, dtype=torch.uint8)
    return Rates(operations, steps, COPIED_BYTES / _seconds(lambda: host.to(device), device))


def _step_seconds(device: torch.device, tokens: int, width: int, config: RotationSettings) -> float:
    """Of one greedy step: the difference of two short searches, so that what comes before the steps is left out."""
    block = config.block_size_for(width)
    probe = torch.randn(tokens, width, device=device)
    step = step_rotation(random_orthogonal(block, torch.Generator().manual_seed(0)), config.order)
    short, long = (
        _seconds(lambda count=count: greedy_rotation(probe, step, count, config.rule, lazy=False), device)
        for count in (1, 1 + MEASURED_STEPS)
    )
    return max(long - short, 0.0) / MEASURED_STEPS


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least of two runs, behind one that warms up."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def stage_seconds(work: Work, rates: Rates) -> dict[str, float]:
    """Seconds by stage. The search's are those with all rows active: outliers make it several times faster."""

    def products(operations: float) -> float:
        return OVERHEAD * operations / rates.operations

    return {
        "activation statistics": products(work.statistics),
        "search, at most": sum(rates.step[width] * steps for width, steps in work.steps.items()),
        "probe and weights": products(work.layers),
        "training the clipping": products(work.training),
        "evaluation": products(work.evaluation),
        "copying to the GPU and back": work.moved / rates.copied,
    }
