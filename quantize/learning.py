"""Training the learned dual transformation of one layer against the full-precision layer."""

import math
import time

import torch
from torch import Tensor

from quantize.descent import Descent, copies, keep_best_, mean_or_none
from quantize.learned import LearnedLayer
from quantize.observe import layer_output
from quantize.settings import TrainingSettings
from quantize.training import Batch, Samples, TrainingReport, placed
from utils.distributed import own_batches, sum_
from utils.log import meter


def train_transform(learned: LearnedLayer, samples: Samples, kwargs: dict, config: TrainingSettings) -> TrainingReport:
    """Train everything of `learned` so that the layer's output on the student's inputs follows the targets.

    The loss is ‖ŷ − y‖²/‖y‖² of every token, their mean: a norm follows that takes the length away, and without it the
    few tokens with massive activations would be all that counts. Adam, its rates falling to 0 along a cosine. Of the
    start, the best epoch and the end what is kept has the least loss over all samples. A step whose loss or gradient is
    not finite is left out.
    """
    started, layer = time.perf_counter(), learned.layer
    device, dtype = next(layer.parameters()).device, samples.inputs.dtype
    samples = placed(samples, device, config.offload)
    rates = learned.rates(config)
    parameters = [each for rate in rates for each in rate["params"]]
    before, values = rest_loss(learned, samples, kwargs, config), copies(parameters)
    if not parameters or not config.epochs:
        return TrainingReport(before, before, (), (), 0, time.perf_counter() - started)
    steps = config.epochs * len(own_batches(samples.total, config.batch_size))
    descent = Descent(torch.optim.Adam(rates, betas=(0.9, 0.95)), device, dtype is torch.float16, steps)
    losses, norms, left_out, best = [], [], 0, (math.inf, values, -1)
    with meter(config.epochs, "training", "epoch", inner=True) as bar:
        for epoch in range(config.epochs):
            done = [step_(learned, batch, kwargs, descent) for batch in samples.batches(config.batch_size, device)]
            finite = [each for each in done if all(map(math.isfinite, each))]
            left_out += len(done) - len(finite)
            losses.append(mean_or_none([loss for loss, _ in finite]))
            norms.append(mean_or_none([norm for _, norm in finite]))
            if finite and losses[-1] < best[0]:
                best = (losses[-1], copies(parameters), epoch)
            bar.set_postfix_str(f"loss {losses[-1]:.3e}" if finite else "no finite loss")
            bar.update()
    candidates = [best[1]] if best[2] == config.epochs - 1 else [best[1], copies(parameters)]
    after = keep_best_(parameters, (values, before), candidates, lambda: rest_loss(learned, samples, kwargs, config))
    learned.begin_step_()
    return TrainingReport(before, after, tuple(losses), tuple(norms), left_out, time.perf_counter() - started)


def token_distance(output: Tensor, targets: list[Tensor]) -> Tensor:
    """Mean over tokens of ‖ŷ − y‖²/‖y‖², summed over the targets, in float32."""
    errors = [
        (output.float() - each.float()).square().sum(-1) / each.float().square().sum(-1).clamp(min=1e-12)
        for each in targets
    ]
    return torch.stack([each.mean() for each in errors]).sum()


def step_(learned: LearnedLayer, batch: Batch, kwargs: dict, descent: Descent) -> tuple[float, float]:
    """One optimizer step: (loss, gradient norm) before it; none is made if one of them is not finite."""
    learned.begin_step_()

    def backward(scale: Tensor) -> Tensor:
        with torch.enable_grad():
            loss = batch.share * token_distance(layer_output(learned.layer, batch.inputs, kwargs), batch.targets)
            (loss * scale).backward()
        return loss.detach()

    return descent.step(backward if batch.share > 0 else None)


@torch.no_grad()
def rest_loss(learned: LearnedLayer, samples: Samples, kwargs: dict, config: TrainingSettings) -> float:
    """The loss over all samples with the parameters as they are."""
    device = next(learned.layer.parameters()).device
    total = torch.zeros((), device=device, dtype=torch.float64)
    batches = own_batches(samples.total, config.batch_size)
    for batch, (_, whole) in zip(samples.batches(config.batch_size, device), batches, strict=True):
        learned.begin_step_()
        if batch.share > 0:
            loss = token_distance(layer_output(learned.layer, batch.inputs, kwargs), batch.targets)
            total += loss.double() * batch.share * whole
    sum_([total])
    return total.item() / samples.total
