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
from quantize.rotation import random_orthogonal, step_rotation


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
        """T(W Λ) for a weight [O, C]."""
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


def search_dual_transform(
    x: Tensor, block_size: int, config: RotationConfig, generator: torch.Generator
) -> TransformSearch:
    """Find `permutation_times` pairs of greedy rotation and zigzag permutation, then a last rotation, on `x` [..., C].

    Source: DuQuant, sec. 3.2 and 3.3.
    """
    x = _widen(x)
    rotations, permutations, stages, steps, peaks = [], [], [], [], []
    for index in range(config.permutation_times + 1):
        step = step_rotation(random_orthogonal(block_size, generator), config.order)
        search = greedy_rotation(x, step, config.steps, config.rule)
        rotations.append(search.rotation)
        steps.append(len(search.exchanges))
        peaks.append(search.peaks)
        x = rotate_blocks(x, search.rotation)
        stages.append(measure_stage(f"rotation {index + 1}", x, block_size))
        if index < config.permutation_times:
            permutations.append(zigzag_permutation(channel_peak(x), block_size))
            x = x[..., permutations[-1]]
            stages.append(measure_stage(f"permutation {index + 1}", x, block_size))
    none = torch.empty(0, x.shape[-1], dtype=torch.int64, device=x.device)
    stacked = torch.stack(permutations) if permutations else none
    return TransformSearch(torch.stack(rotations), stacked, tuple(stages), tuple(steps), tuple(peaks))


def no_transform(x: Tensor, block_size: int, config: RotationConfig, generator: torch.Generator) -> TransformSearch:
    """The identity: what round-to-nearest and smoothing alone use. Same arguments as every builder."""
    rotations = torch.empty(0, block_size, block_size, device=x.device)
    permutations = torch.empty(0, x.shape[-1], dtype=torch.int64, device=x.device)
    return TransformSearch(rotations, permutations, (), ())


TRANSFORMS: dict[Transform, TransformBuilder] = {
    Transform.DUAL: search_dual_transform,
    Transform.NONE: no_transform,
}


def channel_peak(x: Tensor) -> Tensor:
    """Largest magnitude of every channel of `x` [..., C]: [C]."""
    return x.abs().flatten(0, -2).amax(dim=0)


def measure_stage(name: str, x: Tensor, block_size: int) -> Stage:
    """The figures of one stage for `x` [..., C]."""
    peaks = channel_peak(x).float()
    blocks = peaks.view(-1, block_size).mean(dim=1)
    return Stage(name, peaks.max().item(), (blocks.max() / blocks.mean().clamp(min=1e-30)).item())


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
