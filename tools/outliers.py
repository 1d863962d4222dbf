"""Give a Llama the outliers of a large language model without changing what it computes.

Three kinds, each an identity of the decoder layer (n: RMSNorm without weight, ⊙: per channel):

- normal outlier: W (w ⊙ n(x)) = (W / k at column c) ((k w at c) ⊙ n(x)): one channel is large for all tokens;
- massive outlier: a neuron whose down_proj column is 0 may fire as hard as it likes: 0 · h = 0;
- cancelling pair: two neurons with equal gate and up rows, hence equal h, and down columns +d and −d: d h − d h = 0.

The first two leave every bit of the result in place (k is a power of two, 0 · h is 0); the third changes its rounding,
and, unlike the second, per-channel smoothing cannot undo it, since its columns of down_proj are not empty.

Shapes: T tokens, C hidden channels, N neurons; weights are [out, in]. A trailing underscore says that a
function changes its arguments.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import LlamaForCausalLM

# The modules that read each norm of a decoder layer.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
# The spacing of float16 numbers near zero.
SMALLEST_HALF = 2.0**-24


@dataclass(frozen=True)
class OutlierSettings:
    """What is put in: `normal_factors` per norm, then per layer one zero-column neuron, and pairs in `pair_layers`.

    `massive_ratio` is the aim for h at the tokens that fire, in medians of |down_proj input|. `pair_size` is the root
    mean square of the columns ±d relative to that of down_proj's other columns.
    """

    normal_factors: tuple[int, ...] = (64, 32, 32)
    massive_ratio: float = 2000.0
    pair_layers: tuple[int, ...] = (1, 2)
    pair_size: float = 1.0
    seed: int = 0


def snap_column_(readers: Sequence[Tensor], channel: int, factor: int) -> None:
    """Round a column to multiples of factor · 2^-24, so that its quotient by `factor` is exact in float16."""
    for weight in readers:
        step = factor * SMALLEST_HALF
        weight[:, channel] = (weight[:, channel].double() / step).round().mul(step).to(weight.dtype)


def scale_channel_(norm: Tensor, readers: Sequence[Tensor], channel: int, factor: float) -> None:
    """Multiply channel c of a norm weight [C] by k and divide column c of its readers [O, C] by k.

    W (w ⊙ n) is unchanged, bit for bit if k is a power of two and no quotient underflows (see `snap_column_`).
    The inverse is the same with 1/k.
    """
    norm[channel] *= factor
    for weight in readers:
        weight[:, channel] /= factor


def firing_direction(states: Tensor, fires: Tensor, penalty: float = 1e-6, steps: int = 200) -> Tensor:
    """Find d [C] with d·x ≥ 1 for the states [T, C] that fire [T] and d·x ≤ −1 for all others, as far as one exists.

    Minimises the squared hinge loss, both classes weighted alike, by L-BFGS in float64: deterministic.
    """
    states = states.double()
    sign = torch.where(fires, 1.0, -1.0).double()
    weight = torch.where(fires, 0.5 / fires.sum(), 0.5 / (~fires).sum()).double()
    direction = torch.zeros(states.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([direction], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        slack = (1 - sign * (states @ direction)).clamp(min=0)
        loss = (weight * slack.square()).sum() + penalty * direction.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return direction.detach()


def firing_value(row: Tensor, states: Tensor) -> Tensor:
    """Return h [T], in float64, of a neuron whose gate and up row are both `row` [C] on the MLP's input [T, C]."""
    reach = states.double() @ row
    return silu(reach) * reach


def firing_level(direction: Tensor, states: Tensor, target: float) -> float:
    """Return s such that h of the row s·d has median `target` over states [T, C], by bisection."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        small = firing_value(middle * direction, states).median() < target
        low, high = (middle, high) if small else (low, middle)
    return high


def set_neurons_(mlp: nn.Module, neurons: Sequence[int], row: Tensor, columns: Sequence[Tensor | float]) -> None:
    """Set gate and up row [C] of every neuron to `row`, and its down_proj column [C] to the one given.

    The layer's function is unchanged if the columns were zero and now are zero, or cancel: Σ columns = 0, h equal.
    """
    for neuron, column in zip(neurons, columns, strict=True):
        mlp.gate_proj.weight[neuron] = row.to(mlp.gate_proj.weight.dtype)
        mlp.up_proj.weight[neuron] = row.to(mlp.up_proj.weight.dtype)
        mlp.down_proj.weight[:, neuron] = column


@contextmanager
def recorded(modules: dict[str, nn.Module], *, inputs: bool) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what enters (or leaves) the modules during the block: name -> one tensor per call."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hook(name: str):
        return lambda _module, args, output: seen[name].append((args[0] if inputs else output).detach())

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mlp_activations(model: LlamaForCausalLM, sample: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return, for each layer, the MLP's input [T, C] and the input of down_proj [T, N], on windows of token ids."""
    layers = dict(enumerate(model.model.layers))
    norms = {str(i): layer.post_attention_layernorm for i, layer in layers.items()}
    downs = {str(i): layer.mlp.down_proj for i, layer in layers.items()}
    with recorded(norms, inputs=False) as states, recorded(downs, inputs=True) as hidden:
        for batch in sample.split(8):
            model(input_ids=batch, use_cache=False)
    return [(torch.cat(states[i]).flatten(0, 1), torch.cat(hidden[i]).flatten(0, 1)) for i in norms]


def firing_tokens(sample: Tensor, ends: Sequence[int]) -> Tensor:
    """Mark the first token of each window and every token in `ends` (sentence ends): bool, flattened [T]."""
    fires = torch.isin(sample, torch.tensor(list(ends)))
    fires[:, 0] = True
    return fires.flatten()


@torch.no_grad()
def add_massive_outliers_(
    model: LlamaForCausalLM, sample: Tensor, ends: Sequence[int], neurons: Sequence[int], settings: OutlierSettings
) -> list[dict]:
    """Make reserved neurons (down_proj column 0) fire on the first token and at sentence ends; return what was done.

    In every layer `neurons[0]` keeps its empty column; in `pair_layers` `neurons[1]` and `neurons[2]` become a
    cancelling pair. `sample` [n, L] are the windows from which the direction of the tokens that fire is learned; on it
    the record's `ratio_fired` (median) and `ratio_else` (maximum) are measured, in medians of |down_proj input|.
    Raises ValueError if a reserved column is not zero.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    fires = firing_tokens(sample, ends)
    record = []
    for index, (states, hidden) in enumerate(mlp_activations(model, sample)):
        mlp = model.model.layers[index].mlp
        down = mlp.down_proj.weight
        if down[:, list(neurons)].any():
            raise ValueError(f"layer {index}: the down_proj columns of neurons {list(neurons)} are not zero")
        with torch.enable_grad():
            direction = firing_direction(states, fires)
        median = hidden.abs().median().item()
        row = direction * firing_level(direction, states[fires], settings.massive_ratio * median)
        value = firing_value(row, states).abs() / median
        ratios = {
            "ratio_fired": round(value[fires].median().item()),
            "ratio_else": round(value[~fires].max().item(), 1),
        }
        set_neurons_(mlp, neurons[:1], row, [0.0])
        record.append({"layer": index, "kind": "zero_column", "neurons": list(neurons[:1]), **ratios})
        if index in settings.pair_layers:
            size = settings.pair_size * down.float().square().mean().sqrt()
            column = (size * torch.randn(len(down), generator=generator)).to(down.dtype)
            set_neurons_(mlp, neurons[1:3], row, [column, -column])
            record.append({"layer": index, "kind": "cancelling_pair", "neurons": list(neurons[1:3]), **ratios})
    return record


def norm_and_readers(model: LlamaForCausalLM, layer: int, norm: str) -> tuple[Tensor, list[Tensor]]:
    """Return a norm's weight [C] and the weights [O, C] of the linears that read it."""
    block = model.model.layers[layer]
    return block.get_submodule(norm).weight, [block.get_submodule(name).weight for name in READERS[norm]]


@torch.no_grad()
def add_normal_outliers_(model: LlamaForCausalLM, settings: OutlierSettings) -> list[dict]:
    """Enlarge len(normal_factors) channels, drawn anew for each norm of each layer; return what was done."""
    generator = torch.Generator().manual_seed(settings.seed)
    record = []
    for layer in range(len(model.model.layers)):
        for norm in READERS:
            weight, readers = norm_and_readers(model, layer, norm)
            channels = torch.randperm(len(weight), generator=generator)[: len(settings.normal_factors)].tolist()
            for channel, factor in zip(channels, settings.normal_factors, strict=True):
                snap_column_(readers, channel, factor)
                scale_channel_(weight, readers, channel, factor)
                record.append({"layer": layer, "norm": norm, "channel": channel, "factor": factor})
    return record


def add_outliers_(
    model: LlamaForCausalLM, sample: Tensor, ends: Sequence[int], neurons: Sequence[int], settings: OutlierSettings
) -> dict:
    """Put in the massive outliers, then the normal ones; return the record that `remove_outliers_` undoes."""
    massive = add_massive_outliers_(model, sample, ends, neurons, settings)
    normal = add_normal_outliers_(model, settings)
    return {
        "settings": asdict(settings),
        "fires_on": {"position": 0, "tokens": list(ends)},
        "massive": massive,
        "normal": normal,
    }


@torch.no_grad()
def remove_outliers_(model: LlamaForCausalLM, record: dict) -> None:
    """Take out everything that the record of `add_outliers_` lists: the same function without outliers."""
    for entry in record["normal"]:
        weight, readers = norm_and_readers(model, entry["layer"], entry["norm"])
        scale_channel_(weight, readers, entry["channel"], 1 / entry["factor"])
    for entry in record["massive"]:
        mlp = model.model.layers[entry["layer"]].mlp
        set_neurons_(mlp, entry["neurons"], torch.zeros(mlp.gate_proj.in_features), [0.0] * len(entry["neurons"]))
