"""Finding the transform of one input group: builders, by name, that look at a probe; a new transform is one builder."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from duquant.hadamard import hadamard
from duquant.tensors import widen
from duquant.transform import rotate_blocks
from quantize.greedy import greedy_rotation
from quantize.permutation import zigzag_permutation
from quantize.rotation import random_orthogonal, step_rotation
from quantize.rotation_settings import RotationSettings, Transform


@dataclass(frozen=True)
class Stage:
    """The probe after one transformation: its largest magnitude, and how unevenly channel peaks are spread.

    `spread` is the largest mean channel peak of a block over the mean of all blocks: 1 is even.
    """

    name: str
    peak: float
    spread: float


@dataclass(frozen=True)
class TransformSearch:
    """A transform found for a probe: T's parts, the stages the probe went through, and the steps each rotation kept.

    `peaks`: of every rotation's search, max − min at the start and after each step.
    """

    rotations: Tensor
    permutations: Tensor
    stages: tuple[Stage, ...]
    steps: tuple[int, ...]
    peaks: tuple[Tensor, ...] = ()


TransformBuilder = Callable[[Tensor, int, RotationSettings, torch.Generator], TransformSearch]


class Trail:
    """A probe on its way through rotations and permutations, and the record of what was done to it."""

    def __init__(self, x: Tensor, block_size: int):
        self.x, self.block_size = widen(x), block_size
        self.rotations: list[Tensor] = []
        self.permutations: list[Tensor] = []
        self.stages: list[Stage] = []
        self.steps: list[int] = []
        self.peaks: list[Tensor] = []

    def rotate(self, name: str, rotation: Tensor) -> None:
        """Multiply every block by `rotation` [B, B]."""
        self.rotations.append(rotation)
        self.x = rotate_blocks(self.x, rotation)
        self.stages.append(measure_stage(name, self.x, self.block_size))

    def rotate_greedily(self, config: RotationSettings, generator: torch.Generator) -> None:
        """Search a rotation that lowers the peak, and apply it."""
        step = step_rotation(random_orthogonal(self.block_size, generator), config.order)
        search = greedy_rotation(self.x, step, config.steps, config.rule, config.rows)
        self.steps.append(len(search.exchanges))
        self.peaks.append(search.peaks)
        self.rotate(f"rotation {len(self.steps)}", search.rotation)

    def permute(self, permutation: Tensor | None = None) -> None:
        """Permute the channels, by default in zigzag. Behind no rotation of its own it stands behind the identity."""
        self._complete_rotations()
        zigzag = permutation is None
        self.permutations.append(zigzag_permutation(channel_peak(self.x), self.block_size) if zigzag else permutation)
        self.x = self.x[..., self.permutations[-1]]
        name = f"permutation {len(self.permutations)}"
        self.stages.append(measure_stage(name, self.x, self.block_size))

    def result(self) -> TransformSearch:
        """All of it."""
        self._complete_rotations()
        none = torch.empty(0, self.x.shape[-1], dtype=torch.int64, device=self.x.device)
        permutations = torch.stack(self.permutations) if self.permutations else none
        records = (tuple(self.stages), tuple(self.steps), tuple(self.peaks))
        return TransformSearch(torch.stack(self.rotations), permutations, *records)

    def _complete_rotations(self) -> None:
        if len(self.rotations) == len(self.permutations):
            self.rotations.append(torch.eye(self.block_size, device=self.x.device))


def search_dual_transform(
    x: Tensor, block_size: int, config: RotationSettings, generator: torch.Generator
) -> TransformSearch:
    """Find `permutation_times` pairs of greedy rotation and zigzag permutation, then a last rotation, on `x` [..., C].

    Source: DuQuant, sec. 3.2 and 3.3.
    """
    trail = Trail(x, block_size)
    for _ in range(config.permutation_times):
        trail.rotate_greedily(config, generator)
        trail.permute()
    trail.rotate_greedily(config, generator)
    return trail.result()


def search_rotation_permutation(
    x: Tensor, block_size: int, config: RotationSettings, generator: torch.Generator
) -> TransformSearch:
    """The same pairs, at least one, without the last rotation. Same arguments as every builder."""
    trail = Trail(x, block_size)
    for _ in range(max(1, config.permutation_times)):
        trail.rotate_greedily(config, generator)
        trail.permute()
    return trail.result()


def search_rotation(
    x: Tensor, block_size: int, config: RotationSettings, generator: torch.Generator
) -> TransformSearch:
    """One greedy rotation. Same arguments as every builder."""
    trail = Trail(x, block_size)
    trail.rotate_greedily(config, generator)
    return trail.result()


def search_permutation(
    x: Tensor, block_size: int, config: RotationSettings, generator: torch.Generator
) -> TransformSearch:
    """One zigzag permutation: without a rotation between them a second one has nothing to add. Same arguments."""
    trail = Trail(x, block_size)
    trail.permute()
    return trail.result()


def hadamard_transform(
    x: Tensor, block_size: int, config: RotationSettings, generator: torch.Generator
) -> TransformSearch:
    """D·H in every block: the orthonormal Hadamard matrix behind random signs D. Same arguments as every builder.

    It looks at nothing: the signs keep an activation that happens to be a row of H from becoming one large entry. Where
    no Hadamard matrix of the block's size is at hand, `hadamard` says what stands in. Source: QuaRot, sec. 3.
    """
    trail = Trail(x, block_size)
    trail.rotate("Hadamard", random_hadamard(block_size, generator).to(x.device))
    return trail.result()


def two_hadamard_transform(
    x: Tensor, block_size: int, config: RotationSettings, generator: torch.Generator
) -> TransformSearch:
    """D₁·H in every block, a permutation that deals each block's channels to all blocks, D₂·H. Same arguments.

    Behind it every channel is a mixture of (nearly) all channels, as one Hadamard matrix of the whole width would make
    it, for the price of two blocks and at every width. It looks at nothing.
    """
    trail = Trail(x, block_size)
    trail.rotate("Hadamard 1", random_hadamard(block_size, generator).to(x.device))
    trail.permute(deal(x.shape[-1], block_size).to(x.device))
    trail.rotate("Hadamard 2", random_hadamard(block_size, generator).to(x.device))
    return trail.result()


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """D·H [size, size]: the orthonormal Hadamard matrix behind random signs."""
    signs = torch.randint(2, (size, 1), generator=generator) * 2.0 - 1.0
    return signs * hadamard(size)


def deal(channels: int, block_size: int) -> Tensor:
    """The permutation [channels], int64, that deals the channels out to the blocks in turn, one to each."""
    return torch.arange(channels).view(block_size, -1).T.flatten()


def no_transform(x: Tensor, block_size: int, config: RotationSettings, generator: torch.Generator) -> TransformSearch:
    """The identity: what round-to-nearest and smoothing alone use. Same arguments as every builder."""
    rotations = torch.empty(0, block_size, block_size, device=x.device)
    permutations = torch.empty(0, x.shape[-1], dtype=torch.int64, device=x.device)
    return TransformSearch(rotations, permutations, (), ())


TRANSFORMS: dict[Transform, TransformBuilder] = {
    Transform.DUAL: search_dual_transform,
    Transform.ROTATION_PERMUTATION: search_rotation_permutation,
    Transform.PERMUTE_ROTATE: search_rotation,  # of channels that were put into order upstream
    Transform.ROTATION: search_rotation,
    Transform.PERMUTATION: search_permutation,
    Transform.TWO_HADAMARD: two_hadamard_transform,
    Transform.HADAMARD: hadamard_transform,
    Transform.NONE: no_transform,
}


def channel_peak(x: Tensor) -> Tensor:
    """Largest magnitude of every channel of `x` [..., C]: [C]."""
    return x.abs().flatten(0, -2).amax(dim=0)


def measure_stage(name: str, x: Tensor, block_size: int) -> Stage:
    """The figures of one stage for `x` [..., C]."""
    peaks = channel_peak(x).float()
    blocks = peaks.view(-1, block_size).mean(dim=1)
    return Stage(name, *torch.stack([peaks.max(), blocks.max() / blocks.mean().clamp(min=1e-30)]).tolist())
