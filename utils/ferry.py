"""Tensors on the host that visit a GPU part by part: they are copied there and back beside the work on other parts."""

import torch
from torch import Tensor


class Ferry:
    """Takes parts of host tensors to `device` and results back, through a little pinned memory and in streams apart.

    The host goes on as soon as work is launched, so it brings a part while the device works on the one before, and
    writes a result while it works on the one behind. Use it in a `with` block: behind that everything is written. A
    part is a range of the first dimension. Where a tensor is on the device already, a part is a view of it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._pinned: dict[str, Tensor] = {}
        self._read: torch.cuda.Event | None = None  # behind it the pinned memory for the way there may be written
        self._returning: tuple[Tensor, Tensor, Tensor, torch.cuda.Event] | None = None  # to, through, from, when

    def __enter__(self) -> "Ferry":
        return self

    def __exit__(self, *_: object) -> None:
        self._land()

    def bring(self, tensor: Tensor, part: range) -> Tensor:
        """A part of `tensor` on the device."""
        source = tensor[part.start : part.stop]
        if not self._crosses(tensor):
            return source.to(self.device)
        if self._read is not None:
            self._read.synchronize()
        through, now = self._through("there", source).copy_(source), torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream("there")):
            brought = through.to(self.device, non_blocking=True)
            self._read = torch.cuda.Event()
            self._read.record()
        now.wait_stream(self._stream("there"))
        brought.record_stream(now)  # it was made for the other stream
        return brought

    def give_back(self, tensor: Tensor, part: range, result: Tensor) -> None:
        """Write `result`, which is on the device, into a part of `tensor`, by the end of the block."""
        target = tensor[part.start : part.stop]
        if not self._crosses(tensor):
            target.copy_(result)
            return
        self._land()
        stream, through = self._stream("back"), self._through("back", result)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            through.copy_(result, non_blocking=True)
            landed = torch.cuda.Event()
            landed.record()
        self._returning = (target, through, result, landed)

    def _crosses(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and self.device.type == "cuda"

    def _land(self) -> None:
        """Write what came back last into its place; the device has newer work meanwhile."""
        if self._returning is not None:
            target, through, _, landed = self._returning
            landed.synchronize()
            target.copy_(through)
            self._returning = None

    def _stream(self, way: str) -> torch.cuda.Stream:
        if way not in self._streams:
            self._streams[way] = torch.cuda.Stream(self.device)
        return self._streams[way]

    def _through(self, way: str, like: Tensor) -> Tensor:
        """Pinned memory of the shape and dtype of `like`."""
        if way not in self._pinned or self._pinned[way].nbytes < like.nbytes:
            self._pinned[way] = torch.empty(like.nbytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned[way][: like.nbytes].view(like.dtype).view(like.shape)
