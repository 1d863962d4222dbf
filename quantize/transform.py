"""The transform of one input group: y = x Wᵀ = T(x Λ⁻¹) · T(W Λ)ᵀ, exact because T is orthogonal.

`TRANSFORMS` maps the name on the command line to the builder that finds T for a probe; a new transform is one builder.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.config import RotationConfig, Transform
from quantize.greedy import greedy_rotation
from quantize.permutation import zigzag_permutation
from quantize.rotation import hadamard, random_orthogonal, step_rotation
from utils.batching import row_parts


class DualTransform(nn.Module):
    """T: x ↦ x·R̂₁·P₁·R̂₂·…·R̂ₙ₊₁ along the last axis, with an optional online scale Λ before it.

    Buffers: `rotations` [n+1, B, B], each applied to every block of B channels; `permutations` [n, C]; `scale` [C] or
    None when smoothing was folded upstream. No rotations at all make T the identity. Outputs are at least float32.
    """

    def __init__(self, rotations: Tensor, permutations: Tensor, scale: Tensor | None = None):
        super().__init__()
        self.register_buffer("rotations", rotations)
        self.register_buffer("permutations", permutations)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """T(x Λ⁻¹) for an activation [..., C]; never changes `x`."""
        x = _widen(x)
        return self._apply_orthogonal(x if self.scale is None else x / self.scale.to(x.dtype))

    def transform_weight(self, weight: Tensor) -> Tensor:
        """T(W Λ) for a weight [O, C], some rows at a time: beside the result there are no other large tensors."""
        parts = row_parts(weight)
        if len(parts) == 1:
            return self._transform_rows(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        transformed = torch.empty(weight.shape, dtype=wide, device=weight.device)
        for part in parts:
            transformed[part] = self._transform_rows(weight[part])
        return transformed

    def _transform_rows(self, weight: Tensor) -> Tensor:
        weight = _widen(weight)
        return self._apply_orthogonal(weight if self.scale is None else weight * self.scale.to(weight.dtype))

    def inverse(self, y: Tensor) -> Tensor:
        """The x with `forward(x) == y`, [..., C]."""
        y = _widen(y)
        for index in reversed(range(len(self.rotations))):
            if index < len(self.permutations):
                y = y[..., torch.argsort(self.permutations[index])]
            y = rotate_blocks(y, self.rotations[index].T)
        return y if self.scale is None else y * self.scale.to(y.dtype)

    def dense(self) -> Tensor:
        """T as one orthogonal matrix [C, C], without Λ: `x @ dense() == T(x)`. For tests and reports."""
        return self._apply_orthogonal(torch.eye(self.permutations.shape[-1], device=self.permutations.device))

    def _apply_orthogonal(self, x: Tensor) -> Tensor:
        for index, rotation in enumerate(self.rotations):
            x = rotate_blocks(x, rotation)
            if index < len(self.permutations):
                x = x[..., self.permutations[index]]
        return x

    def extra_repr(self) -> str:
        """Show the block size, the number of rotations and where the scale is."""
        return f"rotations={tuple(self.rotations.shape)}, online_scale={self.scale is not None}"


def rotate_blocks(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply every block of B channels of `x` [..., C] by `rotation` [B, B]: x · diag(R, …, R)."""
    return (x.reshape(-1, len(rotation)) @ rotation.to(x.dtype)).view(x.shape)


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


TransformBuilder = Callable[[Tensor, int, RotationConfig, torch.Generator], TransformSearch]


class Trail:
    """A probe on its way through rotations and permutations, and the record of what was done to it."""

    def __init__(self, x: Tensor, block_size: int):
        self.x, self.block_size = _widen(x), block_size
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

    def rotate_greedily(self, config: RotationConfig, generator: torch.Generator) -> None:
        """Search a rotation that lowers the peak, and apply it."""
        step = step_rotation(random_orthogonal(self.block_size, generator), config.order)
        search = greedy_rotation(self.x, step, config.steps, config.rule)
        self.steps.append(len(search.exchanges))
        self.peaks.append(search.peaks)
        self.rotate(f"rotation {len(self.steps)}", search.rotation)

    def permute(self) -> None:
        """Deal the channels to blocks in zigzag. Behind no rotation of its own it stands behind the identity."""
        self._complete_rotations()
        self.permutations.append(zigzag_permutation(channel_peak(self.x), self.block_size))
        self.x = self.x[..., self.permutations[-1]]
        name = f"permutation {len(self.permutations)}"
        self.stages.append(measure_stage(name, self.x, self.block_size))

    def found(self) -> TransformSearch:
        """All of it."""
        self._complete_rotations()
        none = torch.empty(0, self.x.shape[-1], dtype=torch.int64, device=self.x.device)
        permutations = torch.stack(self.permutations) if self.permutations else none
        figures = (tuple(self.stages), tuple(self.steps), tuple(self.peaks))
        return TransformSearch(torch.stack(self.rotations), permutations, *figures)

    def _complete_rotations(self) -> None:
        if len(self.rotations) == len(self.permutations):
            self.rotations.append(torch.eye(self.block_size, device=self.x.device))


def search_dual_transform(
    x: Tensor, block_size: int, config: RotationConfig, generator: torch.Generator
) -> TransformSearch:
    """Find `permutation_times` pairs of greedy rotation and zigzag permutation, then a last rotation, on `x` [..., C].

    Source: DuQuant, sec. 3.2 and 3.3.
    """
    trail = Trail(x, block_size)
    for _ in range(config.permutation_times):
        trail.rotate_greedily(config, generator)
        trail.permute()
    trail.rotate_greedily(config, generator)
    return trail.found()


def search_rotation_permutation(
    x: Tensor, block_size: int, config: RotationConfig, generator: torch.Generator
) -> TransformSearch:
    """The same pairs, at least one, without the last rotation. Same arguments as every builder."""
    trail = Trail(x, block_size)
    for _ in range(max(1, config.permutation_times)):
        trail.rotate_greedily(config, generator)
        trail.permute()
    return trail.found()


def search_rotation(x: Tensor, block_size: int, config: RotationConfig, generator: torch.Generator) -> TransformSearch:
    """One greedy rotation. Same arguments as every builder."""
    trail = Trail(x, block_size)
    trail.rotate_greedily(config, generator)
    return trail.found()


def search_permutation(
    x: Tensor, block_size: int, config: RotationConfig, generator: torch.Generator
) -> TransformSearch:
    """One zigzag permutation: without a rotation between them a second one has nothing to add. Same arguments."""
    trail = Trail(x, block_size)
    trail.permute()
    return trail.found()


def hadamard_transform(
    x: Tensor, block_size: int, config: RotationConfig, generator: torch.Generator
) -> TransformSearch:
    """D·H in every block: the orthonormal Hadamard matrix behind random signs D. Same arguments as every builder.

    It looks at nothing: the signs keep an activation that happens to be a row of H from becoming one large entry. Where
    no Hadamard matrix of the block's size is at hand, `hadamard` says what stands in. Source: QuaRot, sec. 3.
    """
    signs = torch.randint(2, (block_size, 1), generator=generator) * 2.0 - 1.0
    trail = Trail(x, block_size)
    trail.rotate("Hadamard", (signs * hadamard(block_size)).to(x.device))
    return trail.found()


def no_transform(x: Tensor, block_size: int, config: RotationConfig, generator: torch.Generator) -> TransformSearch:
    """The identity: what round-to-nearest and smoothing alone use. Same arguments as every builder."""
    rotations = torch.empty(0, block_size, block_size, device=x.device)
    permutations = torch.empty(0, x.shape[-1], dtype=torch.int64, device=x.device)
    return TransformSearch(rotations, permutations, (), ())


TRANSFORMS: dict[Transform, TransformBuilder] = {
    Transform.DUAL: search_dual_transform,
    Transform.ROTATION_PERMUTATION: search_rotation_permutation,
    Transform.ROTATION: search_rotation,
    Transform.PERMUTATION: search_permutation,
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


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
