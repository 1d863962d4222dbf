"""A run whose model never is in memory as a whole: one walk in which every layer is read, used, measured and dropped.

What goes from layer to layer are hidden states: of the calibration samples, and of the evaluation windows in the
full-precision and in the quantized network side by side. The steps are those of a run in memory, in another order, and
so are the figures, bit for bit.
"""

import logging

import torch
from torch import nn

from evaluation.base import FULL, QUANTIZED
from evaluation.runner import Runner
from experiment.outcome import Outcome
from experiment.peaks import keep_statistics, known_peaks, needs_peaks
from experiment.plan import Run
from experiment.resuming import finished_layers
from experiment.rows import FULL_TITLE, full_title
from models.streaming import LayerReader, load_shell
from quantize.observe import advance_, layer_calls
from quantize.state import FinishedLayer
from quantize.statistics import ChannelStatistics, observed
from quantize.walk import Quantization
from utils.log import progress
from utils.memory import Allocate, available_memory, in_memory, on_disk

MEMORY_SHARE = 0.5  # of the free memory, the most that hidden states take before they live in files
logger = logging.getLogger(__name__)


def execute_streamed(run: Run, outcome: Outcome, runner: Runner, files: bool | None = None) -> None:
    """Quantize and measure layer by layer; figures go into `outcome`.

    `files`: whether hidden states live in files under `--cache_dir`; None: where they would fill the memory.
    """
    setup, measured = run.setup, outcome.measured
    with measured.timing("load"):
        model = open_shell(run)
    full = runner.for_comparison(run.args.report)
    walk = Walk(run, model, outcome, full, runner, files)
    with LayerReader(model, setup.spec, run.shards, setup.dtype, setup.device) as reader:
        for index in progress(range(setup.layers), "layers", unit="layer"):
            with measured.timing("read"):
                layer = reader.open(index)
            walk.pass_(index, layer)
            reader.drop_(layer)
    walk.finish()
    full.measure(model, outcome.full, FULL, FULL_TITLE)
    runner.measure(model, measured, QUANTIZED, full_title(run.quant))


def open_shell(run: Run) -> nn.Module:
    """The model without the weights of its layers; on a CPU it computes in float32, as in `open_model`."""
    setup = run.setup
    compute = torch.float32 if setup.device.type == "cpu" else setup.dtype
    attention = run.args.attn_implementation
    return load_shell(setup.source, setup.config, setup.spec, run.shards, setup.dtype, compute, attention)


class Walk:
    """What one layer leaves to the next: samples for statistics, evaluation windows, and the quantization's own flow.

    `full` and `runner`: what measures the full-precision and the quantized model.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        outcome: Outcome,
        full: Runner,
        runner: Runner,
        files: bool | None,
    ):
        self.run, self.outcome, setup = run, outcome, run.setup
        finished = finished_layers(run.args.resume, run.checkpoint, setup, run.quant)
        left = not run.quant.bits.untouched and len(finished) < setup.layers
        self.peaks = known_peaks(run.args, setup) if needs_peaks(run.quant, left) else None
        observing = needs_peaks(run.quant, left) and self.peaks is None
        flowing = left * (2 if run.quant.clip.learned else 1)
        tokens = (observing + flowing) * setup.tokens.numel()
        tokens += full.tokens(FULL) + runner.tokens(QUANTIZED)
        allocate = choose_memory(run, tokens * setup.config.hidden_size * model.dtype.itemsize, files)

        self.statistics = ChannelStatistics({}, {})
        self.samples = layer_calls(model, setup.spec, setup.tokens, setup.device, allocate) if observing else None
        self.before = full.board(model, outcome.full, FULL, allocate)
        self.after = runner.board(model, outcome.measured, QUANTIZED, allocate)
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
        measured = self.outcome.measured
        spec, device = self.run.setup.spec, self.run.setup.device
        if self.samples is not None:
            with measured.timing("statistics"), observed(layer, index, spec, self.statistics):
                advance_(layer, self.samples.hidden, self.samples.kwargs[index], device)
        self.before.visit(index, layer)
        if self.quantization is not None:
            peaks = self.statistics.scales if self.peaks is None else self.peaks
            with measured.timing("quantize"):
                self.quantization.quantize_(index, layer, peaks)
        self.after.visit(index, layer)

    def finish(self) -> None:
        """Behind the last layer: note what was found."""
        if self.samples is not None:
            keep_statistics(self.run.args, self.run.setup, self.statistics)
        if self.quantization is not None:
            self.outcome.measured.seconds["search"] = self.quantization.search_seconds


def choose_memory(run: Run, needed: int, files: bool | None) -> Allocate:
    """Where hidden states of `needed` bytes are to live."""
    free = available_memory()
    if files is None:
        files = needed > MEMORY_SHARE * free
    where = f"in files in {run.args.cache_dir}" if files else "in memory"
    logger.info("hidden states: %.2f GB, %s (%.1f GB are free)", needed / 1e9, where, free / 1e9)
    return on_disk(run.args.cache_dir) if files else in_memory
