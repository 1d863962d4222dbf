"""What a run will need, from the model's shapes alone: memory, disk, and the work behind an estimate of its time.

Bytes everywhere. The sums follow the code that allocates (named beside each); `tests/test_estimate.py` and
benchmarks/RESULTS.md compare them with real runs. A skeleton is the model on the meta device.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from quantize.checkpoint import bytes_needed
from quantize.config import Probe, QuantConfig, Transform
from quantize.observe import TOKENS_PER_FORWARD
from quantize.spec import DecoderSpec
from quantize.walk import PROBE_SAMPLES

WIDE = 4  # bytes of a number in float32
PROCESS_BYTES = 10**9  # Python with torch and transformers, and what the allocator keeps
CONTEXT_BYTES = 10**9  # CUDA's context: on the device, and about as much on the host
WEIGHT_COPIES = 3  # of the largest linear, while it is transformed and rounded
SEARCH_COPIES = 5  # of the probe, while it is searched
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


def estimate(skeleton: nn.Module, spec: DecoderSpec, config: QuantConfig, plan: Plan) -> Estimate:
    """The figures for one run."""
    layers = spec.decoder_layers(skeleton)
    parameters, decoder = count(skeleton.parameters()), sum(count(layer.parameters()) for layer in layers)
    layer_wide = WIDE * max(count(layer.parameters()) for layer in layers)
    shell = (parameters - decoder) * plan.held
    hidden_size = skeleton.get_input_embeddings().weight.shape[-1]
    vocabulary = skeleton.get_input_embeddings().weight.shape[0]
    calibration, *tests = (plan.held * hidden_size * n * length for n, length in (plan.calibration, *plan.windows))
    work = layer_work(skeleton, spec, config, plan)
    logits = logits_bytes(vocabulary, plan)
    states = max(
        hidden_peak(calibration, calibration_copies(config, plan.on_gpu), 0 if plan.on_gpu else work),
        hidden_peak(max(tests, default=0), 1, 0 if plan.on_gpu else max(work, logits))
        + (sum(tests) if plan.divergence else 0),
    )
    process = PROCESS_BYTES + (CONTEXT_BYTES if plan.on_gpu else 0)
    on_device = max(layer_wide + work, shell + logits, parameters * plan.held + work if plan.whole else 0)
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


def calibration_copies(config: QuantConfig, on_gpu: bool) -> int:
    """How often the calibration samples' hidden states are in host memory while layers are quantized.

    Once; with training the student's beside the teacher's, with `--aug_loss` one more target; pinned copies of the
    inputs and targets where training reads them from the host (see `quantize.lwc.placed`).
    """
    if not config.clip.learned:
        return 1
    targets = 2 if config.training.augmented else 1
    return (1 + targets) * (2 if on_gpu and config.training.offload else 1)


def hidden_peak(hidden: int, copies: int, work: int) -> int:
    """The most that hidden states take with the work on them: twice their size when the batches are joined."""
    return max(2 * hidden, copies * hidden + work)


def layer_work(skeleton: nn.Module, spec: DecoderSpec, config: QuantConfig, plan: Plan) -> int:
    """What works on one layer beside its weights: the largest linear's copies, the search, activations, training."""
    linears = list(_linears(skeleton, spec))
    weight = WIDE * max(linear.in_features * linear.out_features for linear in linears)
    width = max(max(linear.in_features, linear.out_features) for linear in linears)
    samples, length = plan.calibration
    probe = length * min(samples, PROBE_SAMPLES if config.probe is Probe.SAMPLE else 1)
    # gate, up, their product and its successor; beside it what is transformed and rounded, in float32
    tokens = max(TOKENS_PER_FORWARD, length, *(length for _, length in plan.windows))
    activations = tokens * width * (4 * plan.held + SEARCH_COPIES * WIDE)
    search = SEARCH_COPIES * WIDE * probe * width
    training = 0
    if config.clip.learned:
        layer = WIDE * max(count(layer.parameters()) for layer in spec.decoder_layers(skeleton))
        training = TRAINING_COPIES * layer + config.training.batch_size * length * width * 10 * WIDE
    return max(WEIGHT_COPIES * weight, search, activations, training)


def logits_bytes(vocabulary: int, plan: Plan) -> int:
    """The logits of one test window, in the model's dtype, in float32, and their log-softmax; twice for the divergence.

    See `evaluation.perplexity`.
    """
    longest = max((length for _, length in plan.windows), default=0)
    return longest * vocabulary * (plan.held + 2 * WIDE) * (2 if plan.divergence else 1)


@dataclass(frozen=True)
class Work:
    """Multiply-adds times two, by stage, and the steps of the search by width of the probe.

    `forward`, in order of `STAGES`: statistics, probe and weights, training, evaluation. `steps`: probe width → greedy
    steps over the whole run. `moved`: bytes between host and GPU.
    """

    statistics: float
    layers: float
    training: float
    evaluation: float
    steps: dict[int, int]
    moved: float


def work_of(skeleton: nn.Module, spec: DecoderSpec, config: QuantConfig, plan: Plan) -> Work:
    """What a run has to compute."""
    layers = spec.decoder_layers(skeleton)
    samples, length = plan.calibration
    quantizes = samples > 0 and not config.bits.untouched
    once = forward_operations(skeleton, spec, length)
    evaluated = sum(n * forward_operations(skeleton, spec, tokens, head=True) * tokens for n, tokens in plan.windows)
    probe = length * min(samples, PROBE_SAMPLES if config.probe is Probe.SAMPLE else 1)
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
