"""Settings as frozen dataclasses: a field says once what a setting is called, what it is and what it changes.

From the field alone follow its command-line flag with help, its place in JSON and back, whether a run with another
value is another run, and whether it gets another folder. A setting is added by adding its field.

    @dataclass(frozen=True)
    class Smoothing:
        TITLE: ClassVar[str] = "smoothing"                      # of its group in --help
        alpha: float = option(0.5, "how much of a peak moves")  # --alpha

    @dataclass(frozen=True)
    class Method:
        smoothing: Smoothing | None = part(Smoothing, switch="smooth", help="move activation peaks")  # --smooth
"""

import dataclasses
import enum
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")
NONE = "none"  # says on the command line that a setting has no value
DIGEST_LENGTH = 6  # hex digits at the end of a folder's name


class Changes(enum.IntEnum):
    """What another value of a setting changes; a larger one includes what the smaller ones are about."""

    NOTHING = 0  # no figure: where things are, how they are shown, how much is kept
    GRADES = 1  # how answers that are kept are graded: they stay where they are, and so does the folder
    FIGURES = 2  # what is measured, on the same quantized model
    MODEL = 3  # what is made of the quantized layers before anything is measured: a checkpoint of them serves
    LAYERS = 4  # what is decided for the layers: with another value a checkpoint is of another run


def option(
    default: Any,
    help: str,
    *,
    flag: str | Sequence[str] = (),
    changes: Changes = Changes.LAYERS,
    tag: str | None = None,
    title: str | None = None,
    basic: bool | str = False,
    **arguments: Any,
) -> Any:
    """A field that is a command-line flag.

    `flag`: its names without dashes, the first of which is the setting's name everywhere (default: the field's).
    `tag`: what stands before its value in a folder's name, if it is told there. `title`: of its group in the help, if
    it is not its class's. `basic`: the short help tells of it too, in these words if they are given. `arguments` go to
    argparse where the type of the field does not say enough.
    """
    names = (flag,) if isinstance(flag, str) else tuple(flag)
    metadata = {"flags": names, "help": help, "changes": changes, "tag": tag}
    metadata |= {"arguments": arguments, "title": title, "basic": basic}
    return dataclasses.field(default=default, metadata=metadata)


def part(
    cls: type,
    *,
    switch: str | None = None,
    help: str = "",
    on: bool = False,
    tag: str | None = None,
    implied_by: str | None = None,
    basic: bool | str = False,
) -> Any:
    """A field that holds further settings of class `cls`; with a `switch` they are there only where that flag is given.

    `on`: they are there by default, and the help tells of `--no_<switch>`. `tag`: the switch in a folder's name.
    `implied_by`: a setting of `cls` without default; where it has a value, that says as much as the switch.
    `basic`: as of an `option`.
    """
    metadata = {"part": cls, "switch": switch, "help": help, "on": on, "tag": tag, "implied_by": implied_by}
    metadata["basic"] = basic
    return dataclasses.field(default=None if switch and not on else cls(), metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One setting of a class: its name, where its value is inside the object, its type, and its field.

    `switches`: the paths of the optional parts that it is in.
    """

    name: str
    path: tuple[str, ...]
    kind: Any
    field: dataclasses.Field
    switches: tuple[tuple[str, ...], ...]

    @property
    def changes(self) -> Changes:
        """What another value changes."""
        return self.field.metadata["changes"]

    @property
    def tag(self) -> str | None:
        """What stands before the value in a folder's name."""
        return self.field.metadata["tag"]


def options(cls: type) -> list[Option]:
    """Every setting of a settings class and of its parts, in order."""
    return list(_options(cls, (), ()))


def _options(cls: type, path: tuple[str, ...], switches: tuple[tuple[str, ...], ...]) -> Iterator[Option]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        here = (*path, field.name)
        if "part" in field.metadata:
            inner = (*switches, here) if field.metadata["switch"] else switches
            yield from _options(field.metadata["part"], here, inner)
        else:
            yield Option(name_of(field), here, hints[field.name], field, switches)


def to_dict(settings: Any) -> dict[str, Any]:
    """Nested plain values, as JSON has them; `from_dict` gives the same settings back."""
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def from_dict(cls: type[Settings], values: dict[str, Any]) -> Settings:
    """The settings that `to_dict` wrote. What is missing (written before there was such a setting) has its default.

    Raises ValueError for a name that is no setting, and what the class raises for a value that cannot be.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{unknown[0]} is no setting of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: typed(hints[name], value) for name, value in values.items()})


def flat(settings: Any, least: Changes = Changes.NOTHING) -> dict[str, Any]:
    """Setting's name → plain value, of all settings that change at least that much.

    Switches are there as True or False; what is in a part that is switched off is left out, since it changes nothing.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if "part" in field.metadata:
            inner = {} if value is None else flat(value, least)
            if field.metadata["switch"] and _most(field.metadata["part"]) >= least:
                values[field.metadata["switch"]] = value is not None
            values |= inner
        elif field.metadata["changes"] >= least:
            values[name_of(field)] = _plain(value)
    return values


def identity(settings: Any, least: Changes = Changes.NOTHING) -> str:
    """sha256, in hex, of `flat(settings, least)`: equal exactly where all of these settings are."""
    return hashlib.sha256(json.dumps(flat(settings, least), sort_keys=True).encode()).hexdigest()


def defaults(cls: type) -> dict[str, Any]:
    """Setting's name → default as plain value, those of parts that are off by default included."""
    values = {each.name: _plain(each.field.default) for each in options(cls)}
    return values | {each.metadata["switch"]: each.metadata["on"] for each in parts_of(cls) if each.metadata["switch"]}


def folder_name(stem: str, settings: Any, told: Sequence[str] = ()) -> str:
    """`stem`, what differs from the defaults among the tagged settings, and a digest if anything else differs.

    For example `tiny-llama_w4a4_smooth_lac0.9_3fa2c1`. Settings whose figures can differ have different names, if
    `stem` says what the settings named in `told` are.
    """
    usual, tags = defaults(type(settings)), _tags(type(settings))
    now = flat(settings, Changes.FIGURES)
    different = {name: now[name] for name in now if now[name] != usual[name] and name not in told}
    shown = [_shown(tags[name], value) for name, value in different.items() if tags[name] is not None]
    rest = {name: value for name, value in different.items() if tags[name] is None}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:DIGEST_LENGTH]
    return "_".join([stem, *shown, *([digest] if rest else [])])


def name_of(field: dataclasses.Field) -> str:
    """The setting's name: its flag without dashes."""
    return (*field.metadata["flags"], field.name)[0]


def kinds_of(cls: type) -> dict[str, Any]:
    """Setting's or switch's name → type of its value."""
    switches = {each.metadata["switch"]: bool for each in parts_of(cls) if each.metadata["switch"]}
    return {each.name: each.kind for each in options(cls)} | switches


def without_none(kind: Any) -> Any:
    """The type X of a field that is `X | None`, or the type as it is; of `X | Y | None` object, which takes both."""
    if isinstance(kind, types.UnionType):
        kinds = [each for each in typing.get_args(kind) if each is not types.NoneType]
        kind = kinds[0] if len(kinds) == 1 else object
    return kind


def parts_of(cls: type) -> Iterator[dataclasses.Field]:
    """Every field that holds a part, of `cls` and of its parts."""
    for field in dataclasses.fields(cls):
        if "part" in field.metadata:
            yield field
            yield from parts_of(field.metadata["part"])


def _tags(cls: type) -> dict[str, str | None]:
    """Setting's or switch's name → its tag."""
    switches = {each.metadata["switch"]: each.metadata["tag"] for each in parts_of(cls) if each.metadata["switch"]}
    return switches | {each.name: each.field.metadata["tag"] for each in options(cls)}


def _shown(tag: str, value: Any) -> str:
    """A setting in a folder's name: `lac0.9`, `hadamard`, `smooth`, `no_smooth`, `bauto` for one that is left open."""
    if isinstance(value, bool):
        return tag if value else f"no_{tag}"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{tag}{value:g}"
    return f"{tag}{'auto' if value is None else value}"


def _most(cls: type) -> Changes:
    """The most that any setting of `cls` changes."""
    return max((each.field.metadata["changes"] for each in options(cls)), default=Changes.NOTHING)


def _plain(value: Any) -> Any:
    """`value` as JSON has it."""
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # of a type that may say more, as `quantize.rotation_settings.GivenSize` does
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def typed(kind: Any, value: Any) -> Any:
    """The inverse of `_plain` for a field of type `kind`."""
    kind = without_none(kind)
    if value is None:
        return None
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value)
    if typing.get_origin(kind) is tuple:
        return tuple(typed(typing.get_args(kind)[0], each) for each in value)
    return value if kind is object else kind(value)
