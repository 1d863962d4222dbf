"""The walk over the decoder layers: one at a time on the device, everything else on the host."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantize.attention import install
from quantize.config import Probe, QuantConfig, check_widths
from quantize.layer import GroupReport, LayerInputs, LayerReport, quantize_layer, restore_layer
from quantize.lwc import own_samples
from quantize.observe import layer_calls
from quantize.record import Recorder
from quantize.spec import DecoderSpec
from quantize.state import FinishedLayer
from utils.device import on_device, to_device
from utils.log import progress
from utils.memory import Allocate, in_memory

PROBE_SAMPLES = 4  # with `--probe sample`
logger = logging.getLogger(__name__)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: Tensor,
    activation_peaks: dict[str, Tensor] | None,
    config: QuantConfig,
    device: torch.device,
    finished: dict[int, FinishedLayer] | None = None,
    keep: Callable[[int, FinishedLayer], None] | None = None,
    recorder: Recorder | None = None,
    noted: Callable[[int, dict], None] | None = None,
) -> list[dict]:
    """Quantize every decoder layer of `model` in place, calibrated on `tokens` [N, T]; return the figures per layer.

    `activation_peaks` (linear name → [C]) are needed when `config.smooth` is set. Layers in `finished` (by index) are
    reapplied; the others are computed, and `keep` is called with each. A `recorder` looks on, for the report.
    `noted` is called with the figures of every layer as soon as it is done, reapplied ones too.
    """
    steps = Quantization(model, spec, tokens, config, device, finished, keep, recorder=recorder, noted=noted)
    for index, layer in enumerate(progress(spec.decoder_layers(model), "quantizing", unit="layer")):
        with on_device(layer, device):
            steps.quantize_(index, layer, activation_peaks)
    return steps.figures


class Quantization:
    """What goes from layer to layer of `quantize_model`: its arguments, the flow, and the figures so far.

    `model` may be without the weights of its decoder layers. `search_seconds`: spent on transforms until now.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: DecoderSpec,
        tokens: Tensor,
        config: QuantConfig,
        device: torch.device,
        finished: dict[int, FinishedLayer] | None = None,
        keep: Callable[[int, FinishedLayer], None] | None = None,
        allocate: Allocate = in_memory,
        recorder: Recorder | None = None,
        noted: Callable[[int, dict], None] | None = None,
    ):
        check_shapes(model, spec, config)
        install(model)
        self.spec, self.config, self.device, self.dtype = spec, config, device, model.dtype
        self.finished, self.keep, self.recorder, self.noted = finished or {}, keep, recorder, noted
        missing = [index for index in range(len(spec.decoder_layers(model))) if index not in self.finished]
        # behind the last layer that is to be computed nothing needs to flow any more
        self.last = max(missing, default=-1)
        self.flow = Flow(model, spec, tokens, config, device, allocate, recorder) if missing else None
        self.figures: list[dict] = []
        self.search_seconds = 0.0

    @torch.no_grad()
    def quantize_(self, index: int, layer: nn.Module, activation_peaks: dict[str, Tensor] | None) -> None:
        """Quantize `layer`, the next one, in place; it is on the device."""
        spec, config = self.spec.at(index), self.config
        inputs = self.flow.inputs(index) if index <= self.last else None
        if index in self.finished:
            done = self.finished[index]
            restore_layer(layer, spec, inputs, done.state.to(self.device), config, self.dtype)
            if self.recorder is not None and inputs is not None:
                self.recorder.skip(layer, inputs.kwargs)
            logger.info("layer %d: from the checkpoint", index)
        else:
            state, report = quantize_layer(layer, index, spec, inputs, activation_peaks, config, self.recorder)
            done = FinishedLayer(state, report.figures())
            self.search_seconds += report.search_seconds
            log_layer(report)
            if self.keep is not None:
                self.keep(index, done)
        self.figures.append(done.figures)
        if self.noted is not None:
            self.noted(index, done.figures)


class Flow:
    """The activations that travel through the layers: the probe, and with learned clipping the training samples."""

    def __init__(
        self,
        model: nn.Module,
        spec: DecoderSpec,
        tokens: Tensor,
        config: QuantConfig,
        device: torch.device,
        allocate: Allocate = in_memory,
        recorder: Recorder | None = None,
    ):
        calls = layer_calls(model, spec, tokens, device, allocate)
        if recorder is not None:
            recorder.start(calls.hidden, device)
        self.kwargs, self.device = calls.kwargs, device
        teacher = own_part_of(calls.hidden, config, allocate) if config.clip.learned else None
        student = allocate(teacher.shape, teacher.dtype).copy_(teacher) if config.clip.learned else None
        probe = make_probe(calls.hidden, config.probe).to(device)
        self.current = LayerInputs(probe, {}, teacher, student, len(tokens))

    def inputs(self, index: int) -> LayerInputs:
        """The inputs of layer `index`, after all layers before it have advanced them."""
        self.current.kwargs = to_device(self.kwargs[index], self.device)
        return self.current


def own_part_of(hidden: Tensor, config: QuantConfig, allocate: Allocate) -> Tensor:
    """Of the calibration samples [N, T, C] those that this process trains on; alone, all of them, not copied."""
    own = own_samples(len(hidden), config.training.batch_size)
    if len(own) == len(hidden):
        return hidden
    return allocate((len(own), *hidden.shape[1:]), hidden.dtype).copy_(hidden[own])


def make_probe(hidden: Tensor, kind: Probe) -> Tensor:
    """The activation to search on, from samples [N, T, C]: their mean [1, T, C] or the first few of them [P, T, C]."""
    if kind is Probe.SAMPLE:
        return hidden[:PROBE_SAMPLES].clone()
    if hidden.dtype.itemsize >= torch.float32.itemsize:
        return hidden.mean(dim=0, keepdim=True)
    # mean(dtype=float32) would first widen all samples: 4.3 GB of a 7B model's
    total = torch.zeros(hidden.shape[1:], device=hidden.device)
    for sample in hidden:
        total += sample
    return (total / len(hidden)).to(hidden.dtype)[None]


def check_shapes(model: nn.Module, spec: DecoderSpec, config: QuantConfig) -> None:
    """Raise InputError, naming the linear, if block or group sizes do not divide a width. Needs shapes, no weights."""
    widths = {
        spec.linear_key(index, path): layer.get_submodule(path).in_features
        for index, layer in enumerate(spec.decoder_layers(model))
        for group in spec.at(index).groups
        for path in group.linears
    }
    check_widths(config, widths)


def log_layer(report: LayerReport) -> None:
    """One line per group with the probe's peak through the stages, and one for the layer."""
    for group in report.groups:
        logger.info("layer %d %s: %s", report.layer, group.name, describe_group(group))
    trained = ""
    if report.training is not None:
        training = report.training
        trained = f", clipping loss {training.loss_before:.3e} → {training.loss_after:.3e} in {training.seconds:.1f} s"
        if training.gradient_norms and training.gradient_norms[-1] is not None:
            trained += f", gradient norm {training.gradient_norms[0] or 0:.1e} → {training.gradient_norms[-1]:.1e}"
        if training.restored:
            trained += f" ({training.restored} steps were not finite)"
    logger.info("layer %d: relative output error %.4f%s", report.layer, report.output_error, trained)


def describe_group(group: GroupReport) -> str:
    """For example `peak 41.2 → smoothed 9.8 → rotation 1 2.3 (37 steps) → permutation 1 2.3 (spread 1.9 → 1.0) …`."""
    parts, spread, steps = [], group.stages[0].spread, iter(group.steps)
    for stage in group.stages:
        note = ""
        if stage.name.startswith("rotation"):
            note = f" ({next(steps)} steps)"
        elif stage.name.startswith("permutation"):
            note = f" (block spread {spread:.2f} → {stage.spread:.2f})"
        parts.append(f"{stage.name} {stage.peak:.4g}{note}")
        spread = stage.spread
    return f"peak {' → '.join(parts)}; scale {group.scale}"
