"""Exceptions that are no defects of ours: what a user's input can cause, and a run that is not whole."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what is wrong and what to do.

    The scripts print it on stderr and exit with code 2. Every other exception is a defect of ours and keeps its
    traceback.
    """


class Missing(InputError):
    """Something that a run needs is not there, or there is too little of it: a plan (`--dry_run`) goes on without."""


@contextmanager
def noting(missing: list[str] | None, what: str = "") -> Iterator[None]:
    """Inside the block what is `Missing` for `what` joins the list and ends the block; without a list it is raised."""
    try:
        yield
    except Missing as error:
        if missing is None:
            raise
        missing.append(f"{what}: {error}" if what else str(error))


class Incomplete(RuntimeError):
    """The run came to its end and wrote its results, but some of its evaluations failed; exit code 1, no traceback."""
