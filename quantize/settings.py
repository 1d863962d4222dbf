"""Settings of the method. Each class checks itself once and names the command-line flag in its error.

A setting is one field here: flag, help, JSON, identity and the run's folder follow from it (see `utils.settings`).
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from quantize.refinements import (
    LARGEST_BLOCK_RATIO,
    SEARCH,
    ExtraSettings,
    Format,
    FormatSettings,
    HeadTransform,
    Ratio,
    Rounding,
    RoundingSettings,
    Trained,
    check_format,
)
from utils.errors import InputError
from utils.settings import NONE, Changes, option, part

if TYPE_CHECKING:
    from duquant.scheme import Scheme

UNQUANTIZED_BITS = 16  # as in `duquant.scheme`, which is not imported for a flag: transformers loads for seconds
USUAL_BLOCK = 128  # the paper's block size
AUTO_BLOCK_LIMIT = 128  # what `--block_size auto` does not exceed


class Transform(StrEnum):
    """What is done to an activation beside smoothing; `quantize.transforms.TRANSFORMS` has the builders."""

    DUAL = "dual"  # rotation, permutation, rotation: DuQuant
    ROTATION_PERMUTATION = "rotation_permutation"  # DuQuant without the last rotation
    PERMUTE_ROTATE = "permute_rotate"  # the permutation, folded upstream, then one greedy rotation
    ROTATION = "rotation"  # the greedy rotation alone
    PERMUTATION = "permutation"  # the zigzag permutation alone
    TWO_HADAMARD = "two_hadamard"  # two of them, and between them a permutation that deals every block to all blocks
    HADAMARD = "hadamard"  # a Hadamard matrix with random signs per block, not searched
    NONE = "none"  # nothing: round-to-nearest, or smoothing alone

    @property
    def rotates(self) -> bool:
        """Whether it has a rotation; then q and k get a Hadamard of the head too."""
        return self not in (Transform.NONE, Transform.PERMUTATION)

    @property
    def orders_channels(self) -> bool:
        """Whether channels are put into another order upstream, where that is exact."""
        return self is Transform.PERMUTE_ROTATE

    def permutations(self, times: int) -> int:
        """How many permutations it has under `--permutation_times` that are applied to activations."""
        counts = {Transform.DUAL: times, Transform.ROTATION_PERMUTATION: max(1, times), Transform.PERMUTATION: 1}
        counts[Transform.TWO_HADAMARD] = 1
        return counts.get(self, 0)

    def rotations(self, times: int) -> int:
        """How many matrices it has: one before, between and behind the permutations, if need be the identity."""
        return 0 if self is Transform.NONE else self.permutations(times) + 1

    def searches(self, times: int) -> int:
        """How many of its matrices are searched greedily."""
        counts = {Transform.DUAL: times + 1, Transform.ROTATION_PERMUTATION: max(1, times)}
        counts |= {Transform.ROTATION: 1, Transform.PERMUTE_ROTATE: 1}
        return counts.get(self, 0)


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


class SmoothMeasure(StrEnum):
    """What of the activations and of the weights is balanced by the smoothing scale."""

    PEAK = "peak"  # the largest magnitudes (the paper)
    ENERGY = "energy"  # the root of the mean square: what is left to balance where a rotation spreads the peaks


class GqaSmooth(StrEnum):
    """Where o_proj's smoothing scale goes when query heads share kv heads."""

    ONLINE = "online"  # the activation is divided before o_proj, each channel by its own scale
    FOLD = "fold"  # into v_proj: the query heads of one kv head share their scales


class SymmetricRange(StrEnum):
    """Which codes of b bits a symmetric range uses."""

    RESTRICTED = "restricted"  # as many on either side of 0: the peak is 2^(b−1) − 1 steps away
    FULL = "full"  # all of them: the peak is (2^b − 1)/2 steps away, the arithmetic of compressed-tensors


class Probe(StrEnum):
    """The activation on which rotations and permutations are searched."""

    MEAN = "mean"  # the mean over the calibration samples (the original code)
    SAMPLE = "sample"  # a few real samples
    PEAKS = "peaks"  # of all samples in the quantized network, the tokens with the largest magnitudes


def clip_ratio(text: str) -> Ratio:
    """What `--lac` and `--swc` say: a number, SEARCH, or `none`, which takes out what a preset has."""
    if text == NONE:
        return None
    try:
        return text if text == SEARCH else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {SEARCH}") from None


def _check_ratio(flag: str, value: Ratio) -> None:
    if isinstance(value, str):
        if value != SEARCH:
            raise InputError(f"{flag} {value}: must be a number in (0, 1] or {SEARCH}")
    elif value is not None and not 0 < value <= LARGEST_BLOCK_RATIO:
        raise InputError(f"{flag} {value:g}: the clip ratio must be in (0, 1]")


def _check_bits(flag: str, bits: int | None) -> None:
    if bits is not None and not 2 <= bits <= UNQUANTIZED_BITS:
        raise InputError(f"{flag} {bits}: bits must be between 2 and 16 (16 leaves the tensor unquantized)")


def _check_group(flag: str, size: int | None) -> None:
    if size is not None and size < 1:
        raise InputError(f"{flag} {size}: must be a positive number of channels")


def check_seed(flag: str, seed: int) -> None:
    """Raise InputError for a number that seeds no generator."""
    if not 0 <= seed < 2**32:
        raise InputError(f"{flag} {seed}: must be between 0 and {2**32 - 1}")


def seed_option() -> int:
    """The field of every class that has a seed."""
    return option(2, "of the samples drawn and of the random rotations", tag="seed", title="calibration")


@dataclass(frozen=True)
class BitSettings:
    """Bits and granularity by role. `query`, `key` and `value` are those of `activation` where they are None."""

    TITLE: ClassVar[str] = "method, quantization"

    weight: int = option(4, "bits of weights, 2 to 16; 16 leaves them alone", flag="wbits", tag="w", basic=True)
    activation: int = option(
        16, "bits of linears' inputs, and of q, k and v, 2 to 16", flag="abits", tag="a", basic=True
    )
    group_size: int | None = option(None, "weights per range (default: a whole output channel)", tag="g", basic=True)
    symmetric: bool = option(
        False, "symmetric weight quantization", flag=("symmetric", "weight_symmetric"), tag="symmetric"
    )
    query: int | None = option(None, "bits of queries (default: --abits)", flag="qbits", tag="q")
    key: int | None = option(None, "bits of keys (default: --abits)", flag="kbits", tag="k")
    value: int | None = option(None, "bits of values (default: --abits)", flag="vbits", tag="v")
    act_group_size: int | None = option(
        None, "channels of a linear's input per range (default: the whole token)", tag="ag"
    )
    act_symmetric: bool = option(False, "symmetric quantization of linears' inputs, q, k and v", tag="symmetric_act")
    symmetric_range: SymmetricRange = option(
        SymmetricRange.RESTRICTED,
        "codes of symmetric ranges: restricted, of 4 bits −7 … 7 in steps of peak/7; or full, −8 … 7 in steps of "
        "peak/7.5, as compressed-tensors and vLLM compute",
        tag="range_",
    )

    def __post_init__(self) -> None:
        for flag, bits in (("w", self.weight), ("a", self.activation), ("q", self.query)):
            _check_bits(f"--{flag}bits", bits)
        _check_bits("--kbits", self.key)
        _check_bits("--vbits", self.value)
        _check_group("--group_size", self.group_size)
        _check_group("--act_group_size", self.act_group_size)

    @property
    def full_range(self) -> bool:
        """Whether symmetric ranges use all codes."""
        return self.symmetric_range is SymmetricRange.FULL

    @property
    def attention(self) -> dict[str, int]:
        """Bits of q, k and v by role."""
        roles = {"query": self.query, "key": self.key, "value": self.value}
        return {role: self.activation if bits is None else bits for role, bits in roles.items()}

    @property
    def untouched(self) -> bool:
        """Whether nothing is quantized."""
        return min(self.weight, self.activation, *self.attention.values()) >= UNQUANTIZED_BITS


@dataclass(frozen=True)
class ClipSettings:
    """Clip ratios: `activation_ratio` for linear inputs, q and k, `weight_ratio` for weights; None: no clipping.

    `kv_ratio` is for k, in place of `activation_ratio`, and for v, which has none otherwise. SEARCH in place of a ratio
    means that calibration data decide: for every range of weights, for the inputs of every group, for q, k and v of
    every layer.
    """

    TITLE: ClassVar[str] = "method, quantization"

    activation_ratio: Ratio = option(
        None,
        "clip ratio of linears' inputs, q and k, in (0, 1]; or search: found for each of them, and for v, on "
        "calibration data (default: no clipping)",
        flag="lac",
        tag="lac",
        basic="clip ratio of linears' inputs, q and k, in (0, 1], or search",
        type=clip_ratio,
        metavar="RATIO|search",
    )
    weight_ratio: Ratio = option(
        None,
        "clip ratio of weights in (0, 1]; or search: both ends of every range on calibration data (default: no "
        "clipping)",
        flag="swc",
        tag="swc",
        basic="clip ratio of weights in (0, 1], or search",
        type=clip_ratio,
        metavar="RATIO|search",
    )
    kv_ratio: float | None = option(
        None, "clip ratio of k and v (default: --lac for k, no clipping for v)", flag="lac_kv", tag="lac_kv"
    )

    def __post_init__(self) -> None:
        _check_ratio("--lac", self.activation_ratio)
        _check_ratio("--swc", self.weight_ratio)
        _check_ratio("--lac_kv", self.kv_ratio)


@dataclass(frozen=True)
class TrainingSettings:
    """What is trained in one layer, and how. `train` None is what `--lwc` says: the clip logits of weights.

    `learning_rate` and `weight_decay` are those of clip logits alone; the other rates are for `--train transform`, and
    fall to 0. `augmented` adds the loss against the full-precision layer run on the quantized
    network's input; `offload` keeps the samples on the host and moves them batch by batch.
    """

    TITLE: ClassVar[str] = "method, training"

    train: Trained | None = option(
        None, "what is trained: the clipping of weights (as --lwc), or rotations, scales and all clips", tag=""
    )
    epochs: int = option(20, "passes over the calibration samples per layer", tag="epochs")
    learning_rate: float = option(1e-2, "learning rate", flag="lwc_lr", tag="lr")
    weight_decay: float = option(0.0, "weight decay", flag="wd", tag="wd")
    batch_size: int = option(1, "samples per step", tag="batch")
    rotation_rate: float = option(1e-2, "learning rate of rotations", flag="rotation_lr", tag="rotation_lr")
    scale_rate: float = option(5e-3, "learning rate of smoothing scales", flag="scale_lr", tag="scale_lr")
    clip_rate: float = option(2e-2, "learning rate of clips beside rotations", flag="clip_lr", tag="clip_lr")
    fixed_input_clips: bool = option(
        False,
        "with --train transform: learn no clip of linears' inputs, whose ranges are then whole or as --lac says",
        tag="fixed_input_clips",
    )
    augmented: bool = option(
        False, "also compare with the full-precision layer on the quantized input", flag="aug_loss", tag="aug_loss"
    )
    offload: bool = option(
        False,
        "keep the samples on the host, even if the GPU has room",
        flag="offload_calibration",
        changes=Changes.NOTHING,
    )

    def __post_init__(self) -> None:
        if self.train is Trained.CLIPS:  # one setting has one name
            object.__setattr__(self, "train", None)
        for flag, rate in (("rotation", self.rotation_rate), ("scale", self.scale_rate), ("clip", self.clip_rate)):
            if rate <= 0:
                raise InputError(f"--{flag}_lr {rate:g}: must be positive")
        if self.epochs < 0:
            raise InputError(f"--epochs {self.epochs}: must not be negative")
        if self.learning_rate <= 0:
            raise InputError(f"--lwc_lr {self.learning_rate:g}: must be positive")
        if self.weight_decay < 0:
            raise InputError(f"--wd {self.weight_decay:g}: must not be negative")
        if self.batch_size < 1:
            raise InputError(f"--batch_size {self.batch_size}: must be at least 1")


@dataclass(frozen=True)
class SmoothSettings:
    """`alpha`: how much of an activation's peak moves into the weights (0 none, 1 all)."""

    TITLE: ClassVar[str] = "method, smoothing"

    alpha: float = option(0.5, "how much of a peak moves, 0 to 1", tag="alpha", basic=True)
    weight_peak: WeightPeak = option(
        WeightPeak.REPRESENTATIVE,
        "weights whose peaks enter the scale: of q_proj and up_proj, or of all linears of a group",
        flag="smooth_weight_peak",
        tag="peak_of_",
    )
    gqa: GqaSmooth = option(
        GqaSmooth.ONLINE,
        "o_proj's scale where query heads share kv heads: online divides the activation, fold lets the heads of one kv "
        "head share it, so that v_proj takes it",
        flag="gqa_smooth",
        tag="gqa_",
    )
    measure: SmoothMeasure = option(
        SmoothMeasure.PEAK,
        "what alpha divides between activations and weights: their peaks, or their energies (root of the mean square "
        "in the quantized network, over all linears of a group)",
        flag="smooth_measure",
        tag="",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"--alpha {self.alpha:g}: must be between 0 and 1")


class GivenSize(int):
    """A block size that was named on the command line, and so must divide every width.

    Where it does, it is its number: in comparisons, in JSON, in identities and in names of folders.
    """


def _number_or(word: str, kind: type[int]) -> Callable[[str], int | None]:
    """Reads a flag's value: a number, or None for the `word`."""

    def read(text: str) -> int | None:
        if text != word and not text.lstrip("-").isdigit():
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {word}")
        return None if text == word else kind(text)

    return read


@dataclass(frozen=True)
class RotationSettings:
    """The dual transformation's search. `block_size` None means auto, -1 the whole width.

    The default, unless a `GivenSize` names it, is auto for the widths that it does not divide.
    """

    TITLE: ClassVar[str] = "method, rotation and permutation"

    block_size: int | None = option(
        USUAL_BLOCK,
        "channels per block; -1: the whole width; auto: at most 128 (default: 128, and auto for a width that it does "
        "not divide)",
        tag="b",
        basic="channels per block, or auto (default: 128)",
        type=_number_or("auto", GivenSize),
    )
    steps: int = option(256, "greedy steps per rotation", flag="max_rotation_step", tag="steps")
    permutation_times: int = option(1, "(rotation, permutation) pairs before the last", tag="p")
    rule: SearchRule = option(
        SearchRule.CHANNEL,
        "what a step exchanges: the outlier's channel (paper) or its row number (the original code)",
        flag="rotation_search",
        tag="rule_",
    )
    order: RotationOrder = option(
        RotationOrder.RQ, "base rotation times random rotation (paper), or the reverse", flag="rotation_order", tag=""
    )
    rows: int | None = option(
        None,
        "a number: only so many rows of the probe (a token's channels in one block) take part in the search of a "
        "rotation, the longest ones; faster, and a little worse (default: all)",
        flag="search_rows",
        tag="rows_",
        type=_number_or("all", int),
        metavar="N|all",
    )

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size != -1 and self.block_size < 2:
            raise InputError(f"--block_size {self.block_size}: must be at least 2, -1 (the whole width) or auto")
        if self.steps < 0:
            raise InputError(f"--max_rotation_step {self.steps}: must not be negative")
        if self.permutation_times < 0:
            raise InputError(f"--permutation_times {self.permutation_times}: must not be negative")
        if self.rows is not None and self.rows < 1:
            raise InputError(f"--search_rows {self.rows}: must be at least 1, or all")

    def block_size_for(self, channels: int) -> int:
        """Channels per block of an activation with that many channels; it need not divide (see `check_widths`)."""
        if self.block_size == -1:
            return channels
        yields = self.block_size == USUAL_BLOCK and not isinstance(self.block_size, GivenSize)
        if self.block_size is None or (yields and channels % USUAL_BLOCK):
            return max(size for size in range(1, AUTO_BLOCK_LIMIT + 1) if channels % size == 0)
        return int(self.block_size)


@dataclass(frozen=True)
class QuantSettings:
    """Everything that decides what is done to a model. `training` and `smooth` are None where nothing is."""

    TITLE: ClassVar[str] = "method, rotation and permutation"

    bits: BitSettings = part(BitSettings)
    clip: ClipSettings = part(ClipSettings)
    smooth: SmoothSettings | None = part(
        SmoothSettings, switch="smooth", help="move activation peaks into the weights first", tag="smooth", basic=True
    )
    transform: Transform = option(
        Transform.DUAL,
        "dual is DuQuant; rotation_permutation, rotation and permutation are parts of it, permute_rotate is a "
        "permutation that is folded into the layers before, then one rotation, hadamard is a Hadamard matrix with "
        "random signs per block, two_hadamard two with a permutation between them, none nothing at all",
        tag="",
        basic="dual (DuQuant), a part of it, hadamard, two_hadamard or none",
    )
    rotation: RotationSettings = part(RotationSettings)
    probe: Probe = option(
        Probe.MEAN,
        "activation to search on: the mean of the samples, a few samples, or the tokens with the largest magnitudes of "
        "all samples",
        tag="probe_",
    )
    probe_tokens: int = option(128, "how many tokens --probe peaks takes", tag="probe_tokens")
    rounding: RoundingSettings = part(RoundingSettings)
    extras: ExtraSettings = part(ExtraSettings)
    training: TrainingSettings | None = part(
        TrainingSettings,
        switch="lwc",
        help="train the clipping of weights, layer by layer (--train clips)",
        tag="lwc",
        implied_by="train",
        basic=True,
    )
    seed: int = seed_option()
    formats: FormatSettings = part(FormatSettings)

    def __post_init__(self) -> None:
        check_seed("--seed", self.seed)
        if self.training is not None and not self.learns_transform and self.clip.weight_ratio is not None:
            raise InputError("--lwc learns the clipping that --swc fixes: give one of them")
        if self.probe_tokens < 1:
            raise InputError(f"--probe_tokens {self.probe_tokens}: must be at least 1")
        self._check_formats()
        if self.extras.head_transform is HeadTransform.BALANCED and not self.transform.rotates:
            raise InputError(f"--head_transform balanced: nothing is rotated with --transform {self.transform}")

    def _check_formats(self) -> None:
        """Raise InputError for formats that do not go with bits, groups or clips."""
        bits, forms, clip = self.bits, self.formats, self.clip
        kinds = {"group_size": bits.group_size, "symmetric": bits.symmetric}
        check_format("wformat", forms.weight, bits.weight, "wbits", **kinds)
        kinds = {"act_group_size": bits.act_group_size, "act_symmetric": bits.act_symmetric}
        check_format("aformat", forms.activation, bits.activation, "abits", **kinds)
        for role, number in bits.attention.items():
            check_format(f"{role[0]}format", forms.of_head(role, number), number, f"{role[0]}bits")
        heads = [forms.of_head(role, number) for role, number in bits.attention.items()]
        rounded = [heads[at] for at, role in enumerate(("query", "key")) if bits.attention[role] < UNQUANTIZED_BITS]
        clips = {
            "--swc": (clip.weight_ratio, [forms.weight]),
            "--lac": (clip.activation_ratio, [forms.activation, *rounded]),
            "--lac_kv": (clip.kv_ratio, heads[1:]),
        }
        for flag, (ratio, kinds) in clips.items():
            if isinstance(ratio, float) and ratio > 1 and Format.INT in kinds:
                raise InputError(
                    f"{flag} {ratio:g}: the clip ratio must be in (0, 1]; only formats of blocks take more"
                )

    @property
    def learns_transform(self) -> bool:
        """Whether rotations, scales and clips are trained together."""
        return self.training is not None and self.training.train is Trained.TRANSFORM

    @property
    def learns_weight_clips(self) -> bool:
        """Whether ranges of weights are rounded under clips that were trained."""
        return self.training is not None and self.clip.weight_ratio is None

    @property
    def rounds_by_data(self) -> bool:
        """Whether the codes of weights depend on calibration samples, so that they cannot be made again without."""
        return self.bits.weight < UNQUANTIZED_BITS and (
            self.rounding.rounding is Rounding.GPTQ or self.clip.weight_ratio == SEARCH
        )

    @property
    def views_layers(self) -> bool:
        """Whether samples are looked at in every layer while it is in full precision (`quantize.samples.LayerView`)."""
        extras, energy = self.extras, self.smooth is not None and self.smooth.measure is SmoothMeasure.ENERGY
        means = extras.key_mean or extras.value_mean or extras.value_rotation
        heads = extras.head_transform is HeadTransform.BALANCED or self.clip.activation_ratio == SEARCH
        return energy or means or heads or self.aims_at_teacher

    @property
    def reads_rows(self) -> bool:
        """Whether what samples give the linears of a group decides something (`quantize.samples.GroupRows`)."""
        searches = (
            self.clip.activation_ratio == SEARCH or self.probe is Probe.PEAKS or self.formats.activation.calibrated
        )
        return searches or self.extras.channel_shift or self.rounds_by_data

    @property
    def aims_at_teacher(self) -> bool:
        """Whether weights are rounded towards the output on the full-precision network's input."""
        return self.rounds_by_data and self.rounding.target > 0

    @property
    def needs_samples(self) -> bool:
        """Whether calibration samples go through the quantized network beside the probe."""
        return self.training is not None or self.views_layers or self.reads_rows

    @property
    def needs_teacher(self) -> bool:
        """Whether they go through the full-precision network too, beside it."""
        return self.training is not None or self.aims_at_teacher

    @property
    def scheme(self) -> "Scheme":
        """What is rounded to what."""
        from duquant.scheme import Scheme, make_scheme

        bits, clip, forms = self.bits, self.clip, self.formats
        head_clip = {"query": clip.activation_ratio, "key": clip.kv_ratio or clip.activation_ratio}
        clips_values = self.extras.value_rotation or clip.activation_ratio == SEARCH
        head_clip["value"] = clip.kv_ratio or (clip.activation_ratio if clips_values else None)
        activations = {"symmetric": bits.act_symmetric, "full_range": bits.full_range}
        heads = {
            role: make_scheme(forms.of_head(role, number), number, group_size=None, clip=head_clip[role], **activations)
            for role, number in bits.attention.items()
        }
        inputs = {"bits": bits.activation, "group_size": bits.act_group_size, "clip": clip.activation_ratio}
        weights = (bits.weight, bits.symmetric, bits.group_size, clip.weight_ratio, bits.full_range)
        return Scheme(
            weight=make_scheme(forms.weight, *weights),
            input=make_scheme(forms.activation, **inputs, **activations),
            **heads,
            rotate_heads=self.transform.rotates,
        )

    @property
    def label(self) -> str:
        """Short name of the bit widths: `w4a4`, `w4a4g32` where groups of weights have ranges of their own.

        A format of blocks stands in the place of its bits: `wmxfp4a4`; the same of both, by itself: `mxfp4`.
        """
        group = f"g{self.bits.group_size}" if self.bits.group_size else ""
        others = "".join(
            f"{role[0]}{bits}" for role, bits in self.bits.attention.items() if bits != self.bits.activation
        )
        weight, activation = (
            str(bits) if form is Format.INT else str(form)
            for bits, form in (
                (self.bits.weight, self.formats.weight),
                (self.bits.activation, self.formats.activation),
            )
        )
        same = weight == activation and self.formats.weight is not Format.INT
        return (weight if same else f"w{weight}a{activation}") + others + group


def check_widths(settings: QuantSettings, widths: dict[str, int]) -> None:
    """Raise InputError if block or group size does not divide the input channels of a linear (name → channels).

    The error names the linear, and sizes that divide all of them.
    """
    for name, channels in widths.items():
        sizes = {"--group_size": settings.bits.group_size, "--act_group_size": settings.bits.act_group_size}
        if settings.transform is not Transform.NONE:
            sizes["--block_size"] = settings.rotation.block_size_for(channels)
        for flag, size in sizes.items():
            if size is not None and channels % size:
                fitting = _common_divisors(list(widths.values()), nearest_to=size)
                options = fitting + ["auto"] * (flag == "--block_size")
                advice = f"try {' or '.join(options)}" if options else "no size divides all widths of this model"
                raise InputError(f"{name}: {channels} input channels do not divide by {flag} {size}; {advice}")
        for flag, scheme in (("--wformat", settings.scheme.weight), ("--aformat", settings.scheme.input)):
            if scheme.format != Format.INT and channels % scheme.group_size:
                blocks = f"blocks of {scheme.group_size}, which do not divide its {channels} input channels"
                raise InputError(f"{name}: {flag} {scheme.format} has {blocks}; try nvfp4 (blocks of 16) or int")


def check_heads(settings: QuantSettings, head_dim: int) -> None:
    """Raise InputError if the blocks of a format do not divide heads of that size."""
    for role in settings.bits.attention:
        scheme = getattr(settings.scheme, role)
        if scheme.group_size is not None and head_dim % scheme.group_size:
            flag = f"--{role[0]}format {scheme.format}"
            raise InputError(f"{flag} has blocks of {scheme.group_size}, which do not divide heads of {head_dim}")


def _common_divisors(numbers: list[int], nearest_to: int) -> list[str]:
    common = math.gcd(*numbers)
    divisors = [size for size in range(2, common + 1) if common % size == 0]
    return [str(size) for size in sorted(sorted(divisors, key=lambda size: abs(size - nearest_to))[:3])]
