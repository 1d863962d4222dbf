"""What a run will need, from the model's shapes alone: memory and disk.

Bytes everywhere. The sums follow the code that allocates; tests hold them against what it really allocates, and
benchmarks/RESULTS.md against the peaks of real runs. A mixture's experts are counted as if every token went to all of
them. A skeleton is the model on the meta device.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from quantize.observe import TOKENS_PER_FORWARD, tokens_at_once
from quantize.quantization import PROBE_SAMPLES
from quantize.rotation_settings import Transform
from quantize.samples import HEAD_TOKENS, ROWS_AT_ONCE
from quantize.settings import Probe, QuantSettings
from quantize.sizes import (
    WIDE,
    activation_bytes,
    checkpoint_bytes,
    count,
    groups_of,
    hidden_bytes,
    model_bytes,
    quantized_bytes,
    quantized_layer_bytes,
    sample_copies,
    widest,
)
from quantize.spec import DecoderSpec
from utils.batching import AUTO_TOKENS_GPU

PROCESS_BYTES = 10**9  # Python with torch and transformers, and what the allocator keeps
CONTEXT_BYTES = 10**9  # CUDA's context: on the device, and about as much on the host
PINNED_COPIES = 2  # of a batch of hidden states: on their way to the GPU, and back (see `utils.ferry`)
WEIGHT_COPIES = 3  # of the largest linear, while it is transformed and rounded
SEARCH_COPIES = 5  # of the probe, while it is searched
TRAINING_ACTIVATIONS = 10  # float32 copies of the widest activation that autograd keeps of a sample
TUNING_LOGITS = 8  # of both networks, in float32: logits, their logarithms, and gradients
TUNING_ACTIVATIONS = 48  # as TRAINING_ACTIVATIONS, where every linear transforms and rounds its input by itself
TRAINING_COPIES = 6  # of a layer's float32 weights: what autograd keeps of their rounding (4), and the heap of it
LEARNED_COPIES = 6  # more of them, beside one for every rotation, where the transform is trained
SQUARES = 8  # of a group's width, in float64, while its Hessian is factorised
SPLIT_ROWS = 4  # float32 copies of the rows of a moment on a GPU: two factors, each a sum of two numbers
GROUP_COPIES = 8  # of a group's weights in float32, while they are rounded by their inputs

Windows = tuple[tuple[int, int], ...]  # (number, tokens each)


@dataclass(frozen=True)
class Plan:
    """What is done with a model: everything beside its shapes that memory and time depend on.

    `dtype` is that of the weights; `on_gpu`: the layers visit a GPU (else all is computed on the CPU, in float32).
    `calibration`: (samples, tokens each). `windows`: the test datasets of the run's own model; `compared`: those that
    go through the full-precision model in the same walk. `statistics`: activation statistics are computed too.
    `divergence`: the two are compared token by token. `whole` and `whole_compared`: evaluations need the run's own
    model, and the full-precision one, as a whole on the device. `saved`: the model is quantized already.
    `joining`: more windows of the run's own model, of variants of it that part from the others at layers of their own.
    `batch`: how many windows go through a layer at once, if that is given.
    """

    dtype: torch.dtype
    on_gpu: bool
    calibration: tuple[int, int]
    windows: Windows = ()
    compared: Windows = ()
    statistics: bool = True
    divergence: bool = False
    whole: bool = False
    whole_compared: bool = False
    saved: bool = False
    joining: Windows = ()
    batch: int | None = None

    @property
    def held(self) -> torch.dtype:
        """What the model is held in; on a CPU it is widened (see `experiment.setup.Setup.compute_dtype`)."""
        return self.dtype if self.on_gpu else torch.float32

    def quantizes(self, settings: QuantSettings) -> bool:
        """Whether anything is decided in this run."""
        return not self.saved and not settings.bits.untouched


@dataclass(frozen=True)
class Estimate:
    """What a model needs: numbers of parameters and layers, and bytes.

    `weights`: all of them in the plan's dtype. `layer_wide`: the largest decoder layer in float32. `shell`: everything
    but the decoder layers. `quantized`: the quantized model, and what `--save_model` writes. `hidden`: the hidden
    states that travel through the layers at once. `host` and `host_streamed`: the process's peak, `hidden` included,
    with the model in memory, and with its layers read one by one. `device`: a GPU's peak. `checkpoint`: what
    `--save_dir` writes. `states`: hidden states and what else is as large as they are, at the worst moment, and `held`:
    the model as it is held; neither is in `device`, but either may be kept there. `window_tokens`: of the test windows,
    how many go through a layer at once in `device`, and how many may if there is room for `window_token` bytes each.
    `pinned`: of the host's memory what hidden states travel through if they are not kept on the GPU.
    """

    parameters: int
    layers: int
    weights: int
    layer_wide: int
    shell: int
    quantized: int
    hidden: int
    host: int
    host_streamed: int
    device: int
    checkpoint: int
    states: int
    held: int
    window_token: int
    window_tokens: tuple[int, int]
    pinned: int


def estimate(skeleton: nn.Module, spec: DecoderSpec, settings: QuantSettings, plan: Plan) -> Estimate:
    """The figures for one run."""
    layers = list(spec.decoder_layers(skeleton))
    layer_wide = max(model_bytes(layer, torch.float32) for layer in layers)
    model = model_bytes(skeleton, plan.held)
    shell = model - sum(model_bytes(layer, plan.held) for layer in layers)
    quantized = quantized_bytes(skeleton, spec, settings, plan.held)
    held = quantized if plan.saved else model  # before the first layer is quantized
    begun, walking = travelling_bytes(skeleton, settings, plan)
    walking += rows_bytes(skeleton, spec, settings, plan)
    walking += 0 if plan.on_gpu else heads_bytes(skeleton, spec, settings, plan)
    layer, logits = layer_work(skeleton, spec, settings, plan), logits_bytes(skeleton, plan)
    tuning = tuning_bytes(skeleton, spec, settings, plan)
    tests = plan.windows + plan.compared
    least = most = batch_tokens(tests, plan.batch)
    if plan.on_gpu and plan.batch is None:
        most = max(least, min(max(map(prod, tests), default=0), AUTO_TOKENS_GPU))
    # statistics are gathered in batches as large as test windows'
    observed = min(prod(plan.calibration), AUTO_TOKENS_GPU) * (plan.on_gpu and plan.statistics)
    batch = max(most, max(observed, batch_tokens((plan.calibration,))) * plan.quantizes(settings))
    pinned = PINNED_COPIES * hidden_bytes(batch, skeleton, plan.held) * plan.on_gpu
    process = PROCESS_BYTES + (CONTEXT_BYTES if plan.on_gpu else 0) + pinned
    # on a CPU the layer that is worked on is one of the model's
    working = 0 if plan.on_gpu else max(layer - layer_wide, tuning, 0)
    scoring = 0 if plan.on_gpu else logits
    scored = plan.windows + plan.joining + plan.compared * plan.divergence
    windows = hidden_bytes(tokens_of(scored), skeleton, plan.held)
    whole = max(quantized * plan.whole, model * plan.whole_compared)
    device = max(layer, shell + logits, tuning and shell + tuning, whole and whole + max(layer - layer_wide, logits))
    return Estimate(
        parameters=count(skeleton.parameters()),
        layers=len(layers),
        weights=model_bytes(skeleton, plan.dtype),
        layer_wide=layer_wide,
        shell=shell,
        quantized=quantized,
        hidden=begun,
        host=max(held + begun, held + walking + working, quantized + windows + scoring) + process,
        host_streamed=shell + max(begun, layer_wide * 3 // 2 + walking + working, windows + scoring) + process,
        device=device + CONTEXT_BYTES if plan.on_gpu else 0,
        checkpoint=checkpoint_bytes(skeleton, spec, settings),
        states=max(begun, walking, windows),
        held=held,
        window_token=activation_bytes(1, channels(skeleton, spec), plan.held.itemsize, rounded=True),
        window_tokens=(least, most),
        pinned=pinned,
    )


def tokens_of(windows: Windows) -> int:
    """How many tokens they are."""
    return sum(prod(shape) for shape in windows)


def travelling_bytes(skeleton: nn.Module, settings: QuantSettings, plan: Plan) -> tuple[int, int]:
    """Hidden states that are there before the first layer, and the most that go through the layers at once.

    The first may live in files (see `utils.memory`). Where samples decide nothing one copy of them is only there until
    the probe is made. With training there are more: the second target of `--aug_loss`, and pinned copies of inputs and
    targets where training reads them from the host (see `quantize.training.placed`).
    """
    samples = prod(plan.calibration) if plan.quantizes(settings) else 0
    tokens = sample_copies(settings, plan.statistics) * samples
    tokens += tokens_of(plan.windows + plan.joining + plan.compared)
    # what is tuned as a whole: in the full-precision network, and at last in the quantized one
    tokens += 2 * settings.tuning.samples * plan.calibration[1] * (plan.quantizes(settings) and settings.tunes)
    more = 0 if settings.needs_samples else -1
    if settings.training is not None:
        more = settings.training.augmented
        more += (2 + settings.training.augmented) * (plan.on_gpu and settings.training.offload)
    begun, walking = (hidden_bytes(number, skeleton, plan.held) for number in (tokens, tokens + more * samples))
    return begun, walking


def rows_bytes(skeleton: nn.Module, spec: DecoderSpec, settings: QuantSettings, plan: Plan) -> int:
    """What the samples give the linears of a layer, on the host: of the widest group, and of all for the target.

    See `quantize.samples`: rows of several inputs (experts) are put together, as those for the target are, in a copy.
    """
    if not (plan.quantizes(settings) and settings.reads_rows):
        return 0
    most = 0
    for index, layer in enumerate(spec.decoder_layers(skeleton)):
        widths, inputs = [], []
        for group in spec.at(index).groups:
            inputs.append(len(group.inputs))
            widths.append(inputs[-1] * layer.get_submodule(group.linears[0]).in_features)
        now = max(width * (1 + (number > 1)) for width, number in zip(widths, inputs, strict=True))
        most = max(most, now + (sum(widths) if settings.aims_at_teacher else 0))
    return plan.held.itemsize * prod(plan.calibration) * most


def heads_bytes(skeleton: nn.Module, spec: DecoderSpec, settings: QuantSettings, plan: Plan) -> int:
    """The q, k and v of some tokens that a layer is looked at by, in float32, in pieces and as one.

    See `quantize.samples`.
    """
    if not (plan.quantizes(settings) and settings.views_layers):
        return 0
    attention = spec.decoder_layers(skeleton)[0].get_submodule(spec.attention)
    heads = attention.config.num_attention_heads + 2 * attention.config.num_key_value_heads
    return 2 * WIDE * min(prod(plan.calibration), HEAD_TOKENS) * heads * attention.head_dim


def rounding_bytes(skeleton: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> int:
    """What rounding a group of linears by their inputs needs beside the layer, at the worst moment.

    Squares of its width in float64: the Hessian and what factorising it makes; and copies of its weights, in float64
    while a target is aimed at (see `quantize.gptq` and `quantize.rounding`).
    """
    most = 0
    for _, members in groups_of(skeleton, spec):
        squares = 2 * WIDE * SQUARES * members[0].in_features ** 2
        most = max(most, squares + WIDE * GROUP_COPIES * count(linear.weight for linear in members))
    return most if settings.rounds_by_data else 0


def layer_work(skeleton: nn.Module, spec: DecoderSpec, settings: QuantSettings, plan: Plan) -> int:
    """Bytes of the largest layer and of what works on it, at the worst moment of a visit."""
    width, held = channels(skeleton, spec), plan.held.itemsize
    layers = list(enumerate(spec.decoder_layers(skeleton)))
    floats, wide = (max(model_bytes(layer, dtype) for _, layer in layers) for dtype in (plan.held, torch.float32))
    codes = max(quantized_layer_bytes(layer, spec.at(index), settings, plan.held) for index, layer in layers)
    largest = max(linear.weight.numel() for _, members in groups_of(skeleton, spec) for linear in members)
    rounded = settings.scheme.input.quantized or settings.transform is not Transform.NONE

    windows, compared = (batch_tokens(each, plan.batch) for each in (plan.windows, plan.compared))
    if not plan.quantizes(settings):
        own = codes + held * largest if plan.saved else floats
        return own + activation_bytes(windows, width, held, plan.saved and rounded)
    probe, samples = probe_tokens(settings, plan), (plan.calibration,)
    observed = max(compared, batch_tokens(samples) * (plan.statistics or settings.needs_samples))
    moments = [
        floats + activation_bytes(observed, width, held, rounded=False),
        wide + max(WEIGHT_COPIES * WIDE * largest, SEARCH_COPIES * WIDE * probe * width),
        wide + activation_bytes(probe, width, held, rounded),
        codes + floats + activation_bytes(probe, width, held, rounded),  # decoded once, for everything that is advanced
        codes + held * largest + activation_bytes(windows, width, held, rounded),
    ]
    if settings.needs_samples:
        moments.append(codes + floats + activation_bytes(batch_tokens(samples), width, held, rounded))
    if settings.reads_rows:
        part = min(prod(plan.calibration), ROWS_AT_ONCE)
        split = SPLIT_ROWS * WIDE * part * width * (plan.on_gpu and settings.rounds_by_data)
        moments.append(wide + activation_bytes(part, width, WIDE, rounded) + split)
        heads = heads_bytes(skeleton, spec, settings, plan) * plan.on_gpu
        moments.append(wide + heads + rounding_bytes(skeleton, spec, settings))
    if plan.joining:  # the weights before they were rounded are kept beside what the codes are decoded to
        moments.append(codes + 2 * floats + activation_bytes(windows, width, held, rounded))
    if settings.training is not None:
        sample = settings.training.batch_size * plan.calibration[1]
        copies = TRAINING_COPIES
        if settings.learns_transform:
            copies += LEARNED_COPIES + settings.transform.rotations(settings.rotation.permutation_times)
        moments.append((1 + copies) * wide + TRAINING_ACTIVATIONS * WIDE * sample * width)
    return max(moments)


def tuning_bytes(skeleton: nn.Module, spec: DecoderSpec, settings: QuantSettings, plan: Plan) -> int:
    """What a step of tuning needs beside what is around the layers: one of them, what flows between them, and logits.

    See `quantize.tuning`.
    """
    if not (plan.quantizes(settings) and settings.tunes):
        return 0
    layers, width = spec.decoder_layers(skeleton), channels(skeleton, spec)
    sample = plan.calibration[1]
    states = hidden_bytes((len(layers) + 2) * sample, skeleton, plan.held)
    wide = max(model_bytes(layer, torch.float32) for layer in layers)
    vocabulary = skeleton.get_input_embeddings().weight.shape[0]
    logits = min(sample, tokens_at_once(vocabulary)) * vocabulary * WIDE * TUNING_LOGITS
    return states + max(2 * wide + TUNING_ACTIVATIONS * WIDE * sample * width, logits)


def probe_tokens(settings: QuantSettings, plan: Plan) -> int:
    """Tokens of the activation that is searched on (see `quantize.quantization.make_probe`)."""
    samples, length = plan.calibration
    if settings.probe is Probe.PEAKS:
        return min(settings.probe_tokens, samples * length)
    return length * min(samples, PROBE_SAMPLES if settings.probe is Probe.SAMPLE else 1)


def channels(skeleton: nn.Module, spec: DecoderSpec) -> int:
    """Of the widest activation that enters or leaves a linear."""
    return max(widest(members) for _, members in groups_of(skeleton, spec))


def batch_tokens(shapes: Windows, sequences: int | None = None) -> int:
    """The most tokens that go through a layer at once: of so many sequences, or of what batches begin with."""
    sizes = (min(number, sequences or TOKENS_PER_FORWARD // length or 1) * length for number, length in shapes)
    return max(sizes, default=0)


def logits_bytes(skeleton: nn.Module, plan: Plan) -> int:
    """The logits of a part of a test window, in float32, and their log-softmax; twice for the divergence.

    See `evaluation.perplexity`.
    """
    longest = max((length for _, length in plan.windows), default=0)
    vocabulary = skeleton.get_input_embeddings().weight.shape[0]
    return min(longest, tokens_at_once(vocabulary)) * vocabulary * 2 * WIDE * (2 if plan.divergence else 1)
