"""Quantizing a model: the passenger that decides every layer, and what flows with it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from duquant.attention import install
from quantize.build import build_
from quantize.inputs import LayerInputs
from quantize.layer import decide
from quantize.observe import layer_calls
from quantize.observer import Observer
from quantize.rotation_settings import USUAL_BLOCK, Transform
from quantize.settings import Probe, QuantSettings
from quantize.spec import DecoderSpec
from quantize.state import FinishedLayer
from quantize.training import own_part_of
from quantize.walk import layers_in_memory, walk
from quantize.widths import check_heads, check_widths
from utils.device import home_of, to_device
from utils.distributed import make_equal_
from utils.memory import Allocate, memory_of

PROBE_SAMPLES = 4  # with `--probe sample`


def quantize_model(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: Tensor,
    activation_peaks: Mapping[str, Tensor] | None,
    settings: QuantSettings,
    device: torch.device,
    finished: Mapping[int, FinishedLayer] | None = None,
    observers: Sequence[Observer] = (),
) -> list[dict]:
    """Quantize every decoder layer of `model` in place, calibrated on `tokens` [N, T]; return the figures per layer.

    The walk with `Quantization` alone; see there.
    """
    quantization = Quantization(model, spec, tokens, activation_peaks, settings, device, finished, observers)
    layers = layers_in_memory(model, spec, device)
    walk(layers, [quantization], len(spec.decoder_layers(model)), "quantizing")
    return quantization.figures


class Quantization:
    """The passenger that quantizes every layer in place, and its figures so far.

    `activation_peaks` (linear name → [C]) are needed for smoothing; those of a layer when it is visited. Layers in
    `finished` (by index) are built as they were; the others are decided. `model` may be without the weights of its
    decoder layers. `search_seconds`: spent on transforms until now.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: DecoderSpec,
        tokens: Tensor,
        activation_peaks: Mapping[str, Tensor] | None,
        settings: QuantSettings,
        device: torch.device,
        finished: Mapping[int, FinishedLayer] | None = None,
        observers: Sequence[Observer] = (),
        allocate: Allocate | None = None,
    ):
        check_shapes(model, spec, settings)
        install(model)
        self.spec, self.settings, self.device, self.dtype = spec, settings, device, model.dtype
        self.peaks, self.finished, self.observers = activation_peaks, finished or {}, observers
        missing = [index for index in range(len(spec.decoder_layers(model))) if index not in self.finished]
        # behind the last layer that is to be computed nothing needs to flow any more
        self.last = max(missing, default=-1)
        self.flow = Flow(model, spec, tokens, settings, device, allocate, observers) if missing else None
        self.figures: list[dict] = []
        self.search_seconds = 0.0

    def visit(self, index: int, layer: nn.Module) -> None:
        """Quantize `layer`, the next one, in place; the same on every process."""
        inputs = self.flow.inputs(index) if index <= self.last else None
        restored = index in self.finished
        done = self.finished[index] if restored else None
        if restored:
            self._restore_(index, layer, inputs)
        else:
            done = self._decide_(index, layer, inputs)
        make_equal_(layer)
        self.figures.append(done.figures)
        for observer in self.observers:
            observer.layer_done(index, done, restored)

    def _restore_(self, index: int, layer: nn.Module, inputs: LayerInputs | None) -> None:
        if inputs is not None:
            inputs.advance_teacher_(layer)
        state = self.finished[index].state.to(self.device)
        build_(layer, self.spec.at(index), state, self.settings, self.dtype, self.observers)
        if inputs is not None:
            inputs.advance_(layer)
            for observer in self.observers:
                observer.layer_restored(layer, inputs.kwargs)

    def _decide_(self, index: int, layer: nn.Module, inputs: LayerInputs) -> FinishedLayer:
        spec = self.spec.at(index)
        state, report = decide(layer, index, spec, inputs, self.peaks, self.settings, self.observers)
        self.search_seconds += report.search_seconds
        return FinishedLayer(state, report.figures())


class Flow:
    """The activations that travel through the layers: the probe, and with training the samples."""

    def __init__(
        self,
        model: nn.Module,
        spec: DecoderSpec,
        tokens: Tensor,
        settings: QuantSettings,
        device: torch.device,
        allocate: Allocate | None = None,
        observers: Sequence[Observer] = (),
    ):
        allocate = allocate or memory_of(home_of(model))
        calls = layer_calls(model, spec, tokens, device, allocate)
        for observer in observers:
            observer.samples(calls.hidden, device)
        self.kwargs, self.device = calls.kwargs, device
        teacher = student = None
        if settings.needs_samples:
            # of every batch that is trained on, else of all samples, each process has its part
            batch_size = settings.training.batch_size if settings.training is not None else len(tokens)
            student = own_part_of(calls.hidden, batch_size, allocate)
        if settings.needs_teacher:
            teacher = student
            student = allocate(teacher.shape, teacher.dtype).copy_(teacher)
        probe = make_probe(calls.hidden, settings.probe).to(device)
        self.current = LayerInputs(probe, {}, teacher, student, len(tokens), allocate)

    def inputs(self, index: int) -> LayerInputs:
        """The inputs of layer `index`, after all layers before it have advanced them."""
        self.current.kwargs = to_device(self.kwargs[index], self.device)
        return self.current


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


def check_shapes(model: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> None:
    """Raise InputError, naming the linear, if block or group sizes do not divide a width. Needs shapes, no weights."""
    check_widths(settings, linear_widths(model, spec))
    check_heads(settings, spec.decoder_layers(model)[0].get_submodule(spec.attention).head_dim)


def other_blocks(model: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> str | None:
    """In a line, where the usual block size makes way for another, and for which; None where it does not.

    It needs shapes, no weights, that `check_shapes` has nothing against.
    """
    rotation, idle = settings.rotation, settings.bits.untouched or settings.transform is Transform.NONE
    if idle or rotation.block_size != USUAL_BLOCK:
        return None
    # the first linear of each such width
    first = {width: name for name, width in reversed(linear_widths(model, spec).items()) if width % USUAL_BLOCK}
    parts = [f"{rotation.block_size_for(width)} for {width} channels ({first[width]}, …)" for width in sorted(first)]
    return f"block size {USUAL_BLOCK} does not divide every width: it is {', '.join(parts)}" if parts else None


def linear_widths(model: nn.Module, spec: DecoderSpec) -> dict[str, int]:
    """Input channels of every linear that is quantized, by full name."""
    return {
        spec.linear_key(index, path): layer.get_submodule(path).in_features
        for index, layer in enumerate(spec.decoder_layers(model))
        for group in spec.at(index).groups
        for path in group.linears
    }
