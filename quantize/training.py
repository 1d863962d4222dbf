"""Learnable weight clipping: train the clip logits of one layer so that its quantized output follows full precision."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duquant.experts import Experts
from quantize.descent import Descent, copies, keep_best_, mean_or_none, restore_
from quantize.observe import layer_output
from quantize.settings import TrainingSettings
from utils.captured import Captured
from utils.distributed import own_batches, sum_
from utils.log import meter
from utils.memory import Allocate

logger = logging.getLogger(__name__)
MOST_RECORDED = 2**26  # parameters of a layer: with more, passes over its weights take longer than all launches
INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982: training starts near the unclipped range


class LearnedClip(nn.Module):
    """Both ends multiplied by the sigmoid of trainable logits, one pair per range (learnable weight clipping).

    `shape` is that of the ranges, for example [output channels, 1]. Source: OmniQuant, sec. 3.2; DuQuant uses it as
    LWC.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.high_logit = nn.Parameter(torch.full(shape, INITIAL_LOGIT))
        self.low_logit = nn.Parameter(torch.full(shape, INITIAL_LOGIT))

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sigmoid(β)·low, sigmoid(γ)·high)."""
        return self.low_logit.sigmoid() * low, self.high_logit.sigmoid() * high

    def logits(self) -> tuple[Tensor, Tensor]:
        """Detached copies of the logits (low, high)."""
        return self.low_logit.detach().clone(), self.high_logit.detach().clone()

    @torch.no_grad()
    def set_(self, low: Tensor, high: Tensor) -> None:
        """Set both logits."""
        self.low_logit.copy_(low)
        self.high_logit.copy_(high)


@dataclass(frozen=True)
class TrainingReport:
    """Figures of one layer's training.

    `loss_before` and `loss_after` are over all samples whose loss is finite at the start, with the logits at rest (NaN
    if there is none); `losses` and `gradient_norms` are the means over each epoch's finite ones; `restored` counts the
    steps that were not made, because the loss or the gradient was not finite.
    """

    loss_before: float
    loss_after: float
    losses: tuple[float | None, ...]
    gradient_norms: tuple[float | None, ...]
    restored: int
    seconds: float


class Gradients:
    """The loss of a part of a batch, and what its gradient by the clip logits is, scaled: a thousand small launches.

    On a GPU they are recorded once for each shape of the part and each share, and launched as one, unless the layer is
    so large that its work hides them, or has experts, which are called as the tokens ask for.
    """

    def __init__(self, layer: nn.Module, kwargs: dict, logits: Sequence[nn.Parameter], device: torch.device):
        self.layer, self.kwargs, self.logits = layer, kwargs, logits
        experts = any(isinstance(module, Experts) for module in layer.modules())
        small = sum(parameter.numel() for parameter in layer.parameters()) <= MOST_RECORDED
        self.records = device.type == "cuda" and small and not experts
        self._recorded: dict[tuple, Captured] = {}

    def __call__(self, batch: "Batch", scale: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Of a batch that has a part here: (loss, gradients of `scale` times the loss, None where it has none)."""

        def work(inputs: Tensor, scale: Tensor, *targets: Tensor) -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                loss = batch.share * distance(layer_output(self.layer, inputs, self.kwargs), targets)
                gradients = torch.autograd.grad(loss * scale, self.logits, allow_unused=True)
            return loss.detach(), *gradients

        given, recorded = (batch.inputs, scale, *batch.targets), work
        if self.records:
            key = (batch.inputs.shape, batch.share)
            if key not in self._recorded:
                self._record_(key, work, given)
            recorded = self._recorded.get(key, work)
        loss, *gradients = recorded(*given)
        return loss, tuple(gradients)

    def _record_(self, key: tuple, work: Callable[..., tuple], given: tuple[Tensor, ...]) -> None:
        """Record `work`; where that fails, all steps of this layer are launched kernel by kernel, as on a CPU."""
        try:
            self._recorded[key] = Captured(work, *given)
        except RuntimeError as problem:
            logger.warning("training steps are not recorded: %s", (str(problem).splitlines() or ["unknown"])[0])
            self.records = False


class Batch(NamedTuple):
    """This process's part of a batch, on the layer's device, and which share of the whole it is (0: there is none)."""

    inputs: Tensor
    targets: list[Tensor]
    share: float


@dataclass(frozen=True)
class Samples:
    """What a layer is trained on: the student's inputs, and the targets its output is compared with, [n, T, C].

    Several processes share every batch, so each has only its part (`own_samples`) of the `total` samples.
    """

    inputs: Tensor
    targets: tuple[Tensor, ...]
    total: int

    def batches(self, size: int, device: torch.device) -> Iterator[Batch]:
        """Batches of `size` samples; every process gets as many."""
        start = 0
        for own, whole in own_batches(self.total, size):
            part = slice(start, start + len(own))
            moved = [each[part].to(device, non_blocking=True) for each in (self.inputs, *self.targets)]
            yield Batch(moved[0], moved[1:], len(own) / whole)
            start += len(own)


def own_samples(total: int, batch_size: int) -> list[int]:
    """Which of the `total` training samples this process holds: its part of every batch."""
    return [number for own, _ in own_batches(total, batch_size) for number in own]


def own_part_of(hidden: Tensor, batch_size: int, allocate: Allocate) -> Tensor:
    """Of the calibration samples [N, T, C] those that this process trains on; alone, all of them, not copied."""
    own = own_samples(len(hidden), batch_size)
    if len(own) == len(hidden):
        return hidden
    return allocate((len(own), *hidden.shape[1:]), hidden.dtype).copy_(hidden[own])


def train_clipping_(layer: nn.Module, samples: Samples, kwargs: dict, config: TrainingSettings) -> TrainingReport:
    """Train every `LearnedClip` of `layer`, which is on its device, in place.

    Minimises the mean squared error of the layer's quantized output on the student's inputs against the targets, with
    straight-through rounding. A loss that is not finite restores the last logits whose loss was; where only the
    gradient overflows (float16, its scale still too large) the step is left out and the logits stay.

    Of the logits at the start, at the end, and at the end of the best epoch those are kept whose loss over all samples
    is the least. The best epoch is the one with the least mean loss of its steps, and with the most that were finite:
    that costs nothing, where a pass with the logits at rest behind each epoch would cost a third more. But the logits
    move meanwhile, so it only proposes; what decides is measured at rest, in one more pass if it was not the last one.
    A sample whose loss is not finite at the start says nothing about the clipping and does not count there.
    Sources: OmniQuant, sec. 3.2 (the clipping); DuQuant, sec. 4.1 (its use).
    """
    started = time.perf_counter()
    logits = [parameter for clip in clips(layer) for parameter in clip.parameters()]
    device, dtype = next(layer.parameters()).device, samples.inputs.dtype
    samples = placed(samples, device, config.offload)
    losses_before = sample_losses(layer, samples, kwargs, config.batch_size, device)
    counted = losses_before.isfinite()
    before = losses_before[counted].mean().item()
    if not logits:  # 16-bit weights
        return TrainingReport(before, before, (), (), 0, time.perf_counter() - started)
    optimizer = torch.optim.AdamW(logits, lr=config.learning_rate, weight_decay=config.weight_decay)
    descent = Descent(optimizer, device, scaled=dtype is torch.float16)
    initial, gradients = copies(logits), Gradients(layer, kwargs, logits, device)
    losses, norms, restored, sound = [], [], 0, initial
    best, rank = initial, (0, math.inf, -1)  # finite losses × −1, their mean, the epoch
    for parameter in logits:
        parameter.requires_grad_(True)
    with meter(config.epochs, "clipping", "epoch", inner=True) as bar:
        for epoch in range(config.epochs):
            steps = []
            for batch in samples.batches(config.batch_size, device):
                current = copies(logits)
                steps.append(train_step(gradients, batch, descent))
                if math.isfinite(steps[-1][0]):
                    sound = current
                else:
                    restore_(logits, sound)
            restored += sum(not all(map(math.isfinite, step)) for step in steps)
            finite = [[figure for figure in figures if math.isfinite(figure)] for figures in zip(*steps, strict=True)]
            losses.append(mean_or_none(finite[0]))
            norms.append(mean_or_none(finite[1]))
            if finite[0] and (-len(finite[0]), losses[-1]) < rank[:2]:
                best, rank = copies(logits), (-len(finite[0]), losses[-1], epoch)
            bar.set_postfix_str(f"loss {losses[-1]:.3e}" if finite[0] else "no finite loss")
            bar.update()
    for parameter in logits:
        parameter.requires_grad_(False)
    candidates = [best] if rank[2] == config.epochs - 1 else [best, copies(logits)]

    def loss_at_rest() -> float:
        return sample_losses(layer, samples, kwargs, config.batch_size, device)[counted].mean().item()

    after = keep_best_(logits, (initial, before), candidates, loss_at_rest)
    return TrainingReport(before, after, tuple(losses), tuple(norms), restored, time.perf_counter() - started)


def placed(samples: Samples, device: torch.device, offload: bool) -> Samples:
    """`samples` on `device` if they are there or take at most half of its free memory, else pinned on the host."""
    if device.type != "cuda" or samples.inputs.device.type == "cuda":
        return samples
    tensors = (samples.inputs, *samples.targets)
    fits = 2 * sum(tensor.nbytes for tensor in tensors) <= torch.cuda.mem_get_info(device)[0]
    moved = [tensor.to(device) if fits and not offload else tensor.pin_memory() for tensor in tensors]
    return Samples(moved[0], tuple(moved[1:]), samples.total)


def train_step(gradients: Gradients, batch: Batch, descent: Descent) -> tuple[float, float]:
    """One optimizer step: (loss, gradient norm) of the logits it starts from; no step if one of them is not finite."""

    def backward(scale: Tensor) -> Tensor:
        loss, found = gradients(batch, scale)
        for parameter, gradient in zip(gradients.logits, found, strict=True):
            parameter.grad = gradient
        return loss

    return descent.step(backward if batch.share > 0 else None)


def distance(output: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Sum over the targets of the mean squared error, in float32."""
    return torch.stack([F.mse_loss(output.float(), target.float()) for target in targets]).sum()


@torch.no_grad()
def sample_losses(layer: nn.Module, samples: Samples, kwargs: dict, batch_size: int, device: torch.device) -> Tensor:
    """The training loss of every sample (the mean of its batch) with the logits as they are: [N], float64."""
    nothing = torch.zeros((), device=device)
    losses = [
        batch.share * distance(layer_output(layer, batch.inputs, kwargs), batch.targets) if batch.share > 0 else nothing
        for batch in samples.batches(batch_size, device)
    ]
    of_batches = torch.stack(losses).cpu().double()  # one wait for the device, at the end
    sum_([of_batches])
    return of_batches.repeat_interleave(torch.tensor([whole for _, whole in own_batches(samples.total, batch_size)]))


def clips(layer: nn.Module) -> list[LearnedClip]:
    """The learnable clips inside `layer`."""
    return [module for module in layer.modules() if isinstance(module, LearnedClip)]
