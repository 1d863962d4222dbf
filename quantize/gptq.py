"""GPTQ: weights are rounded column by column, and the columns that are left take up the error of the output."""

import logging

import torch
from torch import Tensor

from duquant.formats import Codes, Format, Parameters
from quantize import gptq_kernel

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
        now, own = left[:, block].clone(), Parameters(scale[:, block], zero[:, block])
        by_kernel = gptq_kernel.serves(now, form)
        errors = (gptq_kernel.round_columns_ if by_kernel else round_columns_)(now, own, rows[:, block], form)
        codes[:, block] = form.encode(now, own).values
        left[:, block.stop :].addmm_(errors, rows[:, block.stop :], alpha=-1)
    return codes[:, order.argsort()]


def round_columns_(now: Tensor, parameters: Parameters, upper: Tensor, form: Format) -> Tensor:
    """Leave in every column of `now` [O, B] what is rounded in its turn; the errors [O, B] that later blocks take up.

    Column k takes −e_j U_jk of each column j before it, e_j = (w_j − ŵ_j) / U_jj; `upper` [B, B] is U, `parameters`
    are [O, B].
    """
    errors = torch.empty_like(now)
    for j in range(now.shape[1]):
        own = Parameters(parameters.scale[:, j], parameters.zero[:, j])
        torch.sub(now[:, j], form.fake(now[:, j], own), out=errors[:, j]).div_(upper[j, j])
        now[:, j + 1 :].addr_(errors[:, j], upper[j, j + 1 :], alpha=-1)
    return errors


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
