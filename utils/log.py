"""What a run says: log lines on the console and in a file, and progress that leaves them intact.

The console is stdout for what is said and stderr for progress, warnings and errors.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from utils.errors import InputError

if TYPE_CHECKING:  # what is not installed is told by --doctor, which must begin without it
    from tqdm import tqdm

Item = TypeVar("Item")
RESULT = logging.INFO + 5  # level of what a run was asked for, which is all that a quiet console shows
FILE_FORMAT = "%(asctime)s %(message)s"
LIBRARIES = ("transformers", "datasets", "huggingface_hub", "httpx", "urllib3", "fsspec", "filelock", "matplotlib")
LIBRARY_BARS = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal, in the first minutes
PLAIN_SHARE = 0.05  # later, of the time that has passed
INNER_INTERVAL = 60.0  # the same for steps within a step


class _ConsoleHandler(logging.Handler):
    """Writes lines above whatever bar is being drawn: warnings and errors to stderr, everything else to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        number = launched_as()
        bars = sys.modules.get("tqdm")  # where nobody imported it there is no bar
        write = bars.tqdm.write if hasattr(bars, "tqdm") else print
        write(f"process {number}: {self.format(record)}" if number else self.format(record), file=stream)
        stream.flush()


def launched_as() -> int:
    """The number a launcher (torchrun, accelerate) gave this process; 0, the main one, speaks for all."""
    return int(os.environ.get("RANK", "0"))


def setup_console(quiet: bool = False) -> None:
    """Send log lines of the suite to the console, if `quiet` only results and what goes wrong.

    Quietens the libraries' own; where no bar may be drawn, theirs are not either.
    """
    console = _ConsoleHandler(RESULT if quiet else logging.INFO)
    root = logging.getLogger()
    root.handlers = [console]
    root.setLevel(logging.ERROR if launched_as() else logging.INFO)
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    if not shows_bars():
        for variable in LIBRARY_BARS:  # read when they are imported
            os.environ.setdefault(variable, "1")


def add_log_file(path: Path) -> None:
    """Also append log lines, with the time, to `path`. Raises InputError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --output_dir") from None
    handler.setFormatter(logging.Formatter(FILE_FORMAT))
    logging.getLogger().addHandler(handler)


def shows_progress() -> bool:
    """Whether this process says how far it is: the main one, unless its console is quiet."""
    consoles = [each for each in logging.getLogger().handlers if isinstance(each, _ConsoleHandler)]
    return not launched_as() and all(each.level < RESULT for each in consoles)


def shows_bars(stream: TextIO | None = None) -> bool:
    """Whether it draws bars on `stream` (stderr) for that, which needs a terminal."""
    return shows_progress() and (stream or sys.stderr).isatty()


def meter(
    total: int, label: str, unit: str = "it", inner: bool = False, stream: TextIO | None = None
) -> "tqdm | _PlainMeter":
    """Counts `total` steps on `stream` (stderr): a bar on a terminal, else a line now and then; nothing if quiet.

    A context manager; `update` for every step that is done, `set_postfix_str` for what to show behind the count.
    `inner`: of steps within those of another meter; its bar is below that one's.
    """
    from tqdm import tqdm

    shown, settings = shows_progress(), {"total": total, "desc": label, "unit": unit}
    if not shown or shows_bars(stream):
        return tqdm(
            **settings, file=stream, dynamic_ncols=True, leave=False, position=1 if inner else None, disable=not shown
        )
    return _PlainMeter(total, label, unit, INNER_INTERVAL if inner else PLAIN_INTERVAL, stream)


def progress(items: Iterable[Item], label: str, unit: str = "it", total: int | None = None) -> Iterator[Item]:
    """Iterate over `items`, counting them with a `meter`; `total`: how many there are, if they have no length."""
    with meter(len(items) if total is None else total, label, unit) as bar:
        for item in items:
            yield item
            bar.update()


class _PlainMeter:
    """A meter for streams that are no terminal: whole lines, fewer and fewer as the work takes longer."""

    def __init__(self, total: int, label: str, unit: str, interval: float, stream: TextIO | None):
        self.total, self.label, self.unit, self.interval = total, label, unit, interval
        self.stream, self.done, self.postfix = stream, 0, ""
        self.started = self.reported = time.monotonic()

    def __enter__(self) -> "_PlainMeter":
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is left to be cleared."""

    def set_postfix_str(self, s: str = "") -> None:
        """Show `s` behind the count."""
        self.postfix = s

    def update(self, n: int = 1) -> None:
        """`n` more steps are done."""
        self.done += n
        now = time.monotonic()
        passed = now - self.started
        if now - self.reported >= max(self.interval, PLAIN_SHARE * passed):
            from tqdm import tqdm

            form = {"prefix": self.label, "unit": self.unit, "postfix": self.postfix or None}
            print(tqdm.format_meter(self.done, self.total, passed, **form), file=self.stream or sys.stderr)
            self.reported = now
