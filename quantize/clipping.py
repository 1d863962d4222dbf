"""A clip that is trained: from the range a weight has to the range that is quantized."""

import torch
from torch import Tensor, nn

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982: training starts near the unclipped range


class LearnedClip(nn.Module):
    """Both ends multiplied by the sigmoid of trainable logits, one pair per range (learnable weight clipping).

    `shape` is that of the ranges, for example [output channels, 1]. Source: OmniQuant, sec. 3.2; DuQuant uses it as
    LWC.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.high_logit = nn.Parameter(torch.full(shape, INITIAL_LOGIT))
        self.low_logit = nn.Parameter(torch.full(shape, INITIAL_LOGIT))

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sigmoid(β)·low, sigmoid(γ)·high)."""
        return self.low_logit.sigmoid() * low, self.high_logit.sigmoid() * high

    def logits(self) -> tuple[Tensor, Tensor]:
        """Detached copies of the logits (low, high)."""
        return self.low_logit.detach().clone(), self.high_logit.detach().clone()

    @torch.no_grad()
    def set_(self, low: Tensor, high: Tensor) -> None:
        """Set both logits."""
        self.low_logit.copy_(low)
        self.high_logit.copy_(high)
