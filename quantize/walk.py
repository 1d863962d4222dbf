"""The walk over the decoder layers: one at a time on the device, everything else on the host."""

import logging
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from quantize.attention import install
from quantize.config import Probe, QuantConfig, check_widths
from quantize.layer import GroupReport, LayerInputs, LayerReport, quantize_layer, restore_layer
from quantize.observe import layer_calls
from quantize.record import Recorder
from quantize.spec import DecoderSpec
from quantize.state import FinishedLayer
from utils.device import on_device, to_device
from utils.log import progress

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
) -> list[dict]:
    """Quantize every decoder layer of `model` in place, calibrated on `tokens` [N, T]; return the figures per layer.

    `activation_peaks` (linear name → [C]) are needed when `config.smooth` is set. Layers in `finished` (by index) are
    reapplied; the others are computed, and `keep` is called with each. A `recorder` looks on, for the report.
    """
    check_shapes(model, spec, config)
    install(model)
    layers, finished = spec.decoder_layers(model), finished or {}
    missing = [index for index in range(len(layers)) if index not in finished]
    flow = Flow(model, spec, tokens, config, device) if missing else None
    if recorder is not None and flow is not None:
        recorder.start(flow.calls.hidden, device)
    figures = []
    for index, layer in enumerate(progress(layers, "quantizing", unit="layer")):
        with on_device(layer, device):
            # behind the last layer that is to be computed nothing needs to flow any more
            inputs = flow.inputs(index) if missing and index <= missing[-1] else None
            if index in finished:
                done = finished[index]
                restore_layer(layer, spec.at(index), inputs, done.state.to(device), config, model.dtype)
                if recorder is not None and inputs is not None:
                    recorder.skip(layer, inputs.kwargs)
                logger.info("layer %d: from the checkpoint", index)
            else:
                state, report = quantize_layer(
                    *(layer, index, spec.at(index), inputs, activation_peaks, config, recorder)
                )
                done = FinishedLayer(state, asdict(report))
                log_layer(report)
                if keep is not None:
                    keep(index, done)
        figures.append(done.figures)
    return figures


class Flow:
    """The activations that travel through the layers: the probe, and with learned clipping the training samples."""

    def __init__(self, model: nn.Module, spec: DecoderSpec, tokens: Tensor, config: QuantConfig, device: torch.device):
        self.calls = layer_calls(model, spec, tokens, device)
        self.device = device
        teacher = self.calls.hidden if config.clip.learned else None
        student = teacher.clone() if config.clip.learned else None
        self.current = LayerInputs(make_probe(self.calls.hidden, config.probe).to(device), {}, teacher, student)

    def inputs(self, index: int) -> LayerInputs:
        """The inputs of layer `index`, after all layers before it have advanced them."""
        self.current.kwargs = to_device(self.calls.kwargs[index], self.device)
        return self.current


def make_probe(hidden: Tensor, kind: Probe) -> Tensor:
    """The activation to search on, from samples [N, T, C]: their mean [1, T, C] or the first few of them [P, T, C]."""
    if kind is Probe.SAMPLE:
        return hidden[:PROBE_SAMPLES].clone()
    return hidden.mean(dim=0, keepdim=True, dtype=torch.promote_types(hidden.dtype, torch.float32)).to(hidden.dtype)


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
