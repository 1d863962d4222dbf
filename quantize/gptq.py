"""GPTQ: weights are rounded column by column, and the columns that are left take up the error of the output."""

import logging
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from duquant.formats import Codes, Format, Parameters
from quantize import gptq_kernel
from utils.captured import Captured

BLOCK = 64  # columns between two updates of all that follow: the work inside a block stays in the caches
MORE_DAMPING = 10.0  # factor, where a Hessian is not positive definite
LARGEST_DAMPING = 1e6  # then rounding one column has next to no effect on the others: nearest rounding

logger = logging.getLogger(__name__)


def gptq(weight: Tensor, hessian: Tensor, parameters: Parameters, form: Format, damping: float, name: str) -> Tensor:
    """The codes [O, C] of `weight` [O, C], whose scales and zeros [O, 1] or [O, C] are fixed; those of H = X̂ᵀX̂ [C, C].

    Minimises ‖(W − Ŵ) X̂ᵀ‖² greedily, in the order of falling diag H: behind the rounding of column j each later column
    k takes −(w_j − ŵ_j) U_jk / U_jj with U the upper Cholesky factor of H⁻¹. `name` is for the log, which says where H
    needed more than `damping` (a share of its mean diagonal). Source: Frantar et al., GPTQ, algorithm 1.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping, name).to(weight.dtype)
    left, codes = weight[:, order], torch.empty(weight.shape, dtype=form.dtype, device=weight.device)
    scale, zero = ((each if each.shape[1] == 1 else each[:, order]).expand_as(weight) for each in parameters)
    for start in range(0, weight.shape[1], BLOCK):
        block, rows = slice(start, start + BLOCK), factor[start : start + BLOCK]
        own = Parameters(scale[:, block], zero[:, block])
        now, errors = rounding_of(left[:, block], form)(left[:, block], *own, rows[:, block])
        codes[:, block] = form.encode(now, own).values
        left[:, block.stop :].addmm_(errors, rows[:, block.stop :], alpha=-1)
    return codes[:, order.argsort()]


def round_columns(weight: Tensor, scale: Tensor, zero: Tensor, upper: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """What is rounded of every column of `weight` [O, B] in its turn, and the errors that later blocks take up: [O, B].

    Column k takes −e_j U_jk of each column j before it, e_j = (w_j − ŵ_j) / U_jj. `scale`, `zero` [O, B]; U [B, B] is
    `upper`.
    """
    now = weight.clone(memory_format=torch.contiguous_format)
    errors = torch.empty_like(now)
    for j in range(now.shape[1]):
        rounded = form.fake(now[:, j], Parameters(scale[:, j], zero[:, j]))
        torch.sub(now[:, j], rounded, out=errors[:, j]).div_(upper[j, j])
        now[:, j + 1 :].addr_(errors[:, j], upper[j, j + 1 :], alpha=-1)
    return now, errors


def rounding_of(weight: Tensor, form: Format) -> Callable[..., tuple[Tensor, Tensor]]:
    """`round_columns` of blocks like `weight` [O, B]: on a GPU one launch, of a kernel or of what was recorded."""
    if gptq_kernel.serves(weight, form):
        return partial(gptq_kernel.round_columns, form=form)
    if weight.device.type == "cuda":
        return recorded_rounding(tuple(weight.shape), weight.dtype, weight.device, form)
    return partial(round_columns, form=form)


@lru_cache(maxsize=16)
def recorded_rounding(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, form: Format) -> Captured:
    """`round_columns` on a GPU as one launch."""
    block = torch.ones(shape, dtype=dtype, device=device)
    upper = torch.eye(shape[1], dtype=dtype, device=device)
    return Captured(partial(round_columns, form=form), block, block, block, upper)


def inverse_factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """U [C, C], upper triangular with UᵀU = (H/m + damping · I)⁻¹ and m = mean diag H, in float64; always finite.

    Where that is not positive definite, the damping grows until it is, and the log says so. A Hessian of zeros counts
    as I. The factor m of the inverse is left out: rounding needs ratios within a row of U alone.
    """
    hessian = hessian.double()
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    hessian, used = (hessian / mean, damping) if mean > 0 else (identity, damping)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + used * identity)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                break
        if used >= LARGEST_DAMPING:
            logger.warning("%s: its Hessian cannot be factorised at all; every weight is rounded by itself", name)
            return identity
        used *= MORE_DAMPING
    if used > damping:
        logger.warning("%s: its Hessian is not positive definite; damping %g instead of %g", name, used, damping)
    return upper


def gptq_codes(
    weight: Tensor, hessian: Tensor, parameters: Parameters, form: Format, damping: float, name: str
) -> Codes:
    """`gptq` for parameters [O, 1], or [O, C/g, 1] where groups of g channels have ranges of their own."""
    scale, zero = parameters
    if scale.dim() == 2:
        return Codes(gptq(weight, hessian, parameters, form, damping, name), *parameters)
    size = weight.shape[1] // scale.shape[1]
    spread = Parameters(*(each.expand(-1, -1, size).flatten(1) for each in parameters))
    return Codes(gptq(weight, hessian, spread, form, damping, name).unflatten(1, (-1, size)), scale, zero)
