"""Recording what quantization does to a layer, on one real sample, small enough to keep for all layers.

Knows tensors, not pictures; `reporting/` draws what is written here. Nothing that is recorded changes a result.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duquant.linear import GroupInput
from duquant.tensors import widen
from duquant.transform import DualTransform, rotate_blocks
from quantize.observe import capture_rows, layer_output
from quantize.observer import Observer
from quantize.rounding import OpenLinear
from quantize.spec import DecoderSpec, InputGroup
from quantize.training import INITIAL_LOGIT
from quantize.transforms import channel_peak
from quantize.unrounded import HEADS, Part, left_unrounded
from utils.io import file_digest, write_tensors

MOST_TOKENS, MOST_CHANNELS = 64, 256  # bins of a landscape
ATTENTION, EVERYTHING = "queries, keys and values", "all activations"  # parts that can go unrounded
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # of learned clip ratios
logger = logging.getLogger(__name__)


class Recorder(Observer):
    """Follows one calibration sample through the layers as they are quantized, and writes down what happens to it.

    For layer 12 it writes `layer_012.safetensors` into `folder` (see `_Layer.tensors`) and returns figures for
    results.json, which name that file and its digest. A sample of its own, because the probe that transforms are
    searched on is by default a mean over samples, which no token ever is.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.sample: Tensor | None = None  # [1, T, C], in the quantized network
        self.current: _Layer | None = None

    def samples(self, hidden: Tensor, device: torch.device) -> None:
        """Follow the first of the samples [N, T, C] that enter the first layer."""
        self.sample = hidden[:1].to(device, copy=True)

    def layer_begins(self, layer: nn.Module, index: int, spec: DecoderSpec, kwargs: dict) -> None:
        """Before anything is done to `layer`: its output in full precision, and its weights as they were."""
        self.current = _Layer(index, layer_output(layer, self.sample, kwargs), spec)
        for group in spec.groups:
            weight = layer.get_submodule(shown_linear(group)).weight
            self.current.tensors[f"{group.name}/weight/original"] = landscape(weight)
            self.current.groups[group.name] = {
                "linear": shown_linear(group),
                "weight_shape": list(weight.shape),
                "weight_stages": [extreme(weight)],
            }

    def searched(self, group: InputGroup, peaks: Sequence[Tensor]) -> None:
        """The trajectory of every greedy search of a group: max − min of the probe at the start and after each step."""
        for number, trace in enumerate(peaks, start=1):
            self.current.tensors[f"{group.name}/search/rotation {number}"] = trace.float()
        searches = [
            {"kept_step": int(trace.argmin()), "start": trace[0].item(), "kept": trace.min().item()} for trace in peaks
        ]
        self.current.groups[group.name]["searches"] = searches

    def rounding(self, group: InputGroup, path: str, linear: OpenLinear) -> None:
        """The transformed weight, its final clip, and the noise that rounding it adds."""
        if self.current is None:  # a layer that is restored was recorded when it was decided
            return
        layer, quantized = self.current, linear.quantizer(linear.weight)
        layer.add_noise(group.name, linear.weight, quantized)
        if path == shown_linear(group):
            layer.tensors[f"{group.name}/weight/transformed"] = landscape(linear.weight)
            layer.groups[group.name]["weight_stages"].append(extreme(linear.weight))
        if linear.clip is not None:
            layer.ratios.setdefault(group.name, []).append([x.sigmoid().flatten().cpu() for x in linear.clip.logits()])

    def group_built(self, layer: nn.Module, group: InputGroup, kwargs: dict, folded: Tensor | None) -> None:
        """The sample's input through every stage, and the noise of rounding it."""
        x = capture_rows(layer, group.inputs, self.sample, kwargs)
        shared = layer.get_submodule(group.linears[0]).group
        stages = stages_of(x, shared.transform, folded)
        whole = x.dim() == 3 and x.shape[1] == self.sample.shape[1]
        figures = self.current.groups[group.name] | {"rows": "token" if whole else "row", "shape": list(_rows(x).shape)}
        block = shared.transform.rotations.shape[-1] if len(shared.transform.rotations) else None
        figures["stages"] = [{"name": name, **extreme(stage), **blocks(stage, block)} for name, stage in stages.items()]
        for name, stage in stages.items():
            self.current.tensors[f"{group.name}/input/{name}"] = landscape(stage)
            if block:
                self.current.tensors[f"{group.name}/blocks/{name}"] = block_peaks(stage, block)
        shown = layer.get_submodule(shown_linear(group))
        figures["activation_noise"] = {}
        for name, noisy in rounded_inputs(stages, shared, folded).items():
            output, error = output_and_noise(stages, noisy, shown)
            errors = token_error(output, error)
            self.current.tensors[f"{group.name}/error/{name}"] = errors.cpu()
            figures["activation_noise"][name] = {"sqnr_db": sqnr_db(output, error), **spread(errors)}
        self.current.groups[group.name] = figures

    def layer_built(self, layer: nn.Module, kwargs: dict) -> dict:
        """Advance the sample through the quantized layer, write the file, and return the layer's figures.

        A file that cannot be written has no digest: that costs the report this layer, not the run its results.
        """
        current, output = self.current, layer_output(layer, self.sample, kwargs)
        figures = {
            "output_error": relative_error(current.reference, output),
            "output_sqnr_db": sqnr_db(current.reference, output - current.reference),
            "unrounded": self._unrounded(layer, kwargs),
            "groups": current.group_figures(),
        }
        self.sample, self.current = output, None
        path = self.folder / f"layer_{current.index:03d}.safetensors"
        try:
            write_tensors(path, current.tensors, {"layer": str(current.index)})
            digest = file_digest(path)
        except OSError as error:
            logger.warning("layer %d: not in the report (%s)", current.index, error)
            digest = None
        return {"recorded": {"file": path.name, "sha256": digest, **figures}}

    def _unrounded(self, layer: nn.Module, kwargs: dict) -> list[dict]:
        """SQNR of the output if one part of the layer's activations were not rounded, and if none were.

        What noise is left without any is the weights'.
        """
        spec, reference = self.current.spec, self.current.reference
        parts = {f"inputs of {group.name}": Part(inputs=group.linears) for group in spec.groups}
        parts[ATTENTION] = Part(heads=HEADS)
        parts[EVERYTHING] = Part(inputs=tuple(path for group in spec.groups for path in group.linears), heads=HEADS)
        unrounded = []
        for name, part in parts.items():
            with left_unrounded(layer, spec, part):
                noise = layer_output(layer, self.sample, kwargs) - reference
            unrounded.append({"part": name, "output_sqnr_db": sqnr_db(reference, noise)})
        return unrounded

    def layer_restored(self, layer: nn.Module, kwargs: dict) -> None:
        """Advance the sample through a layer that was quantized earlier."""
        self.sample = layer_output(layer, self.sample, kwargs)


class _Layer:
    """What was recorded of one layer so far.

    `tensors`, with G a group's name: `G/input/STAGE` and `G/weight/STAGE` landscapes; `G/blocks/STAGE` [2, blocks] the
    largest and the mean channel peak of every block; `G/search/rotation N` [steps + 1]; `G/error/STAGE` [T].
    """

    def __init__(self, index: int, reference: Tensor, spec: DecoderSpec):
        self.index, self.reference, self.spec = index, reference, spec
        self.tensors: dict[str, Tensor] = {}
        self.groups: dict[str, dict] = {}
        self.ratios: dict[str, list[list[Tensor]]] = {}
        self.energy: dict[str, Tensor] = {}  # of weights: signal and noise, summed over the linears of a group

    def add_noise(self, group: str, weight: Tensor, quantized: Tensor) -> None:
        """Count one linear's weight and its rounding noise."""
        both = torch.stack([weight.double().square().sum(), (quantized - weight).double().square().sum()])
        self.energy[group] = self.energy.get(group, 0) + both

    def group_figures(self) -> list[dict]:
        """Figures of the groups, in forward order."""
        groups = []
        for name, figures in self.groups.items():
            noise = decibels(*self.energy[name].tolist()) if name in self.energy else None
            groups.append({"name": name, **figures, "weight_sqnr_db": noise, "clip": self._clip(name)})
        return groups

    def _clip(self, group: str) -> dict | None:
        if group not in self.ratios:
            return None
        low, high = (torch.cat(parts).double() for parts in zip(*self.ratios[group], strict=True))
        points = torch.tensor(QUANTILES, dtype=torch.float64)
        sides = {side: torch.quantile(ratios, points).tolist() for side, ratios in (("low", low), ("high", high))}
        return {"start": torch.tensor(INITIAL_LOGIT).sigmoid().item(), "quantiles": list(QUANTILES), **sides}


def shown_linear(group: InputGroup) -> str:
    """The linear whose weight is drawn for the group."""
    return group.representative or group.linears[0]


def stages_of(x: Tensor, transform: DualTransform, folded_scale: Tensor | None) -> dict[str, Tensor]:
    """`x` [..., C], a group's input as it arrives, as it was before smoothing and after every part of the transform."""
    x = widen(x)
    stages = {"input": x}
    if folded_scale is not None:
        stages = {"input": x * folded_scale, "smoothed": x}
    elif transform.scale is not None:
        x = x / transform.scale.to(x.dtype)
        stages["smoothed"] = x
    for index, rotation in enumerate(transform.rotations):
        x = rotate_blocks(x, rotation)
        stages[f"rotation {index + 1}"] = x
        if index < len(transform.permutations):
            x = x[..., transform.permutations[index]]
            stages[f"permutation {index + 1}"] = x
    return stages


def bin_size(count: int, most: int) -> int:
    """Neighbours that share a bin, so that `count` of them make at most `most` bins."""
    return max(1, math.ceil(count / most))


def landscape(x: Tensor) -> Tensor:
    """Largest |entry| in every bin of neighbouring rows and channels of `x` [..., C]: bfloat16, at most 64 × 256."""
    rows = _rows(x)
    kernel = (bin_size(len(rows), MOST_TOKENS), bin_size(rows.shape[1], MOST_CHANNELS))
    pooled = F.max_pool2d(rows.abs().float()[None], kernel, ceil_mode=True)[0]
    return pooled.to(torch.bfloat16).cpu()


def extreme(x: Tensor) -> dict:
    """Where the entry of largest magnitude of `x` [..., C] is, its magnitude, and that over the median magnitude."""
    rows = _rows(x).abs()
    position = int(rows.argmax())
    peak, median = rows.flatten()[position].item(), rows.median().item()
    row, channel = divmod(position, rows.shape[1])
    return {"peak": peak, "row": row, "channel": channel, "peak_to_median": peak / median if median > 0 else None}


def block_peaks(x: Tensor, block_size: int) -> Tensor:
    """The largest and the mean channel peak of every block of `x` [..., C]: [2, C / block_size], float32."""
    peaks = channel_peak(x).float().view(-1, block_size)
    return torch.stack([peaks.amax(dim=1), peaks.mean(dim=1)])


def blocks(x: Tensor, block_size: int | None) -> dict:
    """Variance over blocks of their largest and of their mean channel peak; nothing without a transform."""
    if block_size is None:
        return {}
    largest, mean = block_peaks(x, block_size).double().var(dim=1, correction=0).tolist()
    return {"block_peak_variance": largest, "block_mean_variance": mean}


def rounded_inputs(stages: dict[str, Tensor], shared: GroupInput, folded: Tensor | None) -> dict[str, Tensor]:
    """T(Q(x)Λ⁻¹), what rounding the input as it was would give the rotated weight, and Q(T(xΛ⁻¹)), what it is given."""
    original, transformed = next(iter(stages.values())), list(stages.values())[-1]
    rounded = shared.quantizer(original)
    return {
        "original": shared.transform(rounded if folded is None else rounded / folded),
        "transformed": shared.quantizer(transformed),
    }


def output_and_noise(stages: dict[str, Tensor], noisy: Tensor, linear: nn.Module) -> tuple[Tensor, Tensor]:
    """What `linear` makes of its transformed input, without bias, and what is added to that for `noisy`: [N, O] each.

    Seen behind the weight, because only there inputs before and after the transform can be compared: an outlier channel
    makes up most of the norm of its token, and so hides that all others are rounded away.
    """
    exact, weight = list(stages.values())[-1], linear.weight.to(torch.float32)
    return F.linear(_rows(exact), weight), F.linear(_rows(noisy - exact), weight)


def token_error(output: Tensor, noise: Tensor) -> Tensor:
    """‖noise‖ / ‖output‖ of every row [N, O]: [N], float32; 0 for a row of zeros."""
    return (noise.norm(dim=1) / output.norm(dim=1).clamp(min=1e-30)).float()


def spread(errors: Tensor) -> dict:
    """The median of the errors [N], the largest, and whose that is."""
    at = int(errors.argmax())
    return {"median": errors.median().item(), "worst": errors[at].item(), "worst_row": at}


def relative_error(reference: Tensor, output: Tensor) -> float:
    """‖ŷ − y‖/‖y‖, as in `LayerReport`."""
    return ((output - reference).float().norm() / reference.float().norm()).item()


def sqnr_db(signal: Tensor, noise: Tensor) -> float | None:
    """Signal-to-quantization-noise ratio in dB, summed in float64; None where nothing was rounded."""
    return decibels(signal.double().square().sum().item(), noise.double().square().sum().item())


def decibels(signal: float, noise: float) -> float | None:
    """10 log₁₀(signal / noise) of two energies; None without noise or signal."""
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
