"""Whether sizes of blocks and groups go with the widths of a model."""

import math

from quantize.bits import Format
from quantize.rotation_settings import Transform
from quantize.settings import QuantSettings
from utils.errors import InputError


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
