"""The smoothing scales of a layer, from what is known of its activations and from its weights."""

from collections.abc import Mapping

from torch import Tensor, nn

from quantize.build import absorbers
from quantize.settings import SmoothMeasure, SmoothSettings, WeightPeak
from quantize.smoothing import column_energy, column_peak, smoothing_scale
from quantize.spec import DecoderSpec, InputGroup, SharedRows


def smoothing_scales(
    layer: nn.Module, spec: DecoderSpec, measures: Mapping[str, Tensor], smooth: SmoothSettings
) -> dict[str, Tensor]:
    """The smoothing scale [C] of every group, by name, from the layer's weights as they are now.

    `measures` [C] by group name are of what enters its linears: peaks or energies, as `smooth` says.
    """
    return {group.name: group_scale(layer, group, measures[group.name], smooth) for group in spec.groups}


def group_scale(layer: nn.Module, group: InputGroup, activation: Tensor, smooth: SmoothSettings) -> Tensor:
    """The scale [C] of one group. Energies are weighed against those of all its linears, which read them together."""
    energy = smooth.measure is SmoothMeasure.ENERGY
    alone = smooth.weight_peak is WeightPeak.REPRESENTATIVE and group.representative is not None and not energy
    weights = [layer.get_submodule(path).weight for path in ((group.representative,) if alone else group.linears)]
    weight = column_energy(weights) if energy else column_peak(weights)
    activation = activation.to(weight.device)
    for absorber in absorbers(group, smooth):
        if isinstance(absorber, SharedRows):
            activation, weight = absorber.share(activation), absorber.share(weight)
    return smoothing_scale(activation, weight, smooth.alpha)


def group_peaks(index: int, spec: DecoderSpec, activation_peaks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The peaks [C] of every group's input by its name, from those by full linear name; `index` of the layer."""
    keys = {group.name: group.representative or group.linears[0] for group in spec.groups}
    return {name: activation_peaks[spec.linear_key(index, path)] for name, path in keys.items()}
