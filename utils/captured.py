"""Work on a GPU that is recorded once and launched as a whole: many small kernels for the price of one launch."""

from collections.abc import Callable

import torch
from torch import Tensor


class Captured:
    """`work`, recorded for tensors like `examples`, whose shapes, dtypes and device all later calls share.

    It must not wait for the device, nor keep or change a tensor that it is given. What a call returns is the caller's.
    """

    def __init__(self, work: Callable[..., tuple[Tensor, ...]], *examples: Tensor):
        self.inputs, self.graph = tuple(each.clone() for each in examples), torch.cuda.CUDAGraph()
        with torch.cuda.device(examples[0].device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # in a first call libraries prepare themselves, which cannot be recorded
                work(*self.inputs)
            torch.cuda.current_stream().wait_stream(aside)
            # other threads may read ahead meanwhile
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.outputs = work(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `work` returns for `inputs`."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(each.clone() for each in self.outputs)
