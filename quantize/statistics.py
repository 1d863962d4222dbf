"""Per-channel activation statistics of the full-precision model: computing them, and the files they are kept in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from duquant.tensors import extremes
from quantize.observe import advance_, layer_calls, require_finite
from quantize.spec import DecoderSpec, InputGroup
from quantize.walk import fit_, layers_in_memory, walk
from utils.batching import BatchSize
from utils.distributed import gather, own_part
from utils.errors import InputError
from utils.io import read_tensors, write_tensors
from utils.memory import Allocate, all_finite

MIDPOINT_DECAY = 0.99


@dataclass(frozen=True)
class ChannelStatistics:
    """Per linear, by full name, on the host: `scales` [C], the largest |x|, and `shifts` [C], the running midpoint."""

    scales: dict[str, Tensor]
    shifts: dict[str, Tensor]


@dataclass
class Seen:
    """What entered the linears of one group in one layer: the largest |x| [C], and each sample's midpoint [C].

    What is observed counts when it is `settled`: a batch that runs out of memory half-way is run again, in parts.
    """

    peak: Tensor | None = None
    midpoints: list[Tensor] = field(default_factory=list)
    unsettled: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # peak [C] and midpoints [batch, C] of calls

    def observe(self, x: Tensor) -> None:
        """Take in `x`: samples [batch, T, C], or rows [T, C] without their samples."""
        samples = x[None] if x.dim() == 2 else x.flatten(1, -2)
        low, high = (each.float() for each in extremes(samples, dim=1))  # [batch, C] each
        self.unsettled.append((torch.maximum(high, -low).amax(dim=0), (high + low) / 2))

    def settle(self) -> None:
        """Count what was observed since the last time."""
        for peak, midpoints in self.unsettled:
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
            self.midpoints.append(midpoints)
        self.unsettled.clear()

    def on_host(self) -> "Seen":
        """The same with its tensors on the host."""
        return Seen(self.peak.cpu(), [torch.cat(self.midpoints).cpu()]) if self.midpoints else self


class Observation:
    """The passenger that gathers `statistics` of every linear's input over calibration `tokens` [N, T].

    The midpoint (max + min)/2 of each sample enters with weight 0.01, the first sample with weight 1. Rows that an
    expert is given without their samples count as one sample. Linears of one group have the same statistics. Several
    processes share the samples, and all have the statistics of all. A visit raises InputError if an activation is not
    finite.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: DecoderSpec,
        tokens: Tensor,
        device: torch.device,
        allocate: Allocate | None = None,
    ):
        self.spec, self.device = spec, device
        # as many samples at a time as a GPU has room for, which test windows have too: see `experiment.estimate`
        self.batches = BatchSize.choose(None, tokens.shape[1], device) if device.type == "cuda" else None
        self.calls = layer_calls(model, spec, own_part(tokens), device, allocate)
        self.statistics = ChannelStatistics({}, {})

    def visit(self, index: int, layer: nn.Module) -> None:
        """Observe `layer`, which is in full precision, and go on behind it."""
        if self.batches is not None:
            fit_(self.batches, layer, self.spec.at(index), self.calls.hidden, self.device)
        with observed(layer, index, self.spec, self.statistics):
            advance_(layer, self.calls.hidden, self.calls.kwargs[index], self.device, self.batches)


def channel_statistics(model: nn.Module, spec: DecoderSpec, tokens: Tensor, device: torch.device) -> ChannelStatistics:
    """The walk with `Observation` alone; see there."""
    observation = Observation(model, spec, tokens, device)
    layers = layers_in_memory(model, spec, device)
    walk(layers, [observation], len(spec.decoder_layers(model)), "activation statistics")
    return observation.statistics


@contextmanager
def observed(layer: nn.Module, index: int, spec: DecoderSpec, statistics: ChannelStatistics) -> Iterator[None]:
    """Behind the block, what entered the linears of `layer`, number `index`, on any process is in the `statistics`."""
    groups = spec.at(index).groups
    seen = {group.name: Seen() for group in groups}

    def watch(group: InputGroup, path: str) -> RemovableHandle:
        return layer.get_submodule(path).register_forward_pre_hook(
            lambda module, args: seen[group.name].observe(args[0])
        )

    def forget(*call: object) -> None:
        for each in seen.values():
            each.unsettled.clear()

    def settle(*call: object) -> None:
        for each in seen.values():
            each.settle()

    handles = [watch(group, path) for group in groups for path in group.inputs]
    # what a call of the layer that did not come to its end has observed is observed again
    handles += [layer.register_forward_pre_hook(forget), layer.register_forward_hook(settle)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    everywhere = gather({name: each.on_host() for name, each in seen.items()})
    for group in groups:
        parts = [part[group.name] for part in everywhere if part[group.name].midpoints]
        peak = torch.stack([part.peak for part in parts]).amax(dim=0)
        require_finite(peak, spec.linear_key(index, group.linears[0]))  # NaN and inf come through to here
        shift = running_midpoint(torch.cat([part.midpoints[0] for part in parts]))
        for linear in group.linears:
            name = spec.linear_key(index, linear)
            statistics.scales[name], statistics.shifts[name] = peak, shift


def running_midpoint(midpoints: Tensor) -> Tensor:
    """Exponential average over samples [N, C], the first of which enters with weight 1, the others with 0.01: [C]."""
    average = midpoints[0]
    for midpoint in midpoints[1:]:
        average = MIDPOINT_DECAY * average + (1 - MIDPOINT_DECAY) * midpoint
    return average


@dataclass(frozen=True)
class Origin:
    """What statistics were made from, stored with them: two fingerprints, and the model's name for people."""

    model_name: str
    model: str
    data: str

    def metadata(self) -> dict[str, str]:
        """As the metadata of a safetensors file."""
        return {"model_name": self.model_name, "model": self.model, "data": self.data}


def save_statistics(statistics: ChannelStatistics, scales_path: Path, shifts_path: Path, origin: Origin) -> None:
    """Write the two files, atomically: float32 tensors under the linears' full names."""
    write_tensors(scales_path, statistics.scales, origin.metadata())
    write_tensors(shifts_path, statistics.shifts, origin.metadata())


def same_calibration(path: Path, origin: Origin) -> bool:
    """Whether the statistics at `path` were made from this model and this calibration data."""
    _, metadata = read_tensors(path)
    return all(metadata.get(key) == origin.metadata()[key] for key in ("model", "data"))


def load_scales(path: Path, origin: Origin, skeleton: nn.Module, spec: DecoderSpec) -> dict[str, Tensor]:
    """The scales [C] by linear name from a file, which must be of this model; calibration data may differ.

    Raises InputError if the file is not safetensors, says it is of another model, or lacks a linear or has another
    width for it, as `skeleton` (the model, with or without weights) tells.
    """
    scales, metadata = read_tensors(path)
    if metadata.get("model", origin.model) != origin.model:
        made_of = metadata.get("model_name", "another model")
        raise InputError(
            f"--act-scales {path}: made of {made_of}, not of the weights of {origin.model_name}; "
            "leave the flag out to have them computed, or run generate_act_scale_shift.py for this model"
        )
    for index, layer in enumerate(spec.decoder_layers(skeleton)):
        for group in spec.at(index).groups:
            for linear in group.linears:
                name, width = spec.linear_key(index, linear), layer.get_submodule(linear).in_features
                scale = scales.get(name)
                if scale is None or scale.shape != (width,):
                    problem = "is missing" if scale is None else f"has shape {list(scale.shape)}, not [{width}]"
                    raise InputError(f"--act-scales {path}: not of this model ({name} {problem})")
                if not all_finite(scale):
                    raise InputError(f"--act-scales {path}: {name} contains NaN or inf; make the file again")
    return {name: scale.float() for name, scale in scales.items()}
