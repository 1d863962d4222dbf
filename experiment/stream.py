"""A run whose model never is in memory as a whole: one walk in which every layer is read, used, measured and dropped.

What goes from layer to layer are hidden states: of the calibration samples, and of the evaluation windows in the
full-precision and in the quantized network side by side. The steps are those of a run in memory, in another order, and
so are the figures, bit for bit.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiment.evaluations import FULL, QUANTIZED
from experiment.evaluator import Evaluator
from experiment.outcome import Outcome
from experiment.peaks import keep_statistics, known_peaks, needs_peaks
from experiment.plan import Run
from experiment.resuming import finished_layers
from experiment.rows import FULL_TITLE, full_title
from models.streaming import LayerReader, load_shell
from quantize.observe import LayerCalls, advance_, layer_calls
from quantize.state import FinishedLayer
from quantize.statistics import ChannelStatistics, observed
from quantize.walk import Quantization
from utils.batching import BatchSize
from utils.log import progress
from utils.memory import Allocate, available_memory, in_memory, on_disk

MEMORY_SHARE = 0.5  # of the free memory, the most that hidden states take before they live in files
logger = logging.getLogger(__name__)


def execute_streamed(run: Run, outcome: Outcome, evaluator: Evaluator, files: bool | None = None) -> None:
    """Quantize and measure layer by layer; figures go into `outcome`.

    `files`: whether hidden states live in files under `--cache_dir`; None: where they would fill the memory.
    """
    setup, measured = run.setup, outcome.measured
    with measured.timing("load"):
        model = open_shell(run)
    full = evaluator.for_comparison()
    windows = {FULL: full.travellers(FULL), QUANTIZED: evaluator.travellers(QUANTIZED)}
    walk = Walk(run, model, outcome, windows, evaluator, files)
    with LayerReader(model, setup.spec, run.shards, setup.dtype, setup.device) as reader:
        for index in progress(range(setup.layers), "layers", unit="layer"):
            with measured.timing("read"):
                layer = reader.open(index)
            walk.pass_(index, layer)
            reader.drop_(layer)
    evaluator.travelled |= walk.finish()
    full.measure(model, outcome.full, FULL, FULL_TITLE)
    evaluator.measure(model, measured, QUANTIZED, full_title(run.quant))


def open_shell(run: Run) -> nn.Module:
    """The model without the weights of its layers; on a CPU it computes in float32, as in `open_model`."""
    setup = run.setup
    compute = torch.float32 if setup.device.type == "cpu" else setup.dtype
    attention = run.args.attn_implementation
    return load_shell(setup.source, setup.config, setup.spec, run.shards, setup.dtype, compute, attention)


@dataclass(frozen=True)
class Traveller:
    """Hidden states that go through one layer after the other, in batches of calibration if no other size is given."""

    calls: LayerCalls
    batch_size: BatchSize | None = None

    def advance_(self, index: int, layer: nn.Module, device: torch.device) -> None:
        """Replace the hidden states by what `layer`, number `index`, makes of them."""
        advance_(layer, self.calls.hidden, self.calls.kwargs[index], device, self.batch_size)


class Walk:
    """What one layer leaves to the next: samples for statistics, evaluation windows, and the quantization's own flow.

    `windows`: token ids [N, T] by label, of every row that is measured.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        outcome: Outcome,
        windows: dict[str, dict[str, Tensor]],
        evaluator: Evaluator,
        files: bool | None,
    ):
        self.run, self.outcome, setup = run, outcome, run.setup
        finished = finished_layers(run.args.resume, run.checkpoint, setup, run.quant)
        left = not run.quant.bits.untouched and len(finished) < setup.layers
        self.peaks = known_peaks(run.args, setup) if needs_peaks(run.quant, left) else None
        observing = needs_peaks(run.quant, left) and self.peaks is None
        flowing = left * (2 if run.quant.clip.learned else 1)
        tokens = (observing + flowing) * setup.tokens.numel()
        tokens += sum(each.numel() for labels in windows.values() for each in labels.values())
        allocate = choose_memory(run, tokens * setup.config.hidden_size * model.dtype.itemsize, files)

        def start(tokens: Tensor, batch_size: BatchSize | None = None) -> Traveller:
            return Traveller(layer_calls(model, setup.spec, tokens, setup.device, allocate), batch_size)

        self.statistics = ChannelStatistics({}, {})
        self.samples = start(setup.tokens) if observing else None
        self.travellers = {
            row: {label: start(each, evaluator.batch_size(each)) for label, each in labels.items()}
            for row, labels in windows.items()
        }
        self.quantization = self._begin(model, finished, allocate)

    def _begin(self, model: nn.Module, finished: dict[int, FinishedLayer], allocate: Allocate) -> Quantization | None:
        run, setup = self.run, self.run.setup
        if run.quant.bits.untouched:
            logger.info("16-bit weights and activations: nothing to quantize")
            return None
        keep = run.checkpoint and run.checkpoint.keep
        how = (run.quant, setup.device, finished, keep, allocate, run.recorder(), self.outcome.measured.add_layer)
        return Quantization(model, setup.spec, setup.tokens, *how)

    def pass_(self, index: int, layer: nn.Module) -> None:
        """Use `layer`, number `index`, on the device: first as it is, then quantized, which it stays."""
        measured, full = self.outcome.measured, self.outcome.full
        spec, device = self.run.setup.spec, self.run.setup.device
        if self.samples is not None:
            with measured.timing("statistics"), observed(layer, index, spec, self.statistics):
                self.samples.advance_(index, layer, device)
        with full.timing("perplexity"):
            for traveller in self.travellers[FULL].values():
                traveller.advance_(index, layer, device)
        if self.quantization is not None:
            peaks = self.statistics.scales if self.peaks is None else self.peaks
            with measured.timing("quantize"):
                self.quantization.quantize_(index, layer, peaks)
        with measured.timing("perplexity"):
            for traveller in self.travellers[QUANTIZED].values():
                traveller.advance_(index, layer, device)

    def finish(self) -> dict[tuple[str, str], Tensor]:
        """Behind the last layer: note what was found, and return the hidden states by row and label."""
        if self.samples is not None:
            keep_statistics(self.run.args, self.run.setup, self.statistics)
        if self.quantization is not None:
            self.outcome.measured.seconds["search"] = self.quantization.search_seconds
        return {
            (row, label): traveller.calls.hidden
            for row, labels in self.travellers.items()
            for label, traveller in labels.items()
        }


def choose_memory(run: Run, needed: int, files: bool | None) -> Allocate:
    """Where hidden states of `needed` bytes are to live."""
    free = available_memory()
    if files is None:
        files = needed > MEMORY_SHARE * free
    where = f"in files in {run.args.cache_dir}" if files else "in memory"
    logger.info("hidden states: %.2f GB, %s (%.1f GB are free)", needed / 1e9, where, free / 1e9)
    return on_disk(run.args.cache_dir) if files else in_memory
