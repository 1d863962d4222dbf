"""A model whose decoder layers have no weights: each gets its own from the shards when its turn comes, for a while."""

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from models.load import ModelSource, pick_attention
from models.shards import Shards, read_tensor, warm
from quantize.spec import DecoderSpec


def load_shell(
    source: ModelSource,
    config: PretrainedConfig,
    spec: DecoderSpec,
    shards: Shards,
    dtype: torch.dtype,
    compute: torch.dtype,
    attention: str,
) -> nn.Module:
    """The model with its embeddings, last norm and head on the host, its decoder layers without weights.

    Weights are rounded to `dtype` and held in `compute`; it is otherwise what `load_model` gives. Buffers that no
    checkpoint has, such as RoPE's frequencies, are real everywhere. Raises InputError as `read_tensor`.
    """
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=pick_attention(attention, config),
            trust_remote_code=source.trust_remote_code,
        )
    model.to(compute)
    names = [name for name in model.state_dict() if not name.startswith(f"{spec.layers}.")]
    for name in names:
        if name in shards:
            set_tensor_(model, name, read_tensor(shards[name], name, dtype).to(compute))
    # one of two tied tensors may be missing; two that differ stay apart, as when the whole model is loaded
    model.tie_weights(missing_keys={name for name in names if name not in shards}, recompute_mapping=False)
    return model.eval().requires_grad_(False)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside the block have parameters without storage and real buffers."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def set_tensor_(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in the place of the parameter or buffer called `name`."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, tensor if leaf in owner._buffers else nn.Parameter(tensor, requires_grad=False))


class LayerReader:
    """Gives the decoder layers of a shell their weights, in order, and prepares the next while one is in use.

    On an accelerator the next layer's tensors wait on the host, in the model's dtype. On a CPU the layer in use is
    there itself, so the next one is only brought into the system's file cache, which is nobody's resident memory.
    Close it when done (or use it in a `with` block): a read ahead is given up then.
    """

    def __init__(self, model: nn.Module, spec: DecoderSpec, shards: Shards, dtype: torch.dtype, device: torch.device):
        self.model, self.spec, self.shards, self.dtype, self.device = model, spec, shards, dtype, device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next layer")
        self._closed = threading.Event()
        self._ahead: tuple[int, Future] | None = None

    def __enter__(self) -> "LayerReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def open(self, index: int) -> nn.Module:
        """Layer `index` with its weights, on the device; the model's own stays without. Reading the next one begins.

        Raises InputError as `read_tensor`, also for what happened while it was read ahead.
        """
        ready = self._ready(index)
        own = self.spec.decoder_layers(self.model)[index]
        layer = copy.deepcopy(own, {id(self.model.config): self.model.config})
        for name, stand_in in own.state_dict().items():
            full_name = f"{self.spec.layers}.{index}.{name}"
            tensor = ready.pop(full_name, None)
            if tensor is None:
                tensor = read_tensor(self.shards[full_name], full_name, self.dtype)
            set_tensor_(layer, name, tensor.to(self.device).to(stand_in.dtype))
        if index + 1 < len(self.spec.decoder_layers(self.model)):
            self._ahead = (index + 1, self._pool.submit(self._prepare, index + 1))
        return layer.to(self.device)

    def layers(self) -> Iterator[nn.Module]:
        """Every layer, in order, each dropped when the next is asked for."""
        for index in range(len(self.spec.decoder_layers(self.model))):
            layer = self.open(index)
            yield layer
            self.drop_(layer)

    @staticmethod
    def drop_(layer: nn.Module) -> None:
        """Free the weights of a layer, whoever still holds it."""
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.data = torch.empty(0, dtype=tensor.dtype)

    def _ready(self, index: int) -> dict[str, Tensor]:
        """What was read ahead for this layer."""
        number, future = self._ahead or (index, None)
        self._ahead = None
        tensors = future.result() if future is not None else {}
        return tensors if number == index else {}

    def _prepare(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a layer (in a thread): into the file cache, or to be handed over."""
        prefix, tensors = f"{self.spec.layers}.{index}.", {}
        for name, stored in self.shards.items():
            if not name.startswith(prefix) or self._closed.is_set():
                continue
            if self.device.type == "cpu":
                warm(stored, self._closed.is_set)
            else:
                tensors[name] = read_tensor(stored, name, self.dtype)
        return tensors
