"""Settings of what goes beyond the paper: how weights are rounded, exact shifts and rotations, what is searched on."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from utils.errors import InputError
from utils.settings import Changes, option


class Rounding(StrEnum):
    """How a transformed weight becomes codes."""

    NEAREST = "nearest"  # each weight by itself (the paper)
    GPTQ = "gptq"  # column by column, the columns that follow take up the error of the output


class HeadTransform(StrEnum):
    """What q and k are multiplied by behind RoPE."""

    HADAMARD = "hadamard"  # one Hadamard matrix of the head for both (the paper)
    BALANCED = "balanced"  # M and M⁻ᵀ for every kv head, between which q and k share their energy evenly


class Trained(StrEnum):
    """What is trained, layer by layer."""

    CLIPS = "clips"  # the clipping of weights (`--lwc`)
    TRANSFORM = "transform"  # rotations, scales and all clips, from where the search left them


@dataclass(frozen=True)
class RoundingSettings:
    """How weights are rounded once their ranges are known. `damping` and `target` are for GPTQ.

    `damping`: what is added to the diagonal of the Hessian, as a share of its mean. `target`: how far the target of
    the rounding moves from the output on the quantized network's input (0) to that on the full-precision one's (1).
    """

    TITLE: ClassVar[str] = "method, rounding of weights"

    rounding: Rounding = option(
        Rounding.NEAREST,
        "each weight to its nearest code, or column by column so that later columns make up for earlier ones",
        tag="",
        basic="of weights: nearest, or gptq",
    )
    damping: float = option(0.01, "share of its mean added to the Hessian's diagonal", flag="gptq_damping", tag="damp")
    target: float = option(
        0.0,
        "what GPTQ aims at: 0 the output on the quantized network's input, 1 that on the full-precision network's, or "
        "between",
        flag="gptq_target",
        tag="target",
    )

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise InputError(f"--gptq_damping {self.damping:g}: must be in (0, 1]")
        if not 0 <= self.target <= 1:
            raise InputError(f"--gptq_target {self.target:g}: must be between 0 and 1")


@dataclass(frozen=True)
class TuningSettings:
    """What is trained once all layers are quantized, so that logits follow full precision's; no `samples`: nothing."""

    TITLE: ClassVar[str] = "method, tuning of the whole network"

    samples: int = option(
        0,
        "further samples, which the layers are not calibrated on: on each of them once, scales of weights, biases, "
        "norms and clips of all layers are trained together, so that the logits follow full precision's",
        flag="tune_samples",
        changes=Changes.MODEL,
        tag="tune",
    )
    rate: float = option(
        1e-3, "its learning rate, which falls to 0", flag="tune_lr", changes=Changes.MODEL, tag="tune_lr"
    )

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise InputError(f"--tune_samples {self.samples}: must not be negative")
        if self.rate <= 0:
            raise InputError(f"--tune_lr {self.rate:g}: must be positive")


@dataclass(frozen=True)
class ExtraSettings:
    """Shifts and rotations that change nothing before rounding, and cost nothing or next to it."""

    TITLE: ClassVar[str] = "method, exact shifts and rotations"

    channel_shift: bool = option(
        False, "subtract the mean of every linear's input before rounding; what it gave joins the bias", tag="shift"
    )
    key_mean: bool = option(False, "subtract the mean of every key channel before rounding", tag="key_mean")
    value_mean: bool = option(False, "subtract the mean of every value channel before rounding", tag="value_mean")
    value_rotation: bool = option(
        False, "rotate the heads of v, folded into v_proj and o_proj; v is then clipped as k is", tag="value_rotation"
    )
    head_transform: HeadTransform = option(
        HeadTransform.HADAMARD,
        "what q and k are multiplied by: a Hadamard matrix, or matrices that balance them",
        tag="",
    )
