"""How a script begins, and how it ends when its input is wrong or it is stopped."""

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from experiment.presets import PRESETS
from utils.errors import Incomplete, InputError
from utils.log import setup_console
from utils.settings import destination, from_flags, start_flags_from, way_off

Settings = TypeVar("Settings")
SPINS = "3000"  # some microseconds, in which an idle machine is at the barrier


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of descriptions, and shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = isinstance(action.default, bool) or "default" in (action.help or "")
        shown = action.default not in (None, [], (), argparse.SUPPRESS) and not told
        return super()._get_help_string(action) if shown else action.help

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for part in text.splitlines() for line in super(_HelpFormatter, self)._split_lines(part, width)]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with code 2. Flags must be written out in full.

    It has the one flag that every script has, `--quiet`.
    """

    def __init__(self, description: str, epilog: str | None = None):
        super().__init__(description=description, epilog=epilog, formatter_class=_HelpFormatter, allow_abbrev=False)
        self.add_argument(
            "--quiet", action="store_true", help="say only results and what goes wrong; log.txt has everything"
        )

    def error(self, message: str):
        """Print one line on stderr and exit with code 2."""
        raise SystemExit(_fail(f"{message}; see {self.prog} --help"))


def parse_with_preset(parser: Parser, cls: type) -> argparse.Namespace:
    """The command line's flags of the settings `cls`; those that are not given are as its `--preset` says, if any."""
    flags = parser.parse_args()
    if flags.preset is not None:
        start_flags_from(parser, cls, PRESETS[flags.preset])
        flags = parser.parse_args()
    return flags


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


def run_script(parse_flags: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """Run a script: `main` on its flags.

    Wrong input ends it with one line on stderr and exit code 2, Ctrl-C with 130, any other failure with 1.
    """
    setup_console()
    # read when torch is imported: threads that spin for long while they wait make a busy machine several times slower
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        args = parse_flags()
        setup_console(args.quiet)
        main(args)
    except InputError as error:
        sys.exit(_fail(str(error)))
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


def _fail(message: str) -> int:
    logging.getLogger().error("error: %s", " ".join(message.split()))
    return 2
