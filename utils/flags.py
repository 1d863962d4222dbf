"""What groups of flags share: lists of names, flags that do nothing alone, and what a wrong word was meant to be."""

import argparse
import difflib
from collections.abc import Sequence
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


class BehindWord(argparse.Action):
    """Stores the last of at most two values; in front of it the word `const` may stand, which says what it is of."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Called by argparse."""
        *words, value = values
        given = " ".join(str(word) for word in words)
        if given not in ("", self.const):
            raise argparse.ArgumentError(self, f"{given} is not known; give {self.const} and one value")
        if str(value) == self.const:
            raise argparse.ArgumentError(self, f"a value is missing behind {self.const}")
        setattr(namespace, self.dest, value)


NAME_LIST = {"type": names, "action": Flatten}  # of a flag: names separated by spaces or commas


def refuse_idle(needed: str, present: object, **given: object) -> None:
    """Raise InputError for the first flag that is `given` although the flag `needed`, without which it is idle, is not.

    By name, with underscores: `refuse_idle("tasks", self.tasks, log_samples=self.log_samples)`.
    """
    for flag, value in given.items():
        if value and not present:
            raise InputError(f"--{flag} is for --{needed}: add it, or leave this out")


def did_you_mean(words: Sequence[str], known: Sequence[str]) -> str:
    """`; did you mean A, B?` of those `known` that the wrong `words` are near to, or begin; empty where none is."""
    near = {}
    for word in words:
        begun = [each for each in known if each.startswith(word) and word.strip("-")]
        near |= dict.fromkeys(begun[:1] or difflib.get_close_matches(word, known, n=1, cutoff=0.7))
    return f"; did you mean {', '.join(near)}?" if near else ""
