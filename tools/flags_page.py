"""Write docs/flags.md from the settings of main.py and compare.py: every flag, its default, and what it does.

python tools/flags_page.py              # the page
python tools/flags_page.py --check      # say whether it is as it would be written; exit code 2 if not
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiment.cli import Parser, run_script  # noqa: E402
from experiment.options import RunSettings  # noqa: E402
from experiment.rows import CompareSettings  # noqa: E402
from utils.errors import InputError  # noqa: E402
from utils.setting_flags import add_flags  # noqa: E402

PAGE = ROOT / "docs/flags.md"
HEAD = """# All flags

`python tools/flags_page.py` writes this page from the settings; `python main.py --help-all` tells the same.

What is on or off has two flags, `--<flag>` and `--no_<flag>`. A flag of one value that may have none takes the word
`none`: `--swc none`. Flags given beside `--preset` win over it. Names are those of the paper's repository where it has
them.
"""
TAIL = """
## Other scripts

| | |
|---|---|
| `compare.py RUN_A RUN_B …` | puts finished runs side by side; `--output FILE.md` writes it too |
| `compare.py RUN … --published` | puts runs and comparisons beside [published figures](protocol.md#published-figures) |
| `report.py RUN` | draws a run's report again; `--report_layers 0,1,15,31` |
| `generate_act_scale_shift.py --model M` | records activation statistics once for many experiments |
| `get_rot.py` | writes the base rotations to a file; main.py builds them in milliseconds and needs none |
| `python -m duquant D --prompt TEXT` | writes text with a saved model; `python -m duquant bench D` measures it |

Every script has `--help` and `--quiet`.
"""


def flags_of(settings: type) -> dict[str, list[tuple[str, str, str]]]:
    """Title of a group → flag with its value, default, help, of all flags of a settings class."""
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser, settings)
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        lines = [(name(action), default(action), about(action)) for action in shown]
        if lines:
            groups.setdefault(group.title, []).extend(lines)
    return groups


def name(action: argparse.Action) -> str:
    """The flag as it is mostly spelled, with the values it takes, as Markdown."""
    flag = next((each for each in action.option_strings if "-" not in each[2:]), action.option_strings[0])
    return f"`{flag}`"


def default(action: argparse.Action) -> str:
    """The default, as Markdown; nothing where there is none."""
    value = action.default
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    return "" if value in (None, "") else f"`{value}`"


def about(action: argparse.Action) -> str:
    """The help on one line; what must be one of few words has them behind it."""
    lines = [line.strip().removesuffix(";") for line in action.help.splitlines() if line.strip()]
    text = "; ".join(lines).replace(":;", ":").replace("|", "\\|").replace("%%", "%")
    words = action.metavar if isinstance(action.metavar, str) and action.metavar.startswith("{") else None
    given = words.strip("{}").split(",") if words else [str(each) for each in action.choices or ()]
    missing = [each for each in given if each not in text]
    return f"{text} ({', '.join(f'`{each}`' for each in given)})" if missing else text


def tables(groups: dict[str, list[tuple[str, str, str]]]) -> Iterator[str]:
    """A heading and a table for every group."""
    for title, lines in groups.items():
        rows = "\n".join(f"| {flag} | {value} | {text} |" for flag, value, text in lines)
        yield f"\n## {title[0].upper()}{title[1:]}\n\n| flag | default | |\n|---|---|---|\n{rows}\n"


def page() -> str:
    """The whole page."""
    ours = flags_of(RunSettings)
    known = {line[0] for lines in ours.values() for line in lines}
    theirs = {
        title: [line for line in lines if line[0] not in known] for title, lines in flags_of(CompareSettings).items()
    }
    only = {f"{title}: compare.py alone": lines for title, lines in theirs.items() if lines}
    return HEAD + "".join(tables(ours | only)) + TAIL


def parse_flags() -> argparse.Namespace:
    """The command line's flags."""
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 2 if the page is an older one")
    return parser.parse_args()


def main(flags: argparse.Namespace) -> None:
    """Write the page, or look at it."""
    if not flags.check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        raise InputError(f"{PAGE.name}: is not what the settings say now; write it with python tools/flags_page.py")


if __name__ == "__main__":
    run_script(parse_flags, main)
