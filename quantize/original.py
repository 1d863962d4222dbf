"""Reading `duquant_parameters.pth`, the checkpoint of the paper's own code."""

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from quantize.bits import SEARCH
from quantize.build import absorbers
from quantize.refinements import HeadTransform, Rounding
from quantize.rotation_settings import Transform
from quantize.settings import Probe, QuantSettings, SmoothMeasure
from quantize.spec import DecoderSpec, InputGroup, SharedRows
from quantize.state import FinishedLayer, GroupState, LayerState
from utils.errors import InputError

# keys of the smoothing scales by the name of our groups
SCALES = {
    "qkv": "qkv_smooth_scale",
    "o": "out_smooth_scale",
    "gate_up": "fc1_smooth_scale",
    "down": "down_smooth_scale",
}


def read_original(path: Path, model: nn.Module, spec: DecoderSpec, config: QuantSettings) -> dict[int, FinishedLayer]:
    """All layers of a `duquant_parameters.pth`, by index; there are no figures in it.

    Rotations and scales are half precision there and are applied as they are. The file is read with
    `weights_only=True`. Raises InputError if it cannot be read, or is not of this model and these settings, or if these
    need what is not in such a file.
    """
    if beyond := beyond_the_paper(config):
        raise InputError(f"--resume {path}: is of the paper's code, which knows nothing of {', '.join(beyond)}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"--resume {path}: no such file") from None
    except Exception as error:  # unpickling a damaged file raises whatever it stumbles over
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise InputError(f"--resume {path}: cannot be read ({reason})") from None
    layers = spec.decoder_layers(model)
    if not isinstance(saved, dict) or set(saved) != set(range(len(layers))):
        raise InputError(f"--resume {path}: does not have the {len(layers)} layers of this model")
    try:
        states = [layer_state(saved[index], layer, spec.at(index), config) for index, layer in enumerate(layers)]
    except InputError as error:
        raise InputError(f"--resume {path}: {error}") from None
    return {index: FinishedLayer(state, {}) for index, state in enumerate(states)}


def beyond_the_paper(config: QuantSettings) -> tuple[str, ...]:
    """The flags of settings that samples decide and that such a file says nothing of."""
    extras, energy = config.extras, config.smooth is not None and config.smooth.measure is SmoothMeasure.ENERGY
    asked = {
        "--smooth_measure energy": energy,
        "--probe peaks": config.probe is Probe.PEAKS,
        "--rounding gptq": config.rounding.rounding is Rounding.GPTQ,
        "--swc search": config.clip.weight_ratio == SEARCH,
        "--lac search": config.clip.activation_ratio == SEARCH,
        "--head_transform balanced": extras.head_transform is HeadTransform.BALANCED,
        **{f"--{each.name}": True for each in fields(extras) if getattr(extras, each.name) is True},
    }
    return tuple(flag for flag, wanted in asked.items() if wanted)


def layer_state(saved: dict[str, Tensor], layer: nn.Module, spec: DecoderSpec, config: QuantSettings) -> LayerState:
    """Our state of one layer, from the tensors of that layer in the file."""
    if config.transform is not Transform.DUAL:
        raise InputError(f"is of the dual transformation; leave out --transform {config.transform}")
    state = LayerState()
    for group in spec.groups:
        state.groups[group.name] = group_state(saved, layer, group, config)
        for path in group.linears if config.training is not None else ():
            linear = layer.get_submodule(path)
            shape = (linear.out_features, linear.in_features // (config.bits.group_size or linear.in_features))
            keys = [f"{path}.weight_quantizer.{end}bound_factor" for end in ("low", "up")]
            low, high = (_tensor(saved, key, "--lwc or --group_size").float() for key in keys)
            if {low.numel(), high.numel()} != {shape[0] * shape[1]}:
                raise InputError(f"clipping of {path} has {low.numel()} ranges, --group_size asks for {list(shape)}")
            clip_shape = shape if shape[1] == 1 else (*shape, 1)
            state.clips[path] = (low.view(clip_shape), high.view(clip_shape))
    return state


def group_state(saved: dict[str, Tensor], layer: nn.Module, group: InputGroup, config: QuantSettings) -> GroupState:
    """Our state of one input group."""
    channels = layer.get_submodule(group.linears[0]).in_features
    scale = _tensor(saved, SCALES[group.name], "--smooth").float() if config.smooth else None
    if scale is not None and any(isinstance(each, SharedRows) for each in absorbers(group, config.smooth)):
        raise InputError("has a scale for every query head; leave out --gqa_smooth fold")
    rotations = _tensor(saved, f"{group.linears[0]}.act_quantizer.R", "--transform").float()
    permutations = _tensor(saved, f"{group.linears[0]}.act_quantizer.permutation_list", "--transform").long()
    times, block = config.rotation.permutation_times, config.rotation.block_size_for(channels)
    if rotations.shape != (times + 1, block, block):
        raise InputError(
            f"rotations of {group.linears[0]} are {list(rotations.shape)}; --permutation_times and --block_size "
            f"ask for [{times + 1}, {block}, {block}]"
        )
    if permutations.shape[-1] != channels or (scale is not None and scale.shape != (channels,)):
        raise InputError(f"is not of this model: {group.linears[0]} has {channels} input channels")
    if not torch.equal(permutations.sort(dim=-1).values, torch.arange(channels).expand(times, channels)):
        raise InputError(f"does not have {times} permutations of the input of {group.linears[0]}")
    return GroupState(scale, rotations, permutations)


def _tensor(saved: dict[str, Tensor], key: str, flag: str) -> Tensor:
    if not isinstance(saved, dict) or not isinstance(saved.get(key), Tensor):
        raise InputError(f"has no {key}; was it made with another {flag}?")
    return saved[key]
