"""Integer products, and what chooses among the ways to compute them.

`reference` is the oracle; `cpu` and `triton` are kernels for devices. A kernel is used where the machine has what it
needs and, tried once on a small product, it gives what the reference gives. `fused` is fake quantization in one kernel,
and the rotations before it.
"""

import logging
from functools import cache

import torch

from duquant.formats import Codes, IntegerFormat, Parameters
from duquant.ops import reference
from duquant.ops.base import Kernel
from duquant.ops.cpu import ByteKernel
from duquant.ops.triton import TritonKernel, available
from duquant.packing import code_sums, pack
from duquant.quantizer import Quantizer

logger = logging.getLogger(__name__)
TRIAL = (7, 64, 48)  # rows, channels and outputs of the product on which a kernel is tried
TRIAL_ERROR = 1e-4  # of the largest output


@cache
def kernel_for(device: str) -> Kernel | None:
    """The kernel of a type of device ("cpu", "cuda"), tried; None where there is none. Which it is, is logged once."""
    kernel = None
    if device == "cpu" and ByteKernel.available():
        kernel = ByteKernel()
    elif device == "cuda" and available(torch.device(device)):
        kernel = TritonKernel()
    if kernel is None:
        logger.info("no kernel multiplies integers on %s here: linears multiply decoded weights", device)
        return None
    try:
        error = trial_error(kernel, torch.device(device))
    except (RuntimeError, NotImplementedError) as problem:
        error, reason = float("inf"), str(problem).splitlines()[0]
    else:
        reason = f"its outputs are {error:.1e} off"
    if error > TRIAL_ERROR:
        logger.warning("the kernel %s does not work here (%s): linears multiply decoded weights", kernel.name, reason)
        return None
    logger.info("linears multiply integers: %s", kernel.name)
    return kernel


def trial_error(kernel: Kernel, device: torch.device) -> float:
    """How far `kernel` is from the reference on a small product of 4 bits, in shares of its largest output."""
    rows, channels, outputs = TRIAL
    form, generator = IntegerFormat(4), torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, generator=generator).to(device)
    values = torch.randint(0, 16, (outputs, channels), generator=generator, dtype=torch.uint8)
    scale, zero = torch.rand(outputs, 1, generator=generator), torch.full((outputs, 1), 7.0)
    packed = pack(Codes(values, *Parameters(scale, zero)), form).to(device)
    codes = kernel.encode(x, torch.nn.Identity(), None, Quantizer(form))
    exact = reference.linear(codes.codes, packed, form)
    weights = [kernel.prepare(packed, code_sums(packed, form), form, keep) for keep in (False, True)]
    errors = [kernel.linear(codes, weight, None, torch.float32) - exact for weight in weights]
    return (torch.stack(errors).abs().max() / exact.abs().max()).item()
