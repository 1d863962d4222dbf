"""What all trainings share: steps that leave out what is not finite, and keeping what is best at rest."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from utils.distributed import sum_, world_size


class Descent:
    """Steps of `optimizer`, whose parameters are on `device`; the processes share every batch and make the same step.

    `scaled`: gradients are of a loss that is scaled up as far as float16 allows. `steps`: over so many the rates fall
    to 0 along a cosine; None: they stay.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, scaled: bool, steps: int | None = None):
        self.optimizer, self.device = optimizer, device
        self.parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        falling = torch.optim.lr_scheduler.LambdaLR
        self.schedule = steps and falling(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))

    def step(self, backward: Callable[[Tensor], Tensor] | None) -> tuple[float, float]:
        """One step: (loss, gradient norm) before it; none is made if one of them is not finite.

        `backward`, called with a scale, gives this process's share of the loss, and the parameters the gradients of
        scale · loss; None: it has no part of this batch.
        """
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        scale = self.scaler.scale(torch.ones_like(loss))  # which has none before the first time that it is asked
        if backward is not None:
            loss = backward(scale)
        self._add_up_(loss)
        self.scaler.unscale_(self.optimizer)
        # experts that none of the tokens went to have no gradient
        norm = torch.nn.utils.get_total_norm([each.grad for each in self.parameters if each.grad is not None])
        found = tuple(torch.stack([loss, norm]).tolist())
        if all(map(math.isfinite, found)):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.schedule:
            self.schedule.step()
        return found

    def _add_up_(self, loss: Tensor) -> None:
        """Replace loss and gradients by their sums over all processes."""
        if world_size() > 1:
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            sum_([loss, *(parameter.grad for parameter in self.parameters)])


def keep_best_(
    parameters: Sequence[nn.Parameter],
    start: tuple[Sequence[Tensor], float],
    candidates: Iterable[Sequence[Tensor]],
    loss_at_rest: Callable[[], float],
) -> float:
    """Give `parameters` the values with the least loss, of `start` and its loss, and of `candidates`; return the loss.

    Of equal losses the last counts, and one that is not a number never does.
    """
    kept, least = start
    for values in candidates:
        restore_(parameters, values)
        loss = loss_at_rest()
        if loss <= least:
            kept, least = values, loss
    restore_(parameters, kept)
    return least


def mean_or_none(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Detached copies."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def restore_(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Set every parameter to its value."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
