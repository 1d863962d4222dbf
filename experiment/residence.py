"""Where a model and the hidden states are between their uses: on a GPU that has room for them, else on the host."""

import logging
from dataclasses import dataclass

from torch import nn

from evaluation.runner import Evaluations
from experiment.estimate import Estimate, Plan, estimate
from experiment.options import Keep
from experiment.setup import Setup
from quantize.settings import QuantSettings
from utils.capacity import SPARE, free_device_memory
from utils.device import describe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Residence:
    """What stays on the GPU: hidden states, and weights, which do only where those do. `needed`: bytes there.

    `tokens`: of the test windows, how many go through a layer at once.
    """

    states: bool
    weights: bool
    needed: int
    tokens: int = 0

    def __str__(self) -> str:
        kept = "hidden states" + " and weights" * self.weights if self.states else "nothing"
        batches = f", test windows in batches of up to {self.tokens} tokens" if self.tokens else ""
        return f"{kept} ({self.needed / 1e9:.1f} GB are needed there{batches})"


def choose_residence(keep: Keep, needed: Estimate, free: int | None, whole: bool) -> Residence:
    """By what is `needed`, and what a GPU has `free` (None: there is none); `whole`: its weights could stay on it.

    What is left then is for larger batches of test windows.
    """
    if free is None:
        return Residence(False, False, needed.device)
    room = free * (1 - SPARE)
    wanted = room if keep is Keep.AUTO else 0 if keep is Keep.HOST else float("inf")
    states = needed.device + needed.states <= wanted
    weights = states and whole and needed.device + needed.states + needed.held <= wanted
    total = needed.device + states * needed.states + weights * needed.held
    least, most = needed.window_tokens
    more = min(most - least, max(0, int((room - total) // needed.window_token)))
    return Residence(states, weights, total + more * needed.window_token, least + more)


def settle_(model: nn.Module, setup: Setup, quant: QuantSettings, plan: Plan, whole: bool = True) -> Residence:
    """Choose for a run, and bring `model` to the GPU if it is to stay there."""
    needed = estimate(setup.skeleton, setup.spec, quant, plan)
    found = choose_residence(setup.model.keep, needed, free_device_memory(setup.device), whole)
    if setup.device.type == "cuda":
        logger.info("kept on %s: %s", describe(setup.device), found)
    if found.weights:
        model.to(setup.device)
    return found


def make_plan(
    setup: Setup,
    quant: QuantSettings,
    evaluations: Evaluations,
    compared: Evaluations,
    statistics: bool,
    batch: int | None = None,
) -> Plan:
    """What a run does, as the estimate wants it; `compared`: what the full-precision model is measured for.

    `statistics`: those of activations, where something is smoothed, are not at hand. `batch`: windows at a time, if it
    is given.
    """
    windows, joining = evaluations.own_windows
    return Plan(
        dtype=setup.dtype,
        on_gpu=setup.device.type == "cuda",
        calibration=setup.calibration,
        windows=windows,
        joining=joining,
        compared=compared.windows,
        statistics=quant.smooth is not None and statistics,
        divergence=bool(evaluations.teaching().members),
        whole=evaluations.need_whole_model and not evaluations.spread,
        whole_compared=compared.need_whole_model and not evaluations.spread,
        saved=setup.saved is not None,
        batch=batch,
    )
