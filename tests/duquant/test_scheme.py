"""What is rounded to what, by role."""

import json

import pytest

from duquant.scheme import Scheme, TensorScheme

EVERYTHING = Scheme(
    weight=TensorScheme("int", 3, True, 16, 0.8),
    input=TensorScheme("int", 4, False, 8, 0.9),
    query=TensorScheme("int", 5),
    key=TensorScheme("int", 6, True),
    value=TensorScheme("int", 16, clip=0.7),
    rotate_heads=False,
)


@pytest.mark.parametrize("scheme", [Scheme(), EVERYTHING], ids=["default", "everything"])
def test_json_gives_the_same_scheme_back(scheme):
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_every_role_has_a_scheme_of_its_own():
    assert list(EVERYTHING.roles) == ["weight", "input", "query", "key", "value"]
    assert [scheme.bits for scheme in EVERYTHING.roles.values()] == [3, 4, 5, 6, 16]
    assert [scheme.quantized for scheme in EVERYTHING.roles.values()] == [True, True, True, True, False]


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32])
def test_bits_that_cannot_be_are_refused(bits):
    with pytest.raises(ValueError, match=f"{bits} bits"):
        TensorScheme(bits=bits)


def test_a_format_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="mxfp9"):
        TensorScheme("mxfp9")


@pytest.mark.parametrize("values", [{"weight": {"bits": 99}}, {"weight": {"colour": 3}}, {"colour": {}}])
def test_what_was_never_written_is_not_read(values):
    with pytest.raises((TypeError, ValueError)):
        Scheme.from_dict(values)
