"""A GPU without a GPU: the real code on tensors that have a shape, a dtype and the device `cuda:0`, and no content.

    with fake_device() as gpu:
        model = make_model()                        # on the host, without content too
        with gpu.stage("statistics"):
            channel_statistics(model, spec, tokens, gpu.device)
    gpu.stages["statistics"].waits

Tensors made inside the block are PyTorch's fake ones, so shapes of a 70B model cost no memory; an operation on tensors
of different devices raises, as on a GPU. What would be read from a tensor is answered plausibly (see `FakeDevice`).
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils

from quantize.gptq import recorded_rounding
from quantize.greedy import captured_steps

CUDA, SEEMING = torch.device("cuda:0"), torch.device("meta:0")
GIB = 2**30
aten = torch.ops.aten
NOT_LAUNCHED = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten.lift_fresh.default, aten._unsafe_view.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
ASKING = {aten.equal.default, aten.allclose.default}  # whether tensors agree: the answer is yes


@dataclass(frozen=True)
class Traffic:
    """What went on between host and device: bytes and copies each way, launches of kernels, and waits of the host.

    A launch is an operation that gives a tensor on the device and is no view, allocation or copy from the host; a wait
    is a copy to the host or the reading of a number, a truth value or a size that depends on data. (PyTorch also holds
    the host during a copy to the device from memory that is not pinned; these are in `copies_to_device`.)
    """

    bytes_to_device: int = 0
    bytes_to_host: int = 0
    copies_to_device: int = 0
    copies_to_host: int = 0
    launches: int = 0
    waits: int = 0
    bytes_held: int = 0
    waits_behind: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Traffic") -> "Traffic":
        return self + other * -1

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(*(times * mine for mine in astuple(self)))


class _FakeGraph:
    """A CUDA graph: what is recorded is launched as a whole, once for every replay."""

    gpu: ClassVar["FakeDevice"]

    def replay(self) -> None:
        self.gpu.launched()


class _FakeEvent:
    """A CUDA event; the host that waits for one waits for what was begun before it, while newer work goes on."""

    gpu: ClassVar["FakeDevice"]

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self.gpu.waited_behind()


class _FakeMode(FakeTensorMode):
    avoid_device_init = True  # of PyTorch: never touch a real device, even where there is one


class FakeDevice(TorchDispatchMode):
    """Counts what the operations inside `fake_device` do, and answers what depends on data. Made by `fake_device`.

    Every number read is 1 and every truth value true, so activations are finite and masks select everything;
    `unique` finds the `distinct` values 0, 1, …, and a comparison for equality holds for one element in `distinct`.
    Numbers that stand in the code (`torch.tensor([3, 5])`) are known as long as nothing is done to them.

    To autograd, and to all of PyTorch above this mode, a tensor on the device seems to be on `meta:0` (which nobody
    else uses: the usual one has no number): what is compiled for the CPU alone has no autograd for tensors of a GPU.
    """

    device = CUDA

    def __init__(self, distinct: int):
        super().__init__()
        self.distinct = distinct
        self._counts: Counter[str] = Counter()
        self.stages: dict[str, Traffic] = {}

    @property
    def traffic(self) -> Traffic:
        """All of it until now."""
        return Traffic(**self._counts)

    def launched(self) -> None:
        """Count a launch."""
        self._counts["launches"] += 1

    def waited_behind(self) -> None:
        """Count a wait for an event."""
        self._counts["waits_behind"] += 1

    @contextmanager
    def recording(self, *_: object, **__: object) -> Iterator[None]:
        """Inside the block nothing is done, only recorded. Raises RuntimeError if something waited for the device."""
        before = Counter(self._counts)
        yield
        if self._counts["waits"] != before["waits"]:
            raise RuntimeError("what is recorded in a CUDA graph must not wait for the device")
        self._counts = before

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the traffic inside the block to `stages[name]`; that of a stage inside another is in both."""
        before = self.traffic
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, Traffic()) + (self.traffic - before)

    @contextmanager
    def staged(self, owner: object, function: str, name: str) -> Iterator[None]:
        """Inside the block every call of `owner`'s attribute `function` is a stage."""
        original = getattr(owner, function)

        def counted(*args, **kwargs):
            with self.stage(name):
                return original(*args, **kwargs)

        with mock.patch.object(owner, function, counted):
            yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return SEEMING if args[0].fake_device == CUDA else args[0].fake_device
        if kwargs.get("device") == SEEMING:
            kwargs["device"] = CUDA
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func in ASKING:
            self._waits(args[0])
            return True
        if func is aten.nonzero.default:
            return self._nonzero(args[0])
        if func is aten._unique2.default:
            return self._unique(args[0])
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            kwargs["output_size"] = sum(self.read(args[0]))
        if func in INDEXING:
            args = (args[0], self._indices(args[0], args[1]), *args[2:])
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            for changed in (each for each in tree_leaves(args) if hasattr(each, "known")):
                del changed.known
        if func is aten.lift_fresh.default and not isinstance(args[0], FakeTensor):
            with no_dispatch():
                result.known = args[0].flatten().tolist()  # written down in Python
        if func is aten.eq.Scalar or func is aten.eq.Tensor:
            result.rare = True
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            args[1].known = [0.0]  # no gradient overflowed
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func, args: tuple, kwargs: dict, result) -> None:
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if func is aten.copy_.default else args[0]
            if source.device != result.device:
                blocking = not (kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,)))
                self._copied(result.nbytes, to_host=source.device == CUDA, waits=blocking)
                return
            if func is aten._to_copy.default and source.dtype == result.dtype:
                return  # `.to` where it is already
        if func.is_view or func in NOT_LAUNCHED:
            return
        results = (result,) if isinstance(result, Tensor) else tree_leaves(result if func._schema.returns else args)
        if any(isinstance(each, Tensor) and each.device == CUDA for each in results):
            self.launched()

    def _copied(self, count: int, *, to_host: bool, waits: bool) -> None:
        where = "host" if to_host else "device"
        self._counts[f"bytes_to_{where}"] += count
        self._counts[f"copies_to_{where}"] += 1
        self._counts["waits"] += to_host and waits
        self._counts["bytes_held"] += count * waits

    def _waits(self, tensor: Tensor) -> None:
        if tensor.device == CUDA:
            self._counts.update(launches=1, waits=1)

    def read(self, tensor: Tensor) -> list:
        """The elements of `tensor` as if copied to the host: a flat list."""
        if tensor.device == CUDA:
            self._copied(tensor.nbytes, to_host=True, waits=True)
        if tensor.constant is not None:
            with no_dispatch():
                return tensor.constant.flatten().tolist()
        return getattr(tensor, "known", None) or [_one(tensor.dtype)] * tensor.numel()

    def _number(self, tensor: Tensor) -> bool | int | float:
        return self.read(tensor)[0]

    def _nonzero(self, tensor: Tensor) -> Tensor:
        """As rows [found, dimensions]."""
        self._waits(tensor)
        share = self.distinct if getattr(tensor, "rare", False) else 1
        return torch.empty(math.ceil(tensor.numel() / share), tensor.dim(), dtype=torch.int64, device=tensor.device)

    def _unique(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._waits(tensor)
        count = min(self.distinct, tensor.numel())
        values = torch.empty(count, dtype=tensor.dtype, device=tensor.device)
        values.known = list(range(count))
        inverse = torch.empty(tensor.shape, dtype=torch.int64, device=tensor.device)
        return values, inverse, torch.empty(count, dtype=torch.int64, device=tensor.device)

    def _indices(self, indexed: Tensor, indices: list[Tensor | None]) -> list[Tensor | None]:
        """With masks replaced by what they select. Raises RuntimeError for an index on the device of a host tensor."""
        plain = []
        for index in indices:
            if index is not None and index.device == CUDA and indexed.device != CUDA:
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                plain += self._nonzero(index).unbind(1)
            else:
                plain.append(index)
        for index in plain:
            if index is not None and index.device != indexed.device and index.dim():
                self._copied(index.nbytes, to_host=False, waits=True)
        return plain


@contextmanager
def fake_device(free_memory: int = 80 * GIB, distinct: int = 8) -> Iterator[FakeDevice]:
    """Inside the block all tensors are fake, and PyTorch has one GPU, `cuda:0`, with `free_memory` bytes.

    Only what says where a tensor is, and what a GPU is asked besides computing, is replaced; everything is put back.
    """
    gpu = FakeDevice(distinct)
    of_gpu = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "fake",
        "mem_get_info": (free_memory, free_memory),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "empty_cache": None,
        "synchronize": None,
        "is_bf16_supported": True,
        "_lazy_init": None,
        "Stream": mock.NonCallableMock(),
        "current_stream": mock.NonCallableMock(),
        "stream": nullcontext(),
        "device": nullcontext(),
    }
    of_graphs = {"graph": gpu.recording, "CUDAGraph": type("CUDAGraph", (_FakeGraph,), {"gpu": gpu})}
    of_graphs["Event"] = type("Event", (_FakeEvent,), {"gpu": gpu})
    of_tensors = {
        "data": property(Tensor.data.__get__, _set_data),
        "is_cuda": property(lambda tensor: tensor.fake_device == CUDA),
        "record_stream": lambda tensor, stream: None,
        "pin_memory": lambda tensor, device=None: tensor.clone(),
        "tolist": lambda tensor: _nested(gpu.read(tensor), tensor.shape),
    }
    with ExitStack() as stack:
        for name, answer in of_gpu.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, _answer=answer, **__: _answer))
        for name, replacement in of_graphs.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        for name, replacement in of_tensors.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, replacement, create=True))
        # transformers takes fake tensors for being traced, and then builds masks that it otherwise leaves out
        stack.enter_context(mock.patch.object(import_utils, "is_fake_tensor", _no))
        # moving a module swaps fake parameters, for the sake of the device, but refuses those that anybody looks at
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", _set_data))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", _no))
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", _fused_attention))
        for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            types = [torch.Tensor, torch.nn.Parameter, FakeTensor]
            stack.enter_context(mock.patch(f"{module}._foreach_supported_types", types))
        for recorded in (captured_steps, recorded_rounding):  # tensors of one mode mean nothing to another
            stack.callback(recorded.cache_clear)
            recorded.cache_clear()
        stack.enter_context(_FakeMode())
        stack.enter_context(gpu)
        yield gpu


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that a GPU would choose; left to itself PyTorch takes the dozen operations of the CPU."""
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    bias = attn_mask
    if bias is not None:
        bias = torch.where(bias, 0.0, -math.inf).to(query.dtype) if bias.dtype is torch.bool else bias
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    grad = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, grad, dropout_p, is_causal, scale=scale
    )[0]


def _set_data(tensor: FakeTensor, source: FakeTensor) -> None:
    """`tensor.data = source`, its device too: PyTorch's own leaves that of a fake tensor as it was."""
    Tensor.data.__set__(tensor, source)
    tensor.fake_device, tensor.constant = source.fake_device, source.constant


def _no(_: object) -> bool:
    """For what is not to be asked or done: a plain function, since a mock would keep every call."""
    return False


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _nested(values: list, shape: torch.Size) -> object:
    """`values` as nested lists of `shape`; alone without dimensions."""
    if not shape:
        return values[0]
    if len(shape) == 1:
        return values
    size = len(values) // shape[0] if shape[0] else 0
    return [_nested(values[start : start + size], shape[1:]) for start in range(0, len(values), max(1, size))]
