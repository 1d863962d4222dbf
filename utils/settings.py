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

import argparse
import dataclasses
import enum
import hashlib
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from utils.flags import did_you_mean
from utils.parser import set_basic

Settings = TypeVar("Settings")
NONE = "none"  # says on the command line that a setting has no value
DIGEST_LENGTH = 6  # hex digits at the end of a folder's name


class Changes(enum.IntEnum):
    """What another value of a setting changes; a larger one includes what the smaller ones are about."""

    NOTHING = 0  # no figure: where things are, how they are shown, how much is kept
    GRADES = 1  # how answers that are kept are graded: they stay where they are, and so does the folder
    FIGURES = 2  # what is measured, on the same quantized model
    LAYERS = 3  # what is decided for the layers: with another value a checkpoint is of another run


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
            yield Option(_name(field), here, hints[field.name], field, switches)


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
    return cls(**{name: _typed(hints[name], value) for name, value in values.items()})


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
            values[_name(field)] = _plain(value)
    return values


def identity(settings: Any, least: Changes = Changes.NOTHING) -> str:
    """sha256, in hex, of `flat(settings, least)`: equal exactly where all of these settings are."""
    return hashlib.sha256(json.dumps(flat(settings, least), sort_keys=True).encode()).hexdigest()


def defaults(cls: type) -> dict[str, Any]:
    """Setting's name → default as plain value, those of parts that are off by default included."""
    values = {each.name: _plain(each.field.default) for each in options(cls)}
    return values | {each.metadata["switch"]: each.metadata["on"] for each in _parts(cls) if each.metadata["switch"]}


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


def add_flags(parser: argparse.ArgumentParser, cls: type, leave_out: Sequence[str] = ()) -> None:
    """Add a flag for every setting of `cls` and its parts; a class with a TITLE has a group of its own in the help.

    What is on or off has `--<name>` and `--no_<name>`, whichever of them the help tells; a setting of one value that
    may be None takes the word `none`. Settings and switches named in `leave_out` get no flag:
    `from_flags` takes their default, or what is set by hand.
    """
    _add(parser, parser, cls, leave_out, None)


def start_flags_from(parser: argparse.ArgumentParser, cls: type, values: Mapping[str, Any]) -> None:
    """Let the flags of `cls` in `parser` have `values` (setting's or switch's name → plain value) for defaults.

    What has no flag there keeps its own. Raises ValueError for a name that is no setting of `cls`, and for a value that
    is not of its type.
    """
    there = {action.dest for action in parser._actions}
    parser.set_defaults(**{name: value for name, value in _by_destination(cls, values).items() if name in there})


def way_off(cls: type, name: str) -> str | None:
    """What turns off the setting or switch of that name on the command line; None if only another value does."""
    kind = _kinds(cls)[name]
    if _without_none(kind) is bool:
        return f"--no_{name}"
    return f"--{name} none" if kind != _without_none(kind) else None


def from_flags(cls: type[Settings], flags: argparse.Namespace) -> Settings:
    """The settings that parsed flags say. Raises what the class raises for values that cannot be."""
    values = {}
    for field in dataclasses.fields(cls):
        if "part" in field.metadata:
            switch, implied_by = field.metadata["switch"], field.metadata["implied_by"]
            inner = from_flags(field.metadata["part"], flags)  # a value that cannot be is refused even if it is idle
            implied = implied_by is not None and getattr(flags, implied_by, None) is not None
            on = switch is None or implied or getattr(flags, switch, field.metadata["on"])
            values[field.name] = inner if on else None
        else:
            value = getattr(flags, destination(_name(field)), field.default)
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def from_flat(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """The settings with these `values` (setting's or switch's name → plain value, as `flat` gives them).

    What is not named has its default. Raises what `start_flags_from` raises, and what the class raises for values that
    cannot be.
    """
    return from_flags(cls, argparse.Namespace(**_by_destination(cls, values)))


def _by_destination(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Where argparse keeps a setting or switch → its value, of plain `values` by name."""
    kinds = _kinds(cls)
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise ValueError(f"{unknown[0]} is no setting of {cls.__name__}")
    return {destination(name): _typed(kinds[name], value) for name, value in values.items()}


def _add(parser: argparse.ArgumentParser, group: Any, cls: type, leave_out: Sequence[str], held: Any) -> None:
    """`held`: the field that holds the part, if it is one."""
    group = _group(parser, vars(cls).get("TITLE"), group)
    switch = held.metadata["switch"] if held is not None else None
    if switch and switch not in leave_out:
        _add_on_off(group, (switch,), held.metadata["on"], held.metadata["help"], held.metadata["basic"])
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "part" in field.metadata:
            _add(parser, group, field.metadata["part"], leave_out, field)
        elif _name(field) not in leave_out:
            names, text = field.metadata["flags"] or (field.name,), field.metadata["help"]
            own = _group(parser, field.metadata["title"], group)
            if _without_none(hints[field.name]) is bool:
                _add_on_off(own, names, field.default, text, field.metadata["basic"])
            else:
                arguments = _arguments(field, hints[field.name])
                flag = own.add_argument(*(f"--{name}" for name in names), help=text, **arguments)
                set_basic(flag, field.metadata["basic"])


def _add_on_off(group: Any, names: Sequence[str], default: bool | None, text: str, basic: bool | str) -> None:
    """Flags for what is on or off; the help tells those that say something else than the `default` does."""
    on, off = [f"--{name}" for name in names], [f"--no_{name}" for name in names]
    contrary = text if default is True else f"the contrary of {on[0]}"
    shown = {"dest": destination(names[0]), "default": default}
    hidden = argparse.SUPPRESS
    yes = group.add_argument(*on, action="store_true", help=hidden if default is True else text, **shown)
    no = group.add_argument(*off, action="store_false", help=hidden if default is False else contrary, **shown)
    set_basic(no if default is True else yes, basic)


def _group(parser: argparse.ArgumentParser, title: str | None, default: Any) -> Any:
    """The group of that title, made if it is not there; `default` without a title."""
    if title is None:
        return default
    there = (each for each in parser._action_groups if each.title == title)
    return next(there, None) or parser.add_argument_group(title)


def _arguments(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """What argparse must be told of a field of that type, which is not about on and off."""
    kind = _without_none(hint)
    several = typing.get_origin(kind) is tuple
    if several:
        usual = {"nargs": "+", "type": typing.get_args(kind)[0]}
    else:
        usual = {"type": kind} | ({"choices": list(kind)} if issubclass(kind, enum.Enum) else {})
    arguments = {"default": field.default} | usual | field.metadata["arguments"]
    optional = kind != hint and not several
    if arguments["type"] is usual["type"] and (optional or "choices" in arguments):
        choices = [str(each) for each in arguments.pop("choices", ())]
        words = choices + [NONE] * optional
        arguments["type"] = _reader(usual["type"], choices, words)
        arguments = ({"metavar": f"{{{','.join(words)}}}"} if choices else {}) | arguments
    return arguments


def _reader(kind: Any, choices: Sequence[str], words: Sequence[str]) -> Callable[[str], Any]:
    """Reads a value of type `kind`, if there are `choices` one of them, and `none`, if that is a word, as None."""

    def read(text: str) -> Any:
        if text == NONE and NONE in words and NONE not in choices:
            return None
        if choices and text not in choices:
            near = did_you_mean([text], words)
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(words)}){near}")
        return kind(text)

    read.__name__ = kind.__name__  # argparse says it of a text that cannot be read
    return read


def _name(field: dataclasses.Field) -> str:
    """The setting's name: its flag without dashes."""
    return (*field.metadata["flags"], field.name)[0]


def destination(name: str) -> str:
    """Where argparse keeps the value of a setting or switch."""
    return name.replace("-", "_")


def _kinds(cls: type) -> dict[str, Any]:
    """Setting's or switch's name → type of its value."""
    switches = {each.metadata["switch"]: bool for each in _parts(cls) if each.metadata["switch"]}
    return {each.name: each.kind for each in options(cls)} | switches


def _without_none(kind: Any) -> Any:
    """The type X of a field that is `X | None`, or the type as it is; of `X | Y | None` object, which takes both."""
    if isinstance(kind, types.UnionType):
        kinds = [each for each in typing.get_args(kind) if each is not types.NoneType]
        kind = kinds[0] if len(kinds) == 1 else object
    return kind


def _parts(cls: type) -> Iterator[dataclasses.Field]:
    """Every field that holds a part, of `cls` and of its parts."""
    for field in dataclasses.fields(cls):
        if "part" in field.metadata:
            yield field
            yield from _parts(field.metadata["part"])


def _tags(cls: type) -> dict[str, str | None]:
    """Setting's or switch's name → its tag."""
    switches = {each.metadata["switch"]: each.metadata["tag"] for each in _parts(cls) if each.metadata["switch"]}
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


def _typed(kind: Any, value: Any) -> Any:
    """The inverse of `_plain` for a field of type `kind`."""
    kind = _without_none(kind)
    if value is None:
        return None
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value)
    if typing.get_origin(kind) is tuple:
        return tuple(_typed(typing.get_args(kind)[0], each) for each in value)
    return value if kind is object else kind(value)
