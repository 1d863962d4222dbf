"""Triton, where it is installed: decorators for kernels, which without it leave plain functions that nobody calls.

So the package can be imported whole wherever it is installed.
"""

from functools import partial

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(function=None, **options):
    """A kernel, or a function that kernels call; a decorator, which may be given Triton's options."""
    if function is None:
        return partial(jit, **options)
    return function if triton is None else triton.jit(function, **options)


@jit
def _nothing() -> None:
    pass


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, which takes tensors of any device."""
    return triton is not None and not isinstance(_nothing, triton.JITFunction)


def autotuned(names: tuple[str, ...], configs: list[tuple[int, ...]], key: list[str]):
    """Decorator: the fastest of `configs` for each value of the arguments `key`; the first under the interpreter.

    A configuration is a value for each of `names`, then the warps and the stages.
    """

    def decorate(kernel):
        if triton is None:
            return kernel
        made = [
            triton.Config(dict(zip(names, blocks, strict=True)), num_warps=warps, num_stages=stages)
            for *blocks, warps, stages in configs
        ]
        return triton.autotune(made[:1] if interpreted() else made, key)(kernel)

    return decorate
