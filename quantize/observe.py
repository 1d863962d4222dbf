"""Looking into a model: what enters its layers and its linears, what its head makes of them, one layer at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from duquant.linear import expanded
from quantize.spec import DecoderSpec
from utils.batching import BatchSize
from utils.device import home_of, on_device, to_device
from utils.errors import InputError
from utils.ferry import Ferry
from utils.memory import Allocate, all_finite, memory_of

TOKENS_PER_FORWARD = 4096  # samples are batched up to this many tokens
LOGITS_AT_ONCE = 2**26  # numbers: of 2048 tokens over Llama-2's vocabulary, of 512 over Llama-3's


@dataclass(frozen=True)
class LayerCalls:
    """What a model passes to its decoder layers.

    `hidden` [N, T, C]: the input of the first layer for every sample. `kwargs`: per layer, everything else (mask,
    position embeddings, …) for one sample; it broadcasts over a batch of unpadded samples.
    """

    hidden: Tensor
    kwargs: tuple[dict, ...]


@contextmanager
def layers_replaced(layers: nn.ModuleList, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Inside the block every layer calls `forward(index, hidden_states, **kwargs)` instead of its own."""
    for index, layer in enumerate(layers):
        layer.forward = lambda hidden, *args, _index=index, **kwargs: forward(_index, hidden, **kwargs)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def shell_on_device(model: nn.Module, spec: DecoderSpec, device: torch.device) -> Iterator[None]:
    """Everything of `model` but its decoder layers is on `device` inside the block, and then where it was before."""
    path, _, name = spec.layers.rpartition(".")
    parent, layers = model.get_submodule(path), spec.decoder_layers(model)
    setattr(parent, name, nn.ModuleList())
    try:
        with on_device(model, device):
            setattr(parent, name, layers)
            try:
                yield
            finally:
                setattr(parent, name, nn.ModuleList())
    finally:
        setattr(parent, name, layers)


@torch.no_grad()
def layer_calls(
    model: nn.Module, spec: DecoderSpec, tokens: Tensor, device: torch.device, allocate: Allocate | None = None
) -> LayerCalls:
    """Run the model on `tokens` [N, T] with its layers left out, and record what they would have been given.

    The layers need no weights. `hidden` is in a tensor that `allocate` makes, by default where the model is.
    """
    allocate = allocate or memory_of(home_of(model))
    layers = spec.decoder_layers(model)
    recorded: dict[int, dict] = {}
    hidden: list[Tensor] = []  # the one tensor, once its width is known
    filled = 0

    def record(index: int, states: Tensor, **kwargs) -> Tensor:
        if index not in recorded:
            recorded[index] = kwargs
        if index == 0:
            keep(states)
        return states

    def keep(states: Tensor) -> None:
        nonlocal filled
        if not hidden:
            hidden.append(allocate((len(tokens), *states.shape[1:]), states.dtype))
        hidden[0][filled : filled + len(states)] = states
        filled += len(states)

    with shell_on_device(model, spec, device), layers_replaced(layers, record):
        batches = [tokens[:1], *batches_of(tokens[1:])]  # the first alone: its keyword arguments have batch size 1
        for batch in batches:
            model.get_decoder()(input_ids=batch.to(device), use_cache=False)
    place = hidden[0].device
    return LayerCalls(hidden[0], tuple(to_device(recorded[index], place) for index in range(len(layers))))


@torch.no_grad()
def advance_(
    layer: nn.Module, hidden: Tensor, kwargs: dict, device: torch.device, batch_size: BatchSize | None = None
) -> None:
    """Replace `hidden` [N, T, C], wherever it is, by the outputs of `layer`, which is on `device`, batch by batch."""
    kwargs = to_device(kwargs, device)
    batches = batch_size or BatchSize(max(1, TOKENS_PER_FORWARD // hidden.shape[1]))
    with expanded(layer), Ferry(device) as ferry:

        def advance(part: range) -> None:
            ferry.give_back(hidden, part, layer_output(layer, ferry.bring(hidden, part), kwargs))

        for _ in batches.run(range(len(hidden)), advance):
            pass


def layer_output(layer: nn.Module, hidden: Tensor, kwargs: dict) -> Tensor:
    """The hidden states [N, T, C] that `layer` makes of `hidden`; all on one device."""
    output = layer(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def head_logits(model: nn.Module, spec: DecoderSpec, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits [N, T, vocabulary] from the last layer's output `hidden` [N, T, C].

    The model's own forward pass computes them, with its layers replaced by `hidden`, so whatever a family does behind
    its layers (norm, scaling, soft-capping) is done.
    """
    with layers_replaced(spec.decoder_layers(model), lambda index, states, **kwargs: hidden):
        return model(input_ids=tokens, use_cache=False).logits


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits over a `vocabulary` are made at a time."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


@contextmanager
def known_outputs(layer: nn.Module, outputs: Mapping[str, Tensor], attention: str) -> Iterator[None]:
    """Inside the block the modules of `layer` at these paths give what is known [batch, T, C], and do not run.

    The one at `attention` gives a pair, as attention does, whose second part (the weights) is None.
    """
    modules = {path: layer.get_submodule(path) for path in outputs}
    for path, module in modules.items():
        known = (outputs[path], None) if path == attention else outputs[path]
        module.forward = lambda *args, _known=known, **kwargs: _known
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


class _InputReached(Exception):
    """Carries the captured input out of a forward pass."""


@torch.no_grad()
def capture_input(layer: nn.Module, path: str, hidden: Tensor, kwargs: dict) -> Tensor:
    """The activation that enters the linear at `path` when `layer` runs on `hidden`; nothing beyond it is run."""

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _InputReached(args[0])

    handle = layer.get_submodule(path).register_forward_pre_hook(stop)
    try:
        layer_output(layer, hidden, kwargs)
    except _InputReached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{path} is not called by {type(layer).__name__}")


@torch.no_grad()
def capture_rows(layer: nn.Module, paths: Sequence[str], hidden: Tensor, kwargs: dict) -> Tensor:
    """What enters the modules at `paths` when `layer` runs on `hidden`: one input as it is, several as rows [N, C].

    Several are linears, which give zeros meanwhile: nothing beyond them counts, and their weights may be in another
    dtype than their inputs. One that is not called (an expert without a token) has no rows.
    """
    if len(paths) == 1:
        return capture_input(layer, paths[0], hidden, kwargs)
    linears, rows = [layer.get_submodule(path) for path in paths], []

    def keep(x: Tensor, out_features: int) -> Tensor:
        rows.append(x.flatten(0, -2))
        return x.new_zeros(*x.shape[:-1], out_features)

    for linear in linears:
        linear.forward = partial(keep, out_features=linear.out_features)
    try:
        layer_output(layer, hidden, kwargs)
    finally:
        for linear in linears:
            del linear.forward
    if not rows:
        raise RuntimeError(f"none of {', '.join(paths)} is called by {type(layer).__name__}")
    return torch.cat(rows)


def require_finite(x: Tensor, name: str) -> None:
    """Raise InputError if the activation `x` that enters the linear `name` has NaN or inf."""
    if not all_finite(x):
        raise InputError(
            f"{name}: its calibration activation contains NaN or inf; "
            "if the model itself is sound, half precision overflows here: try --dtype bfloat16 or float32"
        )


def parts_of_samples(samples: Tensor) -> list[range]:
    """What cuts `samples` [N, T, …] into parts of at most `TOKENS_PER_FORWARD` tokens (but at least one sample)."""
    size = max(1, TOKENS_PER_FORWARD // samples.shape[1]) if len(samples) else 1
    return [range(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]


def batches_of(samples: Tensor) -> Iterator[Tensor]:
    """Views of `samples` [N, T, …], one for each of its parts."""
    return (samples[part.start : part.stop] for part in parts_of_samples(samples))
