"""Exceptions that are no defects of ours: what a user's input can cause, and a run that is not whole."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what is wrong and what to do.

    The scripts print it on stderr and exit with code 2. Every other exception is a defect of ours and keeps its
    traceback.
    """


class Incomplete(RuntimeError):
    """The run came to its end and wrote its results, but some of its evaluations failed; exit code 1, no traceback."""
