"""Settings check themselves and name the flag."""

import dataclasses

import pytest

from quantize.settings import (
    AUTO_BLOCK_LIMIT,
    BitSettings,
    ClipSettings,
    QuantSettings,
    RotationSettings,
    SmoothSettings,
    Transform,
    check_widths,
)
from utils.errors import InputError

NAN, INF = float("nan"), float("inf")
WRONG = [
    *[(lambda bits=bits: BitSettings(weight=bits), f"--wbits {bits}:") for bits in (-1, 0, 1, 17, 32)],
    *[(lambda bits=bits: BitSettings(activation=bits), f"--abits {bits}:") for bits in (0, 1, 17)],
    *[(lambda size=size: BitSettings(group_size=size), f"--group_size {size}:") for size in (0, -1, -128)],
    *[(lambda r=r: ClipSettings(activation_ratio=r), f"--lac {r:g}:") for r in (0.0, -0.1, 1.01, NAN, INF)],
    *[(lambda r=r: ClipSettings(weight_ratio=r), f"--swc {r:g}:") for r in (0.0, -0.1, 1.01, NAN, INF)],
    *[(lambda a=a: SmoothSettings(alpha=a), f"--alpha {a:g}:") for a in (-0.1, 1.1, NAN, INF)],
    *[(lambda size=size: RotationSettings(block_size=size), f"--block_size {size}:") for size in (1, 0, -2, -128)],
    (lambda: RotationSettings(steps=-1), "--max_rotation_step -1:"),
    (lambda: RotationSettings(permutation_times=-1), "--permutation_times -1:"),
]
WIDTHS = {"layers.0.q_proj": 48, "layers.0.o_proj": 96, "layers.0.down_proj": 80}


def blocks(size: int | None, **changes) -> QuantSettings:
    return QuantSettings(rotation=RotationSettings(block_size=size), **changes)


@pytest.mark.parametrize(("make", "start"), WRONG, ids=[start for _, start in WRONG])
def test_a_wrong_setting_is_an_error_that_names_its_flag(make, start):
    with pytest.raises(InputError) as caught:
        make()
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BitSettings(2, 16, group_size=1),
        lambda: BitSettings(16, 2),
        lambda: ClipSettings(1.0, 1e-6),
        lambda: ClipSettings(),
        lambda: SmoothSettings(0.0),
        lambda: SmoothSettings(1.0),
        lambda: RotationSettings(block_size=2, steps=0, permutation_times=0),
        lambda: RotationSettings(block_size=-1),
        lambda: RotationSettings(block_size=None),
    ],
)
def test_the_ends_of_what_is_allowed_are_allowed(make):
    make()


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSettings().bits.weight = 3


@pytest.mark.parametrize(
    ("bits", "untouched"), [((16, 16), True), ((4, 16), False), ((16, 4), False), ((15, 15), False)]
)
def test_only_sixteen_bits_on_both_sides_leave_a_model_untouched(bits, untouched):
    assert BitSettings(*bits).untouched is untouched


@pytest.mark.parametrize(
    ("bits", "label"),
    [
        (BitSettings(), "w4a16"),
        (BitSettings(4, 4), "w4a4"),
        (BitSettings(3, 16), "w3a16"),
        (BitSettings(4, 8, 64), "w4a8g64"),
        (BitSettings(4, 4, key=8, value=2), "w4a4k8v2"),
        (BitSettings(4, 4, query=4), "w4a4"),
    ],
)
def test_label_names_the_bits_and_the_group(bits, label):
    assert QuantSettings(bits=bits).label == label


@pytest.mark.parametrize(
    ("channels", "size"), [(128, 128), (4096, 128), (80, 80), (896, 128), (2880, 120), (11008, 128), (131, 1)]
)
def test_auto_is_the_largest_divisor_up_to_its_limit(channels, size):
    assert RotationSettings(block_size=None).block_size_for(channels) == size
    assert channels % size == 0
    assert not any(channels % larger == 0 for larger in range(size + 1, AUTO_BLOCK_LIMIT + 1))


def test_minus_one_is_the_whole_width_and_a_number_is_itself():
    assert RotationSettings(block_size=-1).block_size_for(80) == 80
    assert RotationSettings(block_size=32).block_size_for(80) == 32


@pytest.mark.parametrize("size", [None, -1, 2, 4, 8, 16])
def test_sizes_that_divide_every_width_pass(size):
    check_widths(blocks(size), WIDTHS)


def suggestions(message: str) -> list[str]:
    """What comes after `try` in an error: `try 8, 16 or auto`."""
    return message.split("; try ")[1].replace(" or ", ", ").split(", ")


@pytest.mark.parametrize("size", [3, 6, 24, 32, 48, 128])
def test_a_block_size_that_does_not_divide_names_the_linear_and_sizes_that_do(size):
    with pytest.raises(InputError) as caught:
        check_widths(blocks(size), WIDTHS)
    name = next(name for name, width in WIDTHS.items() if width % size)
    assert str(caught.value).startswith(f"{name}: {WIDTHS[name]} input channels do not divide by --block_size {size}; ")
    *sizes, auto = suggestions(str(caught.value))
    assert auto == "auto"
    assert sizes
    for suggested in sizes:
        check_widths(blocks(int(suggested)), WIDTHS)


@pytest.mark.parametrize("transform", Transform)
def test_a_group_size_that_does_not_divide_names_the_linear_and_sizes_that_do(transform):
    with pytest.raises(
        InputError, match=r"layers\.0\.q_proj: 48 input channels do not divide by --group_size 32"
    ) as caught:
        check_widths(blocks(16, bits=BitSettings(group_size=32), transform=transform), WIDTHS)
    for suggested in suggestions(str(caught.value)):
        check_widths(blocks(16, bits=BitSettings(group_size=int(suggested))), WIDTHS)


def test_suggested_sizes_are_close_to_what_was_asked_for():
    with pytest.raises(InputError) as caught:
        check_widths(blocks(100), {"q_proj": 4096, "down_proj": 11008})
    assert suggestions(str(caught.value)) == ["32", "64", "128", "auto"]


def test_without_a_transform_the_block_size_does_not_matter():
    check_widths(blocks(7, transform=Transform.NONE), WIDTHS)


@pytest.mark.parametrize("flag", ["--block_size", "--group_size"])
@pytest.mark.parametrize("other", [50, 35], ids=["one common divisor", "no common divisor"])
def test_suggestions_read_well_however_few_there_are(flag, other):
    config = blocks(16) if flag == "--block_size" else blocks(None, bits=BitSettings(group_size=16))
    with pytest.raises(InputError, match=f"down_proj: {other} input channels do not divide by {flag} 16") as caught:
        check_widths(config, {"q_proj": 48, "down_proj": other})
    assert "try  or" not in str(caught.value)
    assert not str(caught.value).rstrip().endswith("try")
