"""Settings of the method. Each class checks itself once and names the command-line flag in its error.

A setting is one field here: flag, help, JSON, identity and the run's folder follow from it (see `utils.settings`).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from quantize.bits import (
    BLOCK,
    SEARCH,
    UNQUANTIZED_BITS,
    BitSettings,
    ClipSettings,
    Format,
    FormatSettings,
    Ratio,
    check_format,
)
from quantize.refinements import ExtraSettings, HeadTransform, Rounding, RoundingSettings, Trained, TuningSettings
from quantize.rotation_settings import RotationSettings, Transform
from utils.errors import InputError
from utils.settings import Changes, option, part

if TYPE_CHECKING:
    from duquant.scheme import Scheme


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


class Probe(StrEnum):
    """The activation on which rotations and permutations are searched."""

    MEAN = "mean"  # the mean over the calibration samples (the original code)
    SAMPLE = "sample"  # a few real samples
    PEAKS = "peaks"  # of all samples in the quantized network, the tokens with the largest magnitudes


def check_seed(flag: str, seed: int) -> None:
    """Raise InputError for a number that seeds no generator."""
    if not 0 <= seed < 2**32:
        raise InputError(f"{flag} {seed}: must be between 0 and {2**32 - 1}")


def seed_option() -> int:
    """The field of every class that has a seed."""
    return option(2, "of the samples drawn and of the random rotations", tag="seed", title="calibration")


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
    tuning: TuningSettings = part(TuningSettings)
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
        used = [("--swc", clip.weight_ratio, forms.weight), ("--lac", clip.activation_ratio, forms.activation)]
        for role, number in bits.attention.items():
            flag, ratio = self._head_clips[role]
            if number < UNQUANTIZED_BITS or flag == "--lac_kv":  # --lac is for inputs too, and idle for what is whole
                used.append((flag, ratio, forms.of_head(role, number)))
        for flag, ratio in ((flag, ratio) for flag, ratio, form in used if form is Format.INT):
            if isinstance(ratio, float) and ratio > 1:
                raise InputError(
                    f"{flag} {ratio:g}: the clip ratio must be in (0, 1]; only formats of blocks take more"
                )
            if ratio == BLOCK:
                raise InputError(
                    f"{flag} {BLOCK}: integers have no blocks; give {flag} {SEARCH}, or --aformat nvfp4 at 4 bits"
                )

    @property
    def _head_clips(self) -> dict[str, tuple[str, Ratio]]:
        """By role of q, k and v the flag that clips it, and its ratio."""
        clip, inputs = self.clip, ("--lac", self.clip.activation_ratio)
        own = inputs if clip.kv_ratio is None else ("--lac_kv", clip.kv_ratio)
        clips_values = self.extras.value_rotation or clip.activation_ratio in (SEARCH, BLOCK)
        return {"query": inputs, "key": own, "value": own if clips_values or clip.kv_ratio else ("--lac", None)}

    @property
    def learns_transform(self) -> bool:
        """Whether rotations, scales and clips are trained together."""
        return self.training is not None and self.training.train is Trained.TRANSFORM

    @property
    def tunes(self) -> bool:
        """Whether the network is tuned as a whole behind its last layer."""
        return self.tuning.samples > 0 and not self.bits.untouched

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
        head_clip = {role: ratio for role, (_, ratio) in self._head_clips.items()}
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
