"""Tuning a quantized network as a whole: its logits are made to follow the full-precision network's.

Codes and transforms stay as the layers were given them one by one. What is trained is what surrounds them and costs
nothing to change: scales of weights, biases, norms and the clips of activations. The samples are not those that the
layers were calibrated on, to which they are fitted already. Gradients go back through one layer at a time, which is
run again for that, so that no more is kept than what flows between layers. Ours.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from duquant.formats import IntegerFormat
from duquant.linear import linears_of
from duquant.quantizer import FoundClip
from quantize.descent import Descent
from quantize.observe import advance_, head_logits, layer_calls, layer_output, shell_on_device, tokens_at_once
from quantize.refinements import TuningSettings
from quantize.spec import DecoderSpec
from quantize.training import Batch, Samples, own_part_of
from utils.device import home_of, on_device, to_device
from utils.distributed import own_batches, sum_, world_size
from utils.log import meter
from utils.memory import Allocate, memory_of

logger = logging.getLogger(__name__)
CHECKED = 4  # samples at the end, on which it shows whether anything was gained


@dataclass(frozen=True)
class TuningReport:
    """The KL divergence from full precision in nats a token.

    `loss_before` and `loss_after`: of the last few samples, before all steps and each before its own, so that it has
    not been tuned on. `losses`: of each step's own samples before it; None where that was not finite, and no step was
    made.
    """

    loss_before: float
    loss_after: float
    losses: tuple[float | None, ...]
    seconds: float

    def __str__(self) -> str:
        kept = "" if self.loss_after < self.loss_before else "; nothing was gained, and nothing is changed"
        told = f"KL {self.loss_before:.4f} → {self.loss_after:.4f} nats a token"
        return f"tuned as a whole, {len(self.losses)} steps in {self.seconds:.1f} s: {told}{kept}"


class Teacher:
    """The passenger that finds what the full-precision network makes of this process's part of `tokens` [N, T].

    `hidden` [n, T, C]: behind the layers that were visited.
    """

    def __init__(
        self, model: nn.Module, spec: DecoderSpec, tokens: Tensor, device: torch.device, allocate: Allocate | None
    ):
        calls = layer_calls(model, spec, tokens, device, allocate)
        self.hidden = own_part_of(calls.hidden, world_size(), allocate or memory_of(home_of(model)))
        self.kwargs, self.device = calls.kwargs, device

    def visit(self, index: int, layer: nn.Module) -> None:
        """Go through `layer`, which is in full precision."""
        advance_(layer, self.hidden, self.kwargs[index], self.device)


class TunedLayer:
    """A quantized layer as a function of what is tuned in it, each a change that is 0 at first (`changes`, float32).

    Scales and ratios s become s·exp(δ), biases and gains b become b + δ·rms(b). Nothing of the layer is written over
    before `fold_`.
    """

    def __init__(self, layer: nn.Module, kwargs: dict, device: torch.device):
        self.layer, self.kwargs = layer, kwargs
        self.factors = factors_of(layer)
        self.names = [*self.factors, *(name for name, each in layer.named_parameters() if each.dim() == 1)]
        tensors = self._tensors()
        self.changes = [
            nn.Parameter(torch.zeros(tensors[name].shape, device=device), requires_grad=False) for name in self.names
        ]

    def __call__(self, hidden: Tensor) -> Tensor:
        """The hidden states [N, T, C] that the layer, as it is tuned now, makes of `hidden`; all on its device."""
        tuned = self._tuned()

        def call(*args: Tensor, **kwargs) -> Tensor | tuple:
            # not tied: what linears share has one name here, and put back by several it would not be what it was
            return functional_call(self.layer, tuned, args, kwargs, tie_weights=False)

        return layer_output(call, hidden, to_device(self.kwargs, hidden.device))

    @torch.no_grad()
    def fold_(self) -> None:
        """Make it the layer's own; it may be anywhere."""
        tensors = self._tensors()
        for name, value in self._tuned().items():
            tensors[name].copy_(value)

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.layer.named_buffers()), **dict(self.layer.named_parameters())}

    def _tuned(self) -> dict[str, Tensor]:
        tensors, values = self._tensors(), {}
        for name, change in zip(self.names, self.changes, strict=True):
            own = tensors[name].detach()
            wide, change = own.float(), change.to(own.device)
            if name in self.factors:
                value = torch.minimum(wide * change.exp(), wide.clamp(min=self.factors[name]))
            else:
                value = wide + change * wide.square().mean().sqrt()
            values[name] = value.to(own.dtype)
        return values


def factors_of(layer: nn.Module) -> dict[str, float]:
    """What is tuned in a quantized layer by factors, by name, and how large it may become, if it is not larger already.

    The scales of weights whose format has integers (others have scales of few bits), and the searched clips.
    """
    paths = {module: path for path, module in layer.named_modules()}
    scaled = [each for each in linears_of(layer) if each.plain is None and isinstance(each.format, IntegerFormat)]
    clips = [each for each in layer.modules() if isinstance(each, FoundClip)]
    return {f"{paths[each]}.scale": math.inf for each in scaled} | {f"{paths[each]}.ratios": 1.0 for each in clips}


def tune_(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: Tensor,
    teacher: Tensor,
    settings: TuningSettings,
    device: torch.device,
    allocate: Allocate | None = None,
) -> TuningReport:
    """Tune all layers of the quantized `model` on `tokens` [N, T], each sample once, in place.

    `teacher`: the `Teacher.hidden` of the same tokens; each process has one sample of every step. Minimises KL(full
    precision ‖ quantized) of every token's logits, by Adam whose rate falls to 0 along a cosine. A step that is not
    finite is left out. The last `CHECKED` samples (of fewer than twice as many, half of them) are measured before all
    steps, and before their own, when rates are nearly 0 already; where that is no gain, nothing is changed.
    """
    started, size, allocate = time.perf_counter(), world_size(), allocate or memory_of(home_of(model))
    calls = layer_calls(model, spec, tokens, device, allocate)
    samples = Samples(own_part_of(calls.hidden, size, allocate), (teacher,), len(tokens))
    layers = [TunedLayer(*each, device) for each in zip(spec.decoder_layers(model), calls.kwargs, strict=True)]
    changes = [change for layer in layers for change in layer.changes]
    batches, losses = own_batches(len(tokens), size), []
    steps, checked = len(batches), max(1, min(-(-CHECKED // size), len(batches) // 2))
    optimizer = torch.optim.Adam(changes, lr=settings.rate, betas=(0.9, 0.95))
    descent = Descent(optimizer, device, calls.hidden.dtype is torch.float16, steps)
    with shell_on_device(model, spec, device):
        network = Network(model, spec, layers, device)
        before = network.loss_at_the_end(samples, size, checked)
        with meter(steps, "tuning", "step") as bar:
            for batch in samples.batches(size, device):
                loss, norm = step_(network, batch, descent)
                losses.append(loss if math.isfinite(loss) and math.isfinite(norm) else None)
                bar.set_postfix_str(f"KL {loss:.4f}")
                bar.update()
    own = [math.nan if loss is None else loss for loss in losses[-checked:]]
    after = sum(loss * whole for loss, (_, whole) in zip(own, batches[-checked:], strict=True))
    after /= sum(whole for _, whole in batches[-checked:])
    if after < before:
        for layer in layers:
            layer.fold_()
    kept = after if after < before else before
    report = TuningReport(before, kept, tuple(losses), time.perf_counter() - started)
    logger.info("%s", report)
    return report


@dataclass(frozen=True)
class Network:
    """The layers as they are tuned now, and the head that is behind them on both networks' way to logits."""

    model: nn.Module
    spec: DecoderSpec
    layers: Sequence[TunedLayer]
    device: torch.device

    def loss(self, batch: Batch) -> Tensor:
        """The mean divergence of the batch's tokens."""
        return self._divergence(self._states(batch.inputs)[-1], batch.targets[0], None)[0]

    def gradients_(self, batch: Batch, scale: Tensor) -> Tensor:
        """The loss of a batch; `scale` times its gradients are added to those of the changes."""
        states = self._states(batch.inputs)
        loss, gradient = self._divergence(states.pop(), batch.targets[0], scale)
        for layer, state in zip(reversed(self.layers), reversed(states), strict=True):
            state = state.detach().requires_grad_()
            with on_device(layer.layer, self.device), torch.enable_grad():
                torch.autograd.backward(layer(state), gradient)
            gradient = state.grad
        return loss

    @torch.no_grad()
    def loss_at_the_end(self, samples: Samples, batch_size: int, checked: int) -> float:
        """The loss over the samples of the last `checked` batches."""
        total, counted = torch.zeros((), device=self.device, dtype=torch.float64), 0
        sizes = own_batches(samples.total, batch_size)
        for number, (batch, (_, whole)) in enumerate(zip(samples.batches(batch_size, self.device), sizes, strict=True)):
            if number < len(sizes) - checked:
                continue
            counted += whole
            if batch.share > 0:
                total += self.loss(batch).double() * batch.share * whole
        sum_([total])
        return total.item() / counted

    @torch.no_grad()
    def _states(self, hidden: Tensor) -> list[Tensor]:
        states = [hidden]
        for layer in self.layers:
            with on_device(layer.layer, self.device):
                states.append(layer(states[-1]))
        return states

    def _divergence(self, hidden: Tensor, teacher: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The mean divergence of tokens, given by what the last layers made of them; `scale` times its gradient."""
        tokens, size = hidden.shape[0] * hidden.shape[1], tokens_at_once(self.model.config.vocab_size)
        loss, pieces = torch.zeros((), device=hidden.device), []
        for own, wanted in zip(hidden.split(size, dim=1), teacher.split(size, dim=1), strict=True):
            own = own.detach().requires_grad_(scale is not None)
            with torch.set_grad_enabled(scale is not None):
                part = divergence(self._logits(own), self._logits(wanted).detach()) / tokens
            if scale is not None:
                pieces += torch.autograd.grad(part * scale, own)
            loss += part.detach()
        return loss, torch.cat(pieces, dim=1) if pieces else None

    def _logits(self, hidden: Tensor) -> Tensor:
        nowhere = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)  # only their number counts
        return head_logits(self.model, self.spec, nowhere, hidden).float()


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """The sum over tokens of KL(P ‖ Q) in nats, of `wanted` logits of P and `logits` of Q [N, T, vocabulary]."""
    return F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")


def step_(network: Network, batch: Batch, descent: Descent) -> tuple[float, float]:
    """One optimizer step: (loss, gradient norm) before it; none is made if one of them is not finite."""
    for change in descent.parameters:
        change.requires_grad_(True)

    def backward(scale: Tensor) -> Tensor:
        return batch.share * network.gradients_(batch, batch.share * scale)

    return descent.step(backward if batch.share > 0 else None)
