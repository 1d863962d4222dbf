"""How a script begins, and how it ends when its input is wrong or it is stopped."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable

from utils.errors import Incomplete, InputError
from utils.log import setup_console


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of descriptions, and shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, [], (), argparse.SUPPRESS) and "default" not in (action.help or "")
        return super()._get_help_string(action) if shown else action.help


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


def run_script(parse_flags: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """Run a script: `main` on its flags.

    Wrong input ends it with one line on stderr and exit code 2, Ctrl-C with 130, any other failure with 1.
    """
    setup_console()
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
