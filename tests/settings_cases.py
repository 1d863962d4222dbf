"""Another value for every field of a settings class, found from the field alone."""

import enum
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from utils.settings import Option

NUMBERS = (1, 2, 4, 5, 8, 0, 3, 16, 100)
RATIOS = (0.5, 0.75, 0.25, 1.0, 2.0, 0.0)


def put(settings: Any, path: tuple[str, ...], value: Any) -> Any:
    """`settings` with `value` at `path`."""
    name, *inner = path
    return replace(settings, **{name: put(getattr(settings, name), tuple(inner), value) if inner else value})


def get(settings: Any, path: tuple[str, ...]) -> Any:
    """The value at `path`."""
    for name in path:
        settings = getattr(settings, name)
    return settings


def switched_on(cls: type, option: Option) -> Any:
    """Settings of `cls` as they are by default, with the parts that hold `option`."""
    settings = cls()
    for switch in option.switches:
        (held,) = (each for each in fields(get(settings, switch[:-1])) if each.name == switch[-1])
        if get(settings, switch) is None:
            settings = put(settings, switch, held.metadata["part"]())
    if option.path[-2:] == ("formats", "activation"):  # of 16 bits there is one format
        settings = put(settings, (*option.path[:-2], "bits", "activation"), 4)
    return settings


def with_another(settings: Any, option: Option) -> Any:
    """`settings` with another value of `option`, one that its class allows. Fails if none can be found."""
    now, choices = get(settings, option.path), option.field.metadata["arguments"].get("choices") or ("another",)
    for value in candidates(option.kind, now, choices):
        if value == now:
            continue
        try:
            changed = put(settings, option.path, value)
        except ValueError:
            continue
        if get(changed, option.path) != now:  # some values have two names
            return changed
    raise AssertionError(f"no other value is known for {option.name} of type {option.kind}; add one to settings_cases")


def candidates(kind: Any, now: Any, choices: Sequence[str]) -> Iterator[Any]:
    """Values of type `kind` to try; texts are those of `choices`."""
    if isinstance(kind, types.UnionType):
        for each in typing.get_args(kind):
            yield from () if each is types.NoneType else candidates(each, now, choices)
        yield None
    elif typing.get_origin(kind) is tuple:
        yield from ((each,) for each in candidates(typing.get_args(kind)[0], None, choices))
    elif kind is bool:
        yield not now
    elif issubclass(kind, enum.Enum):
        yield from kind
    else:
        yield from {int: NUMBERS, float: RATIOS, str: choices, Path: (Path("another"),)}.get(kind, ())
