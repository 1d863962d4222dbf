"""Settings of the method. Each class checks itself once and names the command-line flag in its error."""

import math
from dataclasses import dataclass
from enum import StrEnum

from utils.errors import InputError

UNQUANTIZED_BITS = 16  # this many bits or more: the tensor is left as it is
AUTO_BLOCK_LIMIT = 128  # what `--block_size auto` does not exceed


class Transform(StrEnum):
    """What is done to an activation beside smoothing; `quantize.transform.TRANSFORMS` has the builders."""

    DUAL = "dual"  # rotation, permutation, rotation: DuQuant
    ROTATION_PERMUTATION = "rotation_permutation"  # DuQuant without the last rotation
    ROTATION = "rotation"  # the greedy rotation alone
    PERMUTATION = "permutation"  # the zigzag permutation alone
    HADAMARD = "hadamard"  # a Hadamard matrix with random signs per block, not searched
    NONE = "none"  # nothing: round-to-nearest, or smoothing alone

    @property
    def rotates(self) -> bool:
        """Whether it has a rotation; then q and k get a Hadamard of the head too."""
        return self not in (Transform.NONE, Transform.PERMUTATION)

    def permutations(self, times: int) -> int:
        """How many permutations it has under `--permutation_times`; around them are matrices, one more."""
        found = {Transform.DUAL: times, Transform.ROTATION_PERMUTATION: max(1, times), Transform.PERMUTATION: 1}
        return found.get(self, 0)


class SearchRule(StrEnum):
    """Which index the greedy search exchanges with index 0 before it applies the base rotation."""

    CHANNEL = "channel"  # the outlier's channel inside its block (the paper)
    ROW = "row"  # the outlier's row number modulo the block size (the original code)


class RotationOrder(StrEnum):
    """How the base rotation R̃ and the random orthogonal Q = diag(1, q) are combined."""

    RQ = "RQ"  # R̃ Q (the paper): mixes the columns of R̃, so its constant first row is lost
    QR = "QR"  # Q R̃: the first row stays the constant 1/√B


class WeightPeak(StrEnum):
    """Which weights' column peaks enter the smoothing scale."""

    REPRESENTATIVE = "representative"  # q_proj for {q,k,v}, up_proj for {gate,up} (the original code)
    GROUP = "group"  # the maximum over all linears of the group


class GqaSmooth(StrEnum):
    """Where o_proj's smoothing scale goes when query heads share kv heads."""

    ONLINE = "online"  # the activation is divided before o_proj, each channel by its own scale
    FOLD = "fold"  # into v_proj: the query heads of one kv head share their scales


class Probe(StrEnum):
    """The activation on which rotations and permutations are searched."""

    MEAN = "mean"  # the mean over the calibration samples (the original code)
    SAMPLE = "sample"  # a few real samples


def _check_ratio(flag: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise InputError(f"{flag} {value:g}: the clip ratio must be in (0, 1]")


def _check_bits(flag: str, bits: int) -> None:
    if not 2 <= bits <= UNQUANTIZED_BITS:
        raise InputError(f"{flag} {bits}: bits must be between 2 and 16 (16 leaves the tensor unquantized)")


@dataclass(frozen=True)
class BitConfig:
    """Bits and granularity. `group_size` splits a weight row; None means one range per output channel."""

    weight: int = 4
    activation: int = 4
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        _check_bits("--wbits", self.weight)
        _check_bits("--abits", self.activation)
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"--group_size {self.group_size}: must be a positive number of weights")

    @property
    def untouched(self) -> bool:
        """Whether neither weights nor activations are quantized."""
        return min(self.weight, self.activation) >= UNQUANTIZED_BITS


@dataclass(frozen=True)
class ClipConfig:
    """Clip ratios: `--lac` for activations (linear inputs, q, k), `--swc` for weights; None: no clipping.

    `learned` (`--lwc`) trains the clipping of weights instead.
    """

    activation_ratio: float | None = None
    weight_ratio: float | None = None
    learned: bool = False

    def __post_init__(self) -> None:
        _check_ratio("--lac", self.activation_ratio)
        _check_ratio("--swc", self.weight_ratio)
        if self.learned and self.weight_ratio is not None:
            raise InputError("--lwc learns the clipping that --swc fixes: give one of them")


@dataclass(frozen=True)
class TrainingConfig:
    """How `--lwc` trains the clip logits of one layer.

    `augmented` adds the loss against the full-precision layer run on the quantized network's input; `offload` keeps the
    samples on the host and moves them batch by batch.
    """

    epochs: int = 20
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    batch_size: int = 1
    augmented: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise InputError(f"--epochs {self.epochs}: must not be negative")
        if self.learning_rate <= 0:
            raise InputError(f"--lwc_lr {self.learning_rate:g}: must be positive")
        if self.weight_decay < 0:
            raise InputError(f"--wd {self.weight_decay:g}: must not be negative")
        if self.batch_size < 1:
            raise InputError(f"--batch_size {self.batch_size}: must be at least 1")


@dataclass(frozen=True)
class SmoothConfig:
    """`--alpha`: how much of an activation's peak moves into the weights (0 none, 1 all)."""

    alpha: float = 0.5
    weight_peak: WeightPeak = WeightPeak.REPRESENTATIVE
    gqa: GqaSmooth = GqaSmooth.ONLINE

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"--alpha {self.alpha:g}: must be between 0 and 1")


@dataclass(frozen=True)
class RotationConfig:
    """The dual transformation's search. `block_size` None means auto, -1 the whole width."""

    block_size: int | None = 128
    steps: int = 256
    permutation_times: int = 1
    rule: SearchRule = SearchRule.CHANNEL
    order: RotationOrder = RotationOrder.RQ

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size != -1 and self.block_size < 2:
            raise InputError(f"--block_size {self.block_size}: must be at least 2, -1 (the whole width) or auto")
        if self.steps < 0:
            raise InputError(f"--max_rotation_step {self.steps}: must not be negative")
        if self.permutation_times < 0:
            raise InputError(f"--permutation_times {self.permutation_times}: must not be negative")

    def block_size_for(self, channels: int) -> int:
        """Channels per block of an activation with that many channels; it need not divide (see `check_width`)."""
        if self.block_size == -1:
            return channels
        if self.block_size is None:
            return max(size for size in range(1, AUTO_BLOCK_LIMIT + 1) if channels % size == 0)
        return self.block_size


@dataclass(frozen=True)
class QuantConfig:
    """Everything that decides what `quantize_model` does to a model."""

    bits: BitConfig = BitConfig()
    clip: ClipConfig = ClipConfig()
    smooth: SmoothConfig | None = None
    transform: Transform = Transform.DUAL
    rotation: RotationConfig = RotationConfig()
    probe: Probe = Probe.MEAN
    training: TrainingConfig = TrainingConfig()  # used when clip.learned
    seed: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed}: must be between 0 and {2**32 - 1}")

    @property
    def label(self) -> str:
        """Short name of the bit widths, as in the output folder: `w4a4`."""
        group = f"g{self.bits.group_size}" if self.bits.group_size else ""
        return f"w{self.bits.weight}a{self.bits.activation}{group}"


def check_widths(config: QuantConfig, widths: dict[str, int]) -> None:
    """Raise InputError if block or group size does not divide the input channels of a linear (name → channels).

    The error names the linear, and sizes that divide all of them.
    """
    for name, channels in widths.items():
        sizes = {"--group_size": config.bits.group_size}
        if config.transform is not Transform.NONE:
            sizes["--block_size"] = config.rotation.block_size_for(channels)
        for flag, size in sizes.items():
            if size is not None and channels % size:
                fitting = _common_divisors(list(widths.values()), nearest_to=size)
                options = fitting + ["auto"] * (flag == "--block_size")
                advice = f"try {' or '.join(options)}" if options else "no size divides all widths of this model"
                raise InputError(f"{name}: {channels} input channels do not divide by {flag} {size}; {advice}")


def _common_divisors(numbers: list[int], nearest_to: int) -> list[str]:
    common = math.gcd(*numbers)
    divisors = [size for size in range(2, common + 1) if common % size == 0]
    return [str(size) for size in sorted(sorted(divisors, key=lambda size: abs(size - nearest_to))[:3])]
