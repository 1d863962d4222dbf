"""What calibration samples decide for the input of a group of linears: its mean, the base of its format, its clip."""

from dataclasses import replace

import torch
from torch import nn

from duquant.quantizer import make_quantizer
from duquant.scheme import SEARCHED, number_format
from duquant.transform import DualTransform
from quantize.clipping import search_activation_ratio
from quantize.samples import GroupRows, mean_of, peak_of
from quantize.settings import QuantSettings
from quantize.state import GroupState

CLIP_ROWS = 2048  # of the input, on which its clip ratio is searched


def fit_input(state: GroupState, rows: GroupRows, transform: DualTransform, settings: QuantSettings) -> GroupState:
    """`state` with the shift, the base and the clip ratios of the group's input that its `rows` ask for."""
    scheme = settings.scheme.input
    state = measure_input(state, rows, transform, settings)
    shift = state.shift
    if scheme.quantized and scheme.clip == SEARCHED:
        some = transform(rows.some(CLIP_ROWS))
        some = some if shift is None else some - shift
        some = some / some.norm(dim=1, keepdim=True).clamp(min=1e-12)  # each token's error beside its own length
        ratio = search_activation_ratio(some, make_quantizer(scheme, nn.Identity()))
        state = replace(state, ratios=torch.tensor([ratio, ratio], device=some.device))
    return state


def measure_input(state: GroupState, rows: GroupRows, transform: DualTransform, settings: QuantSettings) -> GroupState:
    """`state` with the mean of the group's transformed input, and the base of its format, where these are asked for."""
    scheme = settings.scheme.input
    if not scheme.quantized:
        return state
    form = number_format(scheme)
    if settings.extras.channel_shift:
        state = replace(state, shift=mean_of(map(transform, rows.parts())))
    if form.has_base:
        moved = (transform(x) if state.shift is None else transform(x) - state.shift for x in rows.parts())
        state = replace(state, base=form.base_of(peak_of(moved).amax()[None]))
    return state
