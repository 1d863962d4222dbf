"""What a run will need, from the model's shapes alone: memory, disk, and the work behind an estimate of its time.

Bytes everywhere. The sums follow the code that allocates; benchmarks/RESULTS.md compares them with real runs, which
took four fifths of what is said here. A mixture's experts are counted as if every token went to all of them. A
skeleton is the model on the meta device.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from quantize.observe import TOKENS_PER_FORWARD
from quantize.quantization import PROBE_SAMPLES
from quantize.settings import Probe, QuantSettings, Transform
from quantize.sizes import checkpoint_bytes as bytes_needed
from quantize.spec import DecoderSpec

WIDE = 4  # bytes of a number in float32
PROCESS_BYTES = 10**9  # Python with torch and transformers, and what the allocator keeps
CONTEXT_BYTES = 10**9  # CUDA's context: on the device, and about as much on the host
WEIGHT_COPIES = 3  # of the largest linear, while it is transformed and rounded
SEARCH_COPIES = 5  # of the probe, while it is searched
TRAINING_ACTIVATIONS = 10  # float32 copies of the widest activation that autograd keeps of a sample
TRAINING_COPIES = 6  # of a layer's float32 weights: what autograd keeps of their rounding


@dataclass(frozen=True)
class Plan:
    """What is done with a model: everything beside its shapes that memory and time depend on.

    `dtype` is that of the weights; `on_gpu`: the layers visit a GPU (else all is computed on the CPU, in float32).
    `calibration` and every entry of `windows`, the test datasets: (samples, tokens each). `statistics`: activation
    statistics are computed first. `models`: how many are evaluated, the quantized one included. `divergence`: the
    full-precision model's hidden states of the test data are kept. `whole`: an evaluation needs the model as a whole
    on its device.
    """

    dtype: torch.dtype
    on_gpu: bool
    calibration: tuple[int, int]
    windows: tuple[tuple[int, int], ...] = ()
    statistics: bool = True
    models: int = 1
    divergence: bool = False
    whole: bool = False

    @property
    def held(self) -> int:
        """Bytes of a number as the model holds it; on a CPU it is widened (see `experiment.session.open_model`)."""
        return self.dtype.itemsize if self.on_gpu else WIDE


@dataclass(frozen=True)
class Estimate:
    """What a model needs: numbers of parameters and layers, and bytes.

    `weights`: all of them in the plan's dtype. `layer_wide`: the largest decoder layer in float32. `shell`: everything
    but the decoder layers. `calibration_hidden`, `evaluation_hidden`: hidden states of the samples, and of the largest
    test dataset. `host` and `host_streamed`: the process's peak with the model in memory, and with its layers read one
    by one (`--stream`). `device`: a GPU's peak. `save_dir` and `save_model`: what these flags write.
    """

    parameters: int
    layers: int
    weights: int
    layer_wide: int
    shell: int
    calibration_hidden: int
    evaluation_hidden: int
    host: int
    host_streamed: int
    device: int
    save_dir: int
    save_model: int


def estimate(skeleton: nn.Module, spec: DecoderSpec, config: QuantSettings, plan: Plan) -> Estimate:
    """The figures for one run."""
    layers = spec.decoder_layers(skeleton)
    parameters, decoder = count(skeleton.parameters()), sum(count(layer.parameters()) for layer in layers)
    layer_wide = WIDE * max(count(layer.parameters()) for layer in layers)
    shell = (parameters - decoder) * plan.held
    hidden_size = skeleton.get_input_embeddings().weight.shape[-1]
    vocabulary = skeleton.get_input_embeddings().weight.shape[0]
    calibration, *tests = (plan.held * hidden_size * n * length for n, length in (plan.calibration, *plan.windows))
    work, evaluation = calibration_work(skeleton, spec, config, plan), evaluation_work(skeleton, spec, plan)
    logits = logits_bytes(vocabulary, plan)
    # what works on a layer is on the GPU if there is one
    states = max(
        calibration_copies(config, plan.on_gpu) * calibration + (0 if plan.on_gpu else work),
        max(tests, default=0) + (0 if plan.on_gpu else max(evaluation, logits)) + plan.divergence * sum(tests),
    )
    process = PROCESS_BYTES + (CONTEXT_BYTES if plan.on_gpu else 0)
    whole = parameters * plan.held + max(evaluation, logits) if plan.whole else 0
    on_device = max(layer_wide + max(work, evaluation), shell + logits, whole)
    transforms = 0 if config.bits.untouched else bytes_needed(skeleton, spec, config)
    return Estimate(
        parameters=parameters,
        layers=len(layers),
        weights=parameters * plan.dtype.itemsize,
        layer_wide=layer_wide,
        shell=shell,
        calibration_hidden=calibration,
        evaluation_hidden=max(tests, default=0),
        host=parameters * plan.held + states + process,
        host_streamed=shell + layer_wide * 3 // 2 + states + process,
        device=on_device + CONTEXT_BYTES if plan.on_gpu else 0,
        save_dir=transforms,
        save_model=parameters * plan.held + transforms,
    )


def count(tensors: Iterable[torch.Tensor]) -> int:
    """Numbers in all of them."""
    return sum(tensor.numel() for tensor in tensors)


def calibration_copies(config: QuantSettings, on_gpu: bool) -> int:
    """How often the calibration samples' hidden states are in host memory while layers are quantized.

    Once; with training the student's beside the teacher's, with `--aug_loss` one more target; pinned copies of the
    inputs and targets where training reads them from the host (see `quantize.lwc.placed`).
    """
    if not config.clip.learned:
        return 1
    targets = 2 if config.training.augmented else 1
    return (1 + targets) * (2 if on_gpu and config.training.offload else 1)


def calibration_work(skeleton: nn.Module, spec: DecoderSpec, config: QuantSettings, plan: Plan) -> int:
    """Bytes that work on one layer beside its weights while it is observed, quantized and trained."""
    samples, length = plan.calibration
    linears = list(_linears(skeleton, spec))
    width = widest(skeleton, spec)
    probe = probe_tokens(config, plan)
    work = [
        WEIGHT_COPIES * WIDE * max(linear.in_features * linear.out_features for linear in linears),
        SEARCH_COPIES * WIDE * probe * width,
        activation_bytes(probe, width, plan.held, rounded=True),
        activation_bytes(min(samples * length, max(TOKENS_PER_FORWARD, length)), width, plan.held, rounded=False),
    ]
    if config.clip.learned:
        layer = WIDE * max(count(layer.parameters()) for layer in spec.decoder_layers(skeleton))
        samples = TRAINING_ACTIVATIONS * WIDE * config.training.batch_size * length * width
        work.append(TRAINING_COPIES * layer + samples)
    return max(work)


def probe_tokens(config: QuantSettings, plan: Plan) -> int:
    """Tokens of the activation that is searched on (see `quantize.walk.make_probe`)."""
    samples, length = plan.calibration
    return length * min(samples, PROBE_SAMPLES if config.probe is Probe.SAMPLE else 1)


def evaluation_work(skeleton: nn.Module, spec: DecoderSpec, plan: Plan) -> int:
    """Bytes that a batch of test windows takes in one layer; a GPU begins with more, and this is the least."""
    width, batches = widest(skeleton, spec), [min(n * t, max(TOKENS_PER_FORWARD, t)) for n, t in plan.windows]
    return activation_bytes(max(batches, default=0), width, plan.held, rounded=True)


def widest(skeleton: nn.Module, spec: DecoderSpec) -> int:
    """Channels of the widest activation that enters or leaves a linear."""
    return max(max(linear.in_features, linear.out_features) for linear in _linears(skeleton, spec))


def activation_bytes(tokens: int, width: int, held: int, rounded: bool) -> int:
    """Gate, up, their product and its successor; where linears are `rounded`, their inputs' copies in float32 too."""
    return tokens * width * (4 * held + (SEARCH_COPIES * WIDE if rounded else 0))


def logits_bytes(vocabulary: int, plan: Plan) -> int:
    """The logits of one test window, in the model's dtype, in float32, and their log-softmax; twice for the divergence.

    See `evaluation.perplexity`.
    """
    longest = max((length for _, length in plan.windows), default=0)
    return longest * vocabulary * (plan.held + 2 * WIDE) * (2 if plan.divergence else 1)


@dataclass(frozen=True)
class Work:
    """What a run computes: multiplications and additions by stage, `layers` being the probe's passes and the weights.

    `steps`: width of the probe → greedy steps over the whole run. `moved`: bytes between host and GPU.
    """

    statistics: float
    layers: float
    training: float
    evaluation: float
    steps: dict[int, int]
    moved: float


def work_of(skeleton: nn.Module, spec: DecoderSpec, config: QuantSettings, plan: Plan) -> Work:
    """What a run has to compute."""
    layers = spec.decoder_layers(skeleton)
    samples, length = plan.calibration
    quantizes = samples > 0 and not config.bits.untouched
    once = forward_operations(skeleton, spec, length)
    evaluated = sum(n * forward_operations(skeleton, spec, tokens, head=True) * tokens for n, tokens in plan.windows)
    probe = probe_tokens(config, plan)
    rotations = config.rotation.permutation_times + 1 if config.transform is not Transform.NONE else 0
    operations, steps = 0.0, {}
    for index, layer in enumerate(layers):
        before = 0
        for group in spec.at(index).groups:
            linears = [layer.get_submodule(path) for path in group.linears]
            width, size = linears[0].in_features, sum(linear.in_features * linear.out_features for linear in linears)
            block = config.rotation.block_size_for(width)
            # the probe runs up to every group, and twice through the layer; every weight is rotated
            operations += 2 * probe * (before + 2 * size) + 2 * rotations * block * size
            steps[width] = steps.get(width, 0) + rotations * config.rotation.steps
            before += size
    training = 0.0
    if config.clip.learned:
        passes = 3 * config.training.epochs + 4  # forward and twice that backward; teacher, student, loss before, after
        training = passes * samples * length * once
    held = sum(count(layer.parameters()) for layer in layers) * plan.held
    states = plan.held * samples * length * skeleton.get_input_embeddings().weight.shape[-1]
    walks = (plan.statistics + 1) if quantizes else 0
    moved = 2 * held * (walks + len(plan.windows) * plan.models) + 2 * len(layers) * states * plan.statistics
    return Work(
        statistics=samples * length * once if quantizes and plan.statistics else 0.0,
        layers=operations if quantizes else 0.0,
        training=training if quantizes else 0.0,
        evaluation=evaluated * plan.models,
        steps=steps if quantizes and rotations else {},
        moved=moved if plan.on_gpu else 0.0,
    )


def forward_operations(skeleton: nn.Module, spec: DecoderSpec, length: int, head: bool = False) -> float:
    """Operations per token of a forward pass of sequences of `length`: the linears, attention, and the `head`."""
    linears = sum(linear.in_features * linear.out_features for linear in _linears(skeleton, spec))
    attention = sum(
        2 * length * layer.get_submodule(spec.at(index).groups[1].linears[0]).in_features
        for index, layer in enumerate(spec.decoder_layers(skeleton))
    )
    return 2.0 * (linears + attention + (skeleton.get_input_embeddings().weight.numel() if head else 0))


def _linears(skeleton: nn.Module, spec: DecoderSpec) -> Iterable[nn.Module]:
    for index, layer in enumerate(spec.decoder_layers(skeleton)):
        for group in spec.at(index).groups:
            yield from (layer.get_submodule(path) for path in group.linears)
