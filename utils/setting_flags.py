"""Settings on the command line: a flag for every field of a settings class, and the settings that flags say.

What a flag is called, takes and tells follows from the field alone (`utils.settings.option`).
"""

import argparse
import dataclasses
import enum
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from utils.flags import did_you_mean
from utils.parser import set_basic
from utils.settings import NONE, kinds_of, name_of, typed, without_none

Settings = TypeVar("Settings")


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
    kind = kinds_of(cls)[name]
    if without_none(kind) is bool:
        return f"--no_{name}"
    return f"--{name} none" if kind != without_none(kind) else None


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
            value = getattr(flags, destination(name_of(field)), field.default)
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
    kinds = kinds_of(cls)
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise ValueError(f"{unknown[0]} is no setting of {cls.__name__}")
    return {destination(name): typed(kinds[name], value) for name, value in values.items()}


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
        elif name_of(field) not in leave_out:
            names, text = field.metadata["flags"] or (field.name,), field.metadata["help"]
            own = _group(parser, field.metadata["title"], group)
            if without_none(hints[field.name]) is bool:
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
    kind = without_none(hint)
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


def destination(name: str) -> str:
    """Where argparse keeps the value of a setting or switch."""
    return name.replace("-", "_")
