"""Settings of transforms: which there are, their blocks, and how rotations are searched."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from utils.errors import InputError
from utils.settings import option

USUAL_BLOCK = 128  # the paper's block size
AUTO_BLOCK_LIMIT = 128  # what `--block_size auto` does not exceed


class Transform(StrEnum):
    """What is done to an activation beside smoothing; `quantize.transforms.TRANSFORMS` has the builders."""

    DUAL = "dual"  # rotation, permutation, rotation: DuQuant
    ROTATION_PERMUTATION = "rotation_permutation"  # DuQuant without the last rotation
    PERMUTE_ROTATE = "permute_rotate"  # the permutation, folded upstream, then one greedy rotation
    ROTATION = "rotation"  # the greedy rotation alone
    PERMUTATION = "permutation"  # the zigzag permutation alone
    TWO_HADAMARD = "two_hadamard"  # two of them, and between them a permutation that deals every block to all blocks
    HADAMARD = "hadamard"  # a Hadamard matrix with random signs per block, not searched
    NONE = "none"  # nothing: round-to-nearest, or smoothing alone

    @property
    def rotates(self) -> bool:
        """Whether it has a rotation; then q and k get a Hadamard of the head too."""
        return self not in (Transform.NONE, Transform.PERMUTATION)

    @property
    def orders_channels(self) -> bool:
        """Whether channels are put into another order upstream, where that is exact."""
        return self is Transform.PERMUTE_ROTATE

    def permutations(self, times: int) -> int:
        """How many permutations it has under `--permutation_times` that are applied to activations."""
        counts = {Transform.DUAL: times, Transform.ROTATION_PERMUTATION: max(1, times), Transform.PERMUTATION: 1}
        counts[Transform.TWO_HADAMARD] = 1
        return counts.get(self, 0)

    def rotations(self, times: int) -> int:
        """How many matrices it has: one before, between and behind the permutations, if need be the identity."""
        return 0 if self is Transform.NONE else self.permutations(times) + 1

    def searches(self, times: int) -> int:
        """How many of its matrices are searched greedily."""
        counts = {Transform.DUAL: times + 1, Transform.ROTATION_PERMUTATION: max(1, times)}
        counts |= {Transform.ROTATION: 1, Transform.PERMUTE_ROTATE: 1}
        return counts.get(self, 0)


class SearchRule(StrEnum):
    """Which index the greedy search exchanges with index 0 before it applies the base rotation."""

    CHANNEL = "channel"  # the outlier's channel inside its block (the paper)
    ROW = "row"  # the outlier's row number modulo the block size (the original code)


class RotationOrder(StrEnum):
    """How the base rotation R̃ and the random orthogonal Q = diag(1, q) are combined."""

    RQ = "RQ"  # R̃ Q (the paper): mixes the columns of R̃, so its constant first row is lost
    QR = "QR"  # Q R̃: the first row stays the constant 1/√B


class GivenSize(int):
    """A block size that was named on the command line, and so must divide every width.

    Where it does, it is its number: in comparisons, in JSON, in identities and in names of folders.
    """


def _number_or(word: str, kind: type[int]) -> Callable[[str], int | None]:
    """Reads a flag's value: a number, or None for the `word`."""

    def read(text: str) -> int | None:
        if text != word and not text.lstrip("-").isdigit():
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {word}")
        return None if text == word else kind(text)

    return read


@dataclass(frozen=True)
class RotationSettings:
    """The dual transformation's search. `block_size` None means auto, -1 the whole width.

    The default, unless a `GivenSize` names it, is auto for the widths that it does not divide.
    """

    TITLE: ClassVar[str] = "method, rotation and permutation"

    block_size: int | None = option(
        USUAL_BLOCK,
        "channels per block; -1: the whole width; auto: at most 128 (default: 128, and auto for a width that it does "
        "not divide)",
        tag="b",
        basic="channels per block, or auto (default: 128)",
        type=_number_or("auto", GivenSize),
    )
    steps: int = option(256, "greedy steps per rotation", flag="max_rotation_step", tag="steps")
    permutation_times: int = option(1, "(rotation, permutation) pairs before the last", tag="p")
    rule: SearchRule = option(
        SearchRule.CHANNEL,
        "what a step exchanges: the outlier's channel (paper) or its row number (the original code)",
        flag="rotation_search",
        tag="rule_",
    )
    order: RotationOrder = option(
        RotationOrder.RQ, "base rotation times random rotation (paper), or the reverse", flag="rotation_order", tag=""
    )
    rows: int | None = option(
        None,
        "a number: only so many rows of the probe (a token's channels in one block) take part in the search of a "
        "rotation, the longest ones: faster, and at most a little worse (default: all)",
        flag="search_rows",
        tag="rows_",
        type=_number_or("all", int),
        metavar="N|all",
    )

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size != -1 and self.block_size < 2:
            raise InputError(f"--block_size {self.block_size}: must be at least 2, -1 (the whole width) or auto")
        if self.steps < 0:
            raise InputError(f"--max_rotation_step {self.steps}: must not be negative")
        if self.permutation_times < 0:
            raise InputError(f"--permutation_times {self.permutation_times}: must not be negative")
        if self.rows is not None and self.rows < 1:
            raise InputError(f"--search_rows {self.rows}: must be at least 1, or all")

    def block_size_for(self, channels: int) -> int:
        """Channels per block of an activation with that many channels; it need not divide (see `quantize.widths`)."""
        if self.block_size == -1:
            return channels
        yields = self.block_size == USUAL_BLOCK and not isinstance(self.block_size, GivenSize)
        if self.block_size is None or (yields and channels % USUAL_BLOCK):
            return max(size for size in range(1, AUTO_BLOCK_LIMIT + 1) if channels % size == 0)
        return int(self.block_size)
