"""What several groups of flags share: lists of names, and flags that do nothing alone."""

import argparse
from pathlib import Path

from utils.errors import InputError


def names(text: str) -> list[str]:
    """The parts of a comma-separated list; a path that exists is not split."""
    return [text] if Path(text).exists() else [name for name in text.split(",") if name]


class Flatten(argparse.Action):
    """Stores a list of lists as one list."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Called by argparse."""
        setattr(namespace, self.dest, [name for names in values for name in names])


NAME_LIST = {"type": names, "action": Flatten}  # of a flag: names separated by spaces or commas


def refuse_idle(needed: str, present: object, **given: object) -> None:
    """Raise InputError for the first flag that is `given` although the flag `needed`, without which it is idle, is not.

    By name, with underscores: `refuse_idle("tasks", self.tasks, log_samples=self.log_samples)`.
    """
    for flag, value in given.items():
        if value and not present:
            raise InputError(f"--{flag} is for --{needed}: add it, or leave this out")
