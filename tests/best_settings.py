"""Settings in which samples decide everything: what a set of the best known ones looks like, for tests."""

from dataclasses import replace

from quantize.bits import BitSettings, ClipSettings
from quantize.refinements import ExtraSettings, HeadTransform, Rounding, RoundingSettings
from quantize.rotation_settings import RotationSettings
from quantize.settings import GqaSmooth, Probe, QuantSettings, SmoothMeasure, SmoothSettings

BALANCED = HeadTransform.BALANCED
GPTQ = RoundingSettings(Rounding.GPTQ, damping=0.01, target=0.5)
# one at a time
EXTRAS = {
    "channel shift": ExtraSettings(channel_shift=True),
    "key mean": ExtraSettings(key_mean=True),
    "value mean": ExtraSettings(value_mean=True),
    "value rotation": ExtraSettings(value_rotation=True),
    "balanced heads": ExtraSettings(head_transform=BALANCED),
    "balanced values": ExtraSettings(value_rotation=True, head_transform=BALANCED),
    "all": ExtraSettings(True, True, True, True, BALANCED),
}
FLAGS = (
    *("--wbits", 4, "--abits", 4, "--smooth", "--smooth_measure", "energy", "--swc", "search", "--lac", "search"),
    *("--rounding", "gptq", "--gptq_target", 0.5, "--channel_shift", "--key_mean", "--head_transform", "balanced"),
    *("--probe", "peaks", "--probe_tokens", 32, "--block_size", 16, "--max_rotation_step", 20),
)


def best(number: int = 4, gqa: GqaSmooth = GqaSmooth.ONLINE, **changes) -> QuantSettings:
    """Energies, peaks, searched clips, GPTQ half-way to the full-precision output, shifts and balanced heads."""
    usual = QuantSettings(
        bits=BitSettings(number, number),
        clip=ClipSettings("search", "search"),
        smooth=SmoothSettings(0.5, gqa=gqa, measure=SmoothMeasure.ENERGY),
        rotation=RotationSettings(block_size=16, steps=4),
        probe=Probe.PEAKS,
        probe_tokens=32,
        rounding=GPTQ,
        extras=ExtraSettings(channel_shift=True, key_mean=True, head_transform=BALANCED),
    )
    return replace(usual, **changes)
