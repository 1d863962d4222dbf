"""What a run says: log lines on the console and in a file, and progress bars that leave them intact."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from utils.errors import InputError

Item = TypeVar("Item")
FILE_FORMAT = "%(asctime)s %(message)s"
LIBRARIES = ("transformers", "datasets", "huggingface_hub", "httpx", "urllib3", "fsspec", "filelock", "matplotlib")
PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal


class _ConsoleHandler(logging.Handler):
    """Writes lines above whatever bar is being drawn: errors to stderr, everything else to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        number = launched_as()
        tqdm.write(f"process {number}: {self.format(record)}" if number else self.format(record), file=stream)
        stream.flush()


def launched_as() -> int:
    """The number a launcher (torchrun, accelerate) gave this process; 0, the main one, speaks for all."""
    return int(os.environ.get("RANK", "0"))


def setup_console(verbose: bool = True) -> None:
    """Send log lines of the suite to the console, and quieten the libraries' own."""
    root = logging.getLogger()
    root.handlers = [_ConsoleHandler()]
    root.setLevel(logging.ERROR if launched_as() else logging.INFO if verbose else logging.WARNING)
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)


def add_log_file(path: Path) -> None:
    """Also append log lines, with the time, to `path`. Raises InputError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --output_dir") from None
    handler.setFormatter(logging.Formatter(FILE_FORMAT))
    logging.getLogger().addHandler(handler)


def inner_progress(items: Sequence[Item], label: str, unit: str = "it") -> tqdm:
    """A bar below that of `progress`; nothing at all without a terminal."""
    return tqdm(
        items,
        desc=label,
        unit=unit,
        dynamic_ncols=True,
        leave=False,
        position=1,
        disable=not sys.stderr.isatty() or launched_as() > 0,
    )


def progress(items: Sequence[Item], label: str, unit: str = "it") -> Iterator[Item]:
    """Iterate over `items` under a bar on stderr with rate and ETA; without a terminal, a line now and then instead."""
    if launched_as():
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, unit=unit, dynamic_ncols=True, leave=False)
        return
    started = reported = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - reported >= PLAIN_INTERVAL:
            print(tqdm.format_meter(done, len(items), now - started, prefix=label, unit=unit), file=sys.stderr)
            reported = now
