"""Settings check themselves and name the flag."""

import argparse
import dataclasses
import itertools
import json

import pytest
from settings_cases import get, switched_on, with_another

from quantize.bits import BitSettings, ClipSettings
from quantize.rotation_settings import AUTO_BLOCK_LIMIT, GivenSize, RotationSettings, Transform
from quantize.settings import QuantSettings, SmoothSettings, TrainingSettings
from quantize.widths import check_widths
from utils.errors import InputError
from utils.setting_flags import add_flags, from_flags
from utils.settings import Changes, flat, folder_name, from_dict, identity, options, to_dict

NAN, INF = float("nan"), float("inf")
WRONG = [
    *[(lambda bits=bits: BitSettings(weight=bits), f"--wbits {bits}:") for bits in (-1, 0, 1, 17, 32)],
    *[(lambda bits=bits: BitSettings(activation=bits), f"--abits {bits}:") for bits in (0, 1, 17)],
    *[(lambda size=size: BitSettings(group_size=size), f"--group_size {size}:") for size in (0, -1, -128)],
    *[(lambda r=r: ClipSettings(activation_ratio=r), f"--lac {r:g}:") for r in (0.0, -0.1, 2.01, NAN, INF)],
    *[(lambda r=r: ClipSettings(weight_ratio=r), f"--swc {r:g}:") for r in (0.0, -0.1, 2.01, NAN, INF)],
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


@pytest.mark.parametrize("channels", [48, 80, 127, 128, 576, 1536, 2880, 11008])
def test_the_default_is_128_where_that_divides_and_else_what_auto_is(channels):
    auto = RotationSettings(block_size=None).block_size_for(channels)
    assert RotationSettings().block_size_for(channels) == (auto if channels % 128 else 128)
    check_widths(QuantSettings(), {"q_proj": channels})


def test_a_size_that_is_named_is_its_number_wherever_settings_go():
    named, usual = parsed("--block_size 128"), QuantSettings()
    assert type(named.rotation.block_size) is GivenSize
    assert named == usual
    assert identity(named) == identity(usual)
    assert folder_name("run", named) == folder_name("run", usual)
    for value in (flat(named)["block_size"], to_dict(named)["rotation"]["block_size"]):
        assert (type(value), value) == (int, 128)
    assert type(named.rotation.block_size_for(256)) is int


def suggestions(message: str) -> list[str]:
    """What comes after `try` in an error: `try 8, 16 or auto`."""
    return message.split("; try ")[1].replace(" or ", ", ").split(", ")


@pytest.mark.parametrize("size", [3, 6, 24, 32, 48, 128])
def test_a_block_size_that_does_not_divide_names_the_linear_and_sizes_that_do(size):
    with pytest.raises(InputError) as caught:
        check_widths(parsed(f"--block_size {size}"), WIDTHS)
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
    check_widths(parsed("--block_size 128 --transform none"), WIDTHS)


@pytest.mark.parametrize("flag", ["--block_size", "--group_size"])
@pytest.mark.parametrize("other", [50, 35], ids=["one common divisor", "no common divisor"])
def test_suggestions_read_well_however_few_there_are(flag, other):
    config = blocks(16) if flag == "--block_size" else blocks(None, bits=BitSettings(group_size=16))
    with pytest.raises(InputError, match=f"down_proj: {other} input channels do not divide by {flag} 16") as caught:
        check_widths(config, {"q_proj": 48, "down_proj": other})
    assert "try  or" not in str(caught.value)
    assert not str(caught.value).rstrip().endswith("try")


every_setting = pytest.mark.parametrize("each", options(QuantSettings), ids=lambda each: each.name)


@every_setting
def test_another_value_of_any_setting_goes_to_json_and_back(each):
    after = with_another(switched_on(QuantSettings, each), each)
    again = from_dict(QuantSettings, json.loads(json.dumps(to_dict(after))))
    assert again == after
    assert type(get(again, each.path)) is type(get(after, each.path))


@every_setting
def test_another_value_of_any_setting_is_another_identity_and_where_figures_can_differ_another_folder(each):
    before = switched_on(QuantSettings, each)
    after = with_another(before, each)
    assert identity(after) != identity(before)
    assert (identity(after, Changes.LAYERS) != identity(before, Changes.LAYERS)) == (each.changes is Changes.LAYERS)
    assert (folder_name("run", after) != folder_name("run", before)) == (each.changes > Changes.NOTHING)


def test_no_two_settings_share_a_folder():
    made = [with_another(switched_on(QuantSettings, each), each) for each in options(QuantSettings)]
    made += [QuantSettings(), QuantSettings(smooth=SmoothSettings()), QuantSettings(training=TrainingSettings())]
    made += [QuantSettings(transform=transform) for transform in Transform]
    told = {identity(each, Changes.FIGURES): folder_name("run", each) for each in made}
    assert len(set(told.values())) == len(told)


ROLES = {
    "--qbits 3": {"query": {"bits": 3}},
    "--kbits 3": {"key": {"bits": 3}},
    "--vbits 16": {"value": {"bits": 16}},
    "--wbits 3": {"weight": {"bits": 3}},
    "--abits 5": {role: {"bits": 5} for role in ("input", "query", "key", "value")},
    "--abits 5 --kbits 2": {"input": {"bits": 5}, "query": {"bits": 5}, "key": {"bits": 2}, "value": {"bits": 5}},
    "--group_size 8": {"weight": {"group_size": 8}},
    "--act_group_size 8": {"input": {"group_size": 8}},
    "--symmetric": {"weight": {"symmetric": True}},
    "--weight_symmetric": {"weight": {"symmetric": True}},
    "--act_symmetric": {role: {"symmetric": True} for role in ("input", "query", "key", "value")},
    "--lac 0.9": {role: {"clip": 0.9} for role in ("input", "query", "key")},
    "--lac_kv 0.8": {role: {"clip": 0.8} for role in ("key", "value")},
    "--lac 0.9 --lac_kv 0.8": {
        "input": {"clip": 0.9},
        "query": {"clip": 0.9},
        "key": {"clip": 0.8},
        "value": {"clip": 0.8},
    },
    "--swc 0.7": {"weight": {"clip": 0.7}},
}


def parsed(flags: str) -> QuantSettings:
    parser = argparse.ArgumentParser()
    add_flags(parser, QuantSettings)
    return from_flags(QuantSettings, parser.parse_args(flags.split()))


@pytest.mark.parametrize("flags", ROLES)
def test_flags_of_a_role_change_the_scheme_of_that_role_alone(flags):
    usual = parsed("").scheme
    expected = {role: dataclasses.replace(scheme, **ROLES[flags].get(role, {})) for role, scheme in usual.roles.items()}
    assert parsed(flags).scheme.roles == expected


def test_without_flags_the_settings_are_the_defaults():
    assert parsed("") == QuantSettings()
    assert parsed("--smooth --lwc") == QuantSettings(smooth=SmoothSettings(), training=TrainingSettings())


@pytest.mark.parametrize("flags", ["--qbits 1", "--kbits 17", "--vbits 0", "--act_group_size 0", "--lac_kv 1.5"])
def test_a_wrong_setting_of_a_role_names_its_flag(flags):
    with pytest.raises(InputError, match=flags):
        parsed(flags)


def test_learning_the_clipping_and_fixing_it_is_refused():
    with pytest.raises(InputError, match="--swc"):
        parsed("--lwc --swc 0.9")


def test_labels_tell_different_bits_apart():
    bits = [BitSettings(4, 4, query=q, key=k, value=v) for q, k, v in itertools.product((None, 3, 8), repeat=3)]
    assert len({QuantSettings(each).label for each in bits}) == len(bits)
