"""The parser of every script: either spelling of a flag, one-line errors that say what was meant, and a short help."""

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence

from utils.flags import did_you_mean

WIDTH = 110  # columns of the help where there is no terminal
HELP_COLUMN = 30  # where the text of a flag begins


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of descriptions, and shows a default where there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=HELP_COLUMN, width=shutil.get_terminal_size((WIDTH, 0)).columns - 2)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = isinstance(action.default, bool) or "default" in (action.help or "")
        shown = action.default not in (None, [], (), argparse.SUPPRESS) and not told
        return super()._get_help_string(action) if shown else action.help

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for part in text.splitlines() for line in super(_HelpFormatter, self)._split_lines(part, width)]


class _ShortFormatter(_HelpFormatter):
    """One line for most flags: the short text where a flag has one, and the last word of its name for its value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        brief = is_basic(action)
        return brief if isinstance(brief, str) else super()._get_help_string(action)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs in (0, "?"):
            return super()._format_args(action, default_metavar)
        if action.metavar is not None and not action.metavar.startswith("{"):
            word = action.metavar
        else:
            word = "PATH" if getattr(action.type, "__name__", "") == "Path" else default_metavar.rpartition("_")[2]
        return word + (" ..." if action.nargs in ("+", "*") else "")


def set_basic(action: argparse.Action, basic: bool | str) -> None:
    """Let the short help tell of a flag, with its own help or with a shorter text."""
    action.basic = basic


def is_basic(action: argparse.Action) -> bool | str:
    """What `set_basic` was told; False for a flag of which only the whole help tells."""
    return getattr(action, "basic", False)


class _Help(argparse.Action):
    """Prints the help and ends; behind the word `all`, or where that is the `const`, the whole of it."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Called by argparse."""
        whole = "all" in (values, self.const) or not parser.short
        print(parser.format_help() if whole else parser.format_short_help(), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with code 2. Flags must be written out in full.

    In place of every `_` in a flag's name a `-` is read too, and the other way round. It has the flag that every script
    has, `--quiet`. `usage`: what follows the script's name in the first line of the help. With `short`, `--help` tells
    of what is `set_basic` alone, and `--help-all` of everything.
    """

    def __init__(self, description: str, epilog: str | None = None, usage: str = "[flags]", short: bool = False):
        super().__init__(
            description=description,
            epilog=epilog,
            usage=f"%(prog)s {usage}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.short = short
        what = "show these flags; --help all, or --help-all: every flag" if short else "show this"
        how = {"nargs": "?", "metavar": "all"} if short else {"nargs": 0}
        shown = self.add_argument("-h", "--help", action=_Help, default=argparse.SUPPRESS, help=what, **how)
        quiet = self.add_argument(
            "--quiet", action="store_true", help="say only results and what goes wrong; log.txt has everything"
        )
        set_basic(shown, True)
        set_basic(quiet, True)
        if short:
            how = {"nargs": 0, "const": "all", "default": argparse.SUPPRESS, "help": "show every flag"}
            self.add_argument("--help-all", action=_Help, **how)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse does, with either spelling of every flag."""
        names = {_plain(each): each for each in self._option_string_actions if each.startswith("--")}
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_spelled(each, names) for each in given], namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """The flags; for one that there is not, the error names the nearest one that there is."""
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            wrong = [each.partition("=")[0] for each in unknown if each.startswith("-")] or unknown
            known = [each for each in self._option_string_actions if each.startswith("--")]
            self.error(f"unrecognized {' '.join(wrong)}{did_you_mean(wrong, known)}")
        return flags

    def error(self, message: str):
        """Print one line on stderr and exit with code 2."""
        advice = "" if message.endswith("?") else f"; see {self.prog} --help"
        raise SystemExit(fail(f"{message}{advice}"))

    def format_short_help(self) -> str:
        """Usage, the first paragraph of the description, examples, and the basic flags by group."""
        formatter = _ShortFormatter(self.prog)
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description.partition("\n\n")[0])
        formatter.add_text(self.epilog)
        sections: dict[str, list[argparse.Action]] = {}
        for group in self._action_groups:  # `method, smoothing` and `method, training` are one section here
            sections.setdefault(group.title.partition(",")[0], []).extend(filter(is_basic, group._group_actions))
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


def fail(message: str) -> int:
    """Say an error in one line, and return the exit code of wrong input."""
    logging.getLogger().error("error: %s", " ".join(message.split()))
    return 2


def _plain(flag: str) -> str:
    return flag.replace("-", "_")


def _spelled(argument: str, names: dict[str, str]) -> str:
    """An argument with its flag spelled as it is in `names` (plain spelling → flag), if it is one."""
    flag, equals, value = argument.partition("=")
    return f"{names.get(_plain(flag), flag)}{equals}{value}" if flag.startswith("--") else argument
