"""The transform of one input group: y = x Wᵀ = T(x Λ⁻¹) · T(W Λ)ᵀ, exact because T is orthogonal."""

import torch
from torch import Tensor, nn

from duquant.tensors import row_parts, widen


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
        x = widen(x)
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
        weight = widen(weight)
        return self._apply_orthogonal(weight if self.scale is None else weight * self.scale.to(weight.dtype))

    def inverse(self, y: Tensor) -> Tensor:
        """The x with `forward(x) == y`, [..., C]."""
        y = widen(y)
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
                x = x.index_select(-1, self.permutations[index])
        return x

    def extra_repr(self) -> str:
        """Show the block size, the number of rotations and where the scale is."""
        return f"rotations={tuple(self.rotations.shape)}, online_scale={self.scale is not None}"


def rotate_blocks(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply every block of B channels of `x` [..., C] by `rotation` [B, B]: x · diag(R, …, R)."""
    return (x.reshape(-1, len(rotation)) @ rotation.to(x.dtype)).view(x.shape)
