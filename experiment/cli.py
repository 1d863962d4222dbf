"""How a script begins, and how it ends when its input is wrong, a package is missing, or it is stopped."""

import argparse
import importlib.util
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from experiment.presets import PRESETS
from experiment.usual import Taken
from utils.errors import Incomplete, InputError
from utils.log import setup_console
from utils.parser import Parser, fail
from utils.setting_flags import destination, from_flags, start_flags_from, way_off

Settings = TypeVar("Settings")
Fill = Callable[[argparse.Namespace, set[str]], list[Taken]]
SPINS = "3000"  # some microseconds, in which an idle machine is at the barrier


def parse_with_preset(parser: Parser, cls: type, fill: Fill | None = None) -> argparse.Namespace:
    """The command line's flags of the settings `cls`; those that are not given are as its `--preset` says, if any.

    `fill(flags, given)`: what is taken where the command line leaves it open, as a list of `Taken`; `given` are the
    names of the flags that it has. The flags have it as `taken`.
    """
    flags = parser.parse_args()
    taken = fill(flags, given_flags(parser)) if fill is not None else []
    values = {each.name: each.value for each in taken}
    preset = values.get("preset", flags.preset)
    if preset is not None:
        start_flags_from(parser, cls, PRESETS[preset])
        flags = parser.parse_args()
    vars(flags).update(values, taken=tuple(taken))
    return flags


def given_flags(parser: Parser) -> set[str]:
    """Where argparse keeps the values of those flags that the command line has, whatever value they are given."""
    left_out = object()
    flags = argparse.Namespace(**{action.dest: left_out for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(namespace=flags)).items() if value is not left_out}


def read_settings(cls: type[Settings], flags: argparse.Namespace) -> Settings:
    """The settings that the flags say.

    Raises InputError for what cannot be; where a preset has a part in that, it says what takes that part out.
    """
    try:
        return from_flags(cls, flags)
    except InputError as error:
        raise InputError("; ".join([str(error), *_preset_parts(cls, flags, str(error))])) from None


def _preset_parts(cls: type, flags: argparse.Namespace, message: str) -> Iterator[str]:
    """Of the flags that `message` names, those that are there by the preset, each with what takes it out."""
    named = re.findall(r"--([\w-]+)", message)
    for name, value in PRESETS.get(flags.preset, {}).items():
        off = way_off(cls, name)
        if off is not None and name in named and getattr(flags, destination(name), None) == value:
            shown = f"--{name}" if value is True else f"--{name} {value}"
            yield f"--preset {flags.preset} has {shown}, which {off} takes out"


def _taken_parts(flags: argparse.Namespace | None, message: str) -> Iterator[str]:
    """What takes perplexity out of a run that measures it by itself, where its data are what `message` is about."""
    taken: tuple[Taken, ...] = getattr(flags, "taken", ())
    if "--test_dataset" in message and any(each.name == "eval_ppl" for each in taken):
        yield "perplexity is measured by itself, --no_eval_ppl leaves it out"


def run_script(parse_flags: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """Run a script: `main` on its flags.

    Wrong input ends it with one line on stderr and exit code 2, Ctrl-C with 130, any other failure with 1.
    """
    setup_console()
    # read when torch is imported: threads that spin for long while they wait make a busy machine several times slower
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    signal.signal(signal.SIGTERM, _terminate)
    args = None
    try:
        args = parse_flags()
        setup_console(args.quiet)
        main(args)
    except InputError as error:
        sys.exit(fail("; ".join([str(error), *_taken_parts(args, str(error))])))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if importlib.util.find_spec(package or "sys") is not None:  # a defect of ours
            logging.getLogger().exception("failed")
            sys.exit(1)
        sys.exit(fail(f"the package {package} is not installed: python -m pip install -r requirements.txt"))
    except Incomplete as error:
        logging.getLogger().error("error: %s", error)
        sys.exit(1)
    except KeyboardInterrupt:
        logging.getLogger().error("interrupted")
        sys.exit(130)
    except Exception:
        logging.getLogger().exception("failed")
        sys.exit(1)


def _terminate(number: int, frame: object) -> None:
    """End as Ctrl-C does: what is finished is kept, and the log says how to go on."""
    logging.getLogger().error("terminated")
    sys.exit(128 + number)
