"""How the linears of a quantized model compute: with decoded weights, or with integers."""

from typing import Literal, get_args

from torch import nn

from duquant.linear import linears_of

Runtime = Literal["reference", "integer"]
Expand = Literal["per_call", "once"]
RUNTIMES, EXPANSIONS = get_args(Runtime), get_args(Expand)


def set_runtime_(module: nn.Module, runtime: Runtime = "integer", expand: Expand = "per_call") -> None:
    """From now on let every `QuantLinear` in `module` compute so.

    `runtime`: "reference" decodes the weight and multiplies floats, as fake quantization does; "integer" multiplies
    codes, which is the same but for the rounding of floats, wherever a kernel serves the linear's device and formats,
    and is "reference" elsewhere. `expand`: weights at rest are packed; what a product reads is made of them at every
    call ("per_call"), or once and kept ("once": more memory, more speed). Raises ValueError for anything else.
    """
    require_known(runtime, expand)
    for linear in linears_of(module):
        linear.compute_(integers=runtime == "integer", keep=expand == "once")


def require_known(runtime: str, expand: str) -> None:
    """Raise ValueError for what `set_runtime_` does not know."""
    for name, value, known in (("runtime", runtime, RUNTIMES), ("expand", expand, EXPANSIONS)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not known; known are {', '.join(known)}")
