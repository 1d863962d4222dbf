"""The one exception that a user's input can cause."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what is wrong and what to do.

    The scripts print it on stderr and exit with code 2. Every other exception is a defect of ours and keeps its
    traceback.
    """
