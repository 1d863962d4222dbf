"""The way through the layers of one model: who looks at each of them, in which order, and what it costs."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from evaluation.measured import Measured
from experiment.setup import Setup
from quantize.observer import Observer
from quantize.quantization import Quantization
from quantize.settings import QuantSettings, SmoothMeasure
from quantize.state import FinishedLayer
from quantize.statistics import ChannelStatistics, Observation
from quantize.tuning import Teacher, tune_
from quantize.walk import Passenger, layers_in_memory, walk
from utils.memory import Allocate

logger = logging.getLogger(__name__)


def travel(
    setup: Setup,
    model: nn.Module,
    layers: Iterable[nn.Module],
    quant: QuantSettings | None,
    measured: Measured,
    *,
    before: Sequence[Passenger] = (),
    behind: Sequence[Passenger] = (),
    peaks: Callable[[], Mapping[str, Tensor] | None],
    finished: Mapping[int, FinishedLayer] | None = None,
    observers: Sequence[Observer] = (),
    allocate: Allocate | None = None,
) -> ChannelStatistics | None:
    """Visit every layer once: statistics if they are needed, passengers `before`, quantization, passengers `behind`.

    Where the whole network is tuned, that is done behind its last layer, and those `behind` walk by themselves then.
    `quant` None: the model is quantized already. `peaks` finds the activation peaks that are known; where it gives None
    they are observed on the way, and returned with the other statistics.
    """
    tunes = quant is not None and quant.tunes
    passengers: list[Passenger] = [*before]
    observation = quantization = None
    if quant is not None and quant.bits.untouched:
        logger.info("16-bit weights and activations: nothing to quantize")
    elif quant is not None:
        smooths = needs_peaks(setup, quant, finished)
        scales = peaks() if smooths else None
        if smooths and scales is None:
            with measured.timing("statistics"):
                observation = Observation(model, setup.spec, setup.tokens, setup.device, allocate)
            scales = observation.statistics.scales
            passengers.insert(0, Timed(observation, measured, "statistics"))
        with measured.timing("quantize"):
            how = (quant, setup.device, finished, observers, allocate)
            quantization = Quantization(model, setup.spec, setup.tokens, scales, *how)
        if tunes:
            with measured.timing("tune"):
                teacher = Teacher(model, setup.spec, setup.tuning_tokens, setup.device, allocate)
            passengers.append(Timed(teacher, measured, "tune"))
        passengers.append(Timed(quantization, measured, "quantize"))
    walk(layers, passengers if tunes else [*passengers, *behind], setup.layers)
    if quantization is not None:
        measured.seconds["search"] = quantization.search_seconds
    if tunes:
        with measured.timing("tune"):
            how = (teacher.hidden, quant.tuning, setup.device, allocate)
            measured.add({"tuning": asdict(tune_(model, setup.spec, setup.tuning_tokens, *how))})
        walk(layers_in_memory(model, setup.spec, setup.device), behind, setup.layers, "evaluating")
    return observation and observation.statistics


def needs_peaks(setup: Setup, quant: QuantSettings, finished: Mapping[int, FinishedLayer] | None) -> bool:
    """Whether something is still to be smoothed by peaks."""
    by_peaks = quant.smooth is not None and quant.smooth.measure is SmoothMeasure.PEAK
    return by_peaks and not quant.bits.untouched and len(finished or {}) < setup.layers


@dataclass(frozen=True)
class Timed:
    """A passenger whose visits are counted under a stage of `measured`."""

    passenger: Passenger
    measured: Measured
    stage: str

    def visit(self, index: int, layer: nn.Module) -> None:
        """Pass the layer on."""
        with self.measured.timing(self.stage):
            self.passenger.visit(index, layer)


@dataclass(frozen=True)
class LayerFigures(Observer):
    """Notes the figures of every layer as soon as it is done."""

    measured: Measured

    def layer_done(self, index: int, finished: FinishedLayer, restored: bool) -> None:
        """Add them."""
        self.measured.add_layer(finished.figures)
