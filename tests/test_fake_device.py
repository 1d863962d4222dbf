"""What only a GPU can show, without one: the real walk on fake tensors, where they are, and what waits for what."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from best_settings import EXTRAS, best
from conftest import VOCABULARY, random_tokens, tiny_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from transformers import MixtralConfig, MixtralForCausalLM

from duquant.experts import unfuse_experts_
from duquant.formats import IntegerFormat, MxFp4
from evaluation.perplexity import final_hidden, perplexity, score, scores
from evaluation.sensitivity import Variants
from experiment.estimate import Plan, estimate
from experiment.options import Keep
from experiment.residence import choose_residence
from models import decoder_spec
from models.load import load_skeleton
from models.zoo import zoo_config
from quantize import gptq, greedy, samples, training
from quantize.bits import BitSettings, ClipSettings
from quantize.observer import Observer
from quantize.quantization import Quantization, quantize_model
from quantize.refinements import RoundingSettings, Trained, TuningSettings
from quantize.rotation_settings import RotationSettings
from quantize.settings import GqaSmooth, QuantSettings, SmoothSettings, TrainingSettings
from quantize.state import FinishedLayer
from quantize.statistics import Observation, channel_statistics
from quantize.tuning import Teacher, tune_
from quantize.walk import layers_in_memory, walk
from reporting.recorder import Recorder
from tools.fake_device import FakeDevice, Traffic, fake_device
from utils import io
from utils.batching import BatchSize

CPU = torch.device("cpu")
HALF, BFLOAT = torch.float16, torch.bfloat16
SAMPLES, TOKENS, LAYERS, GROUPS = 8, 32, 2, 4
BATCH = 4


def mixtral(dtype: torch.dtype) -> nn.Module:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config).to(dtype).eval().requires_grad_(False)
    spec = decoder_spec(config)
    unfuse_experts_(spec.decoder_layers(model), spec.experts)
    return model


MODELS = {
    "llama": lambda dtype: tiny_model(dtype, num_key_value_heads=6),
    "llama with GQA": tiny_model,
    "mixtral": mixtral,
}
every_model = pytest.mark.parametrize(
    ("name", "dtype"), [*((name, HALF) for name in MODELS), ("llama with GQA", BFLOAT)]
)


@pytest.fixture
def gpu():
    with fake_device(distinct=4) as gpu:
        yield gpu


def settings(
    trained: bool = False, epochs: int = 1, steps: int = 2, permutations: int = 0, gqa=GqaSmooth.ONLINE
) -> QuantSettings:
    return QuantSettings(
        BitSettings(4, 4),
        ClipSettings(0.9, None if trained else 0.8),
        SmoothSettings(0.6, gqa=gqa),
        rotation=RotationSettings(block_size=16, steps=steps, permutation_times=permutations),
        training=TrainingSettings(epochs=epochs, batch_size=BATCH, augmented=True) if trained else None,
    )


def statistics(model: nn.Module, gpu: FakeDevice) -> dict[str, Tensor]:
    return channel_statistics(model, decoder_spec(model.config), random_tokens(SAMPLES, TOKENS), gpu.device).scales


class Keeper(Observer):
    def __init__(self):
        self.kept: dict[int, FinishedLayer] = {}

    def layer_done(self, index: int, finished: FinishedLayer, restored: bool) -> None:
        if not restored:
            self.kept[index] = finished


def quantize(
    model: nn.Module,
    gpu: FakeDevice,
    config: QuantSettings,
    finished: dict[int, FinishedLayer] | None = None,
    observers: tuple[Observer, ...] = (),
) -> tuple[Traffic, dict[int, FinishedLayer]]:
    """The traffic of quantizing alone, and the states of the layers that were decided."""
    spec, tokens, keeper = decoder_spec(model.config), random_tokens(SAMPLES, TOKENS), Keeper()
    peaks, before = statistics(model, gpu), gpu.traffic
    observers = (*observers, keeper)
    figures = quantize_model(model, spec, tokens, peaks, config, gpu.device, finished, observers)
    assert len(figures) == LAYERS
    return gpu.traffic - before, keeper.kept


def places(model: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in model.state_dict().values()}


@every_model
def test_statistics_come_to_the_host_and_leave_the_model_there(gpu, name, dtype):
    model = MODELS[name](dtype)
    weights = sum(tensor.nbytes for tensor in model.get_decoder().layers.parameters())
    scales = statistics(model, gpu)
    assert {(scale.device, scale.dtype) for scale in scales.values()} == {(CPU, torch.float32)}
    assert places(model) == {CPU}
    # every layer goes there once, as does the embedding, and does not come back; hidden states do, and hold nobody
    states = SAMPLES * TOKENS * 48 * dtype.itemsize
    traffic, found = gpu.traffic, 10 * sum(scale.nbytes for scale in scales.values())
    assert weights + LAYERS * states < traffic.bytes_to_device < 2 * weights + LAYERS * states
    assert (LAYERS + 1) * states < traffic.bytes_to_host < (LAYERS + 1) * states + found
    assert traffic.bytes_held <= traffic.bytes_to_device + traffic.bytes_to_host - 2 * LAYERS * states


@pytest.mark.parametrize("trained", [False, True])
@every_model
def test_a_quantized_model_is_on_the_host_in_its_own_dtype(gpu, name, dtype, trained):
    model = MODELS[name](dtype)
    traffic, kept = quantize(model, gpu, settings(trained, permutations=0 if trained else 1))
    assert places(model) == {CPU}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(linear.weight.device == CPU for linear in model.modules() if hasattr(linear, "weight"))
    tensors = [tensor for layer in kept.values() for tensor in layer.state.tensors().values()]
    assert len(kept) == LAYERS
    assert {tensor.device for tensor in tensors} == {CPU}
    assert bool(kept[0].state.clips) == trained
    assert traffic.launches > 10 * traffic.waits


BEST = {
    "best": best(),
    "everything": best(gqa=GqaSmooth.FOLD, extras=EXTRAS["all"]),
    "nearest, no target": best(rounding=RoundingSettings(), extras=EXTRAS["value rotation"]),
    "peaks of values": replace(best(extras=EXTRAS["value rotation"]), smooth=SmoothSettings()),
    "clips trained": best(
        clip=ClipSettings("search"), training=TrainingSettings(epochs=1, batch_size=BATCH), extras=EXTRAS["all"]
    ),
    "transform trained": best(
        training=TrainingSettings(Trained.TRANSFORM, epochs=1, batch_size=BATCH), extras=EXTRAS["all"]
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype", "way"),
    [*((name, HALF, "everything") for name in MODELS), *(("llama with GQA", BFLOAT, way) for way in BEST)],
)
def test_what_samples_decide_is_decided_on_the_device_and_kept_on_the_host(gpu, name, dtype, way):
    model = MODELS[name](dtype)
    _, kept = quantize(model, gpu, BEST[way])
    assert places(model) == {CPU}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    tensors = [tensor for layer in kept.values() for tensor in layer.state.tensors().values()]
    assert {tensor.device for tensor in tensors} == {CPU}
    assert kept[0].state.weights
    kept = {index: FinishedLayer(layer.state.to(CPU), layer.figures) for index, layer in kept.items()}
    model = MODELS[name](dtype)
    quantize(model, gpu, BEST[way], finished={0: kept[0]})
    assert places(model) == {CPU}


def test_scales_that_heads_share_are_folded_on_the_device(gpu):
    model = tiny_model(HALF)
    quantize(model, gpu, settings(gqa=GqaSmooth.FOLD))
    assert places(model) == {CPU}


def test_a_second_run_of_the_same_counts_the_same(gpu):
    _, first, second = (quantize(tiny_model(HALF), gpu, settings(permutations=1))[0] for _ in range(3))
    assert first == second


@pytest.mark.parametrize(("unchecked", "waits"), [(True, 0), (False, 1)])
def test_the_search_waits_for_every_sixteen_steps_or_for_none_and_copies_nothing(gpu, unchecked, waits, monkeypatch):
    if not unchecked:
        monkeypatch.setattr(greedy._Search, "unchecked", lambda search, state: False)
    # the first run records steps: then they are launched one by one
    _, short, long = (quantize(tiny_model(HALF), gpu, settings(steps=steps))[0] for steps in (16, 16, 32))
    rotations = GROUPS * LAYERS
    assert long.waits - short.waits == waits * rotations * (32 - 16) // 16
    assert long.copies_to_device == short.copies_to_device
    assert 0 < long.launches - short.launches < rotations * (32 - 16) * 2  # a step alone is a dozen


def test_steps_of_very_many_rows_are_launched_one_by_one(gpu, monkeypatch):
    monkeypatch.setattr(greedy, "MOST_CAPTURED", 0)
    short, long = (quantize(tiny_model(HALF), gpu, settings(steps=steps))[0] for steps in (16, 32))
    assert long.launches - short.launches > GROUPS * LAYERS * (32 - 16) * 5
    assert long.waits - short.waits == GROUPS * LAYERS * (32 - 16) // 16


@pytest.mark.parametrize("form", [IntegerFormat(4), MxFp4()], ids=str)
def test_gptq_launches_a_block_of_columns_as_one(gpu, form, monkeypatch):
    def launches(blocks: int) -> int:
        weight = torch.randn(24, blocks * gptq.BLOCK, device=gpu.device)
        hessian = torch.eye(weight.shape[1], dtype=torch.float64, device=gpu.device)
        own = form.parameters(*torch.aminmax(weight, dim=1, keepdim=True))
        return counted(gpu, lambda: gptq.gptq(weight, hessian, own, form, 0.01, "")).launches

    launches(1)  # the first of all is recorded
    assert 0 < launches(5) - launches(2) < 3 * gptq.BLOCK
    monkeypatch.setattr(gptq, "recorded_rounding", lambda *like: partial(gptq.round_columns, form=form))
    assert launches(5) - launches(2) > 3 * gptq.BLOCK * 8


@pytest.mark.parametrize(("dtype", "waits"), [(HALF, 2), (BFLOAT, 1)])
def test_a_training_step_waits_for_its_loss_and_where_it_is_scaled_for_the_scaler(gpu, dtype, waits):
    short, long = (quantize(tiny_model(dtype), gpu, settings(trained=True, epochs=epochs))[0] for epochs in (2, 3))
    steps = LAYERS * SAMPLES // BATCH
    assert long.waits - short.waits <= waits * steps
    assert long.copies_to_device == short.copies_to_device  # the samples are there already


@pytest.mark.parametrize(("name", "most"), [("llama", 150), ("mixtral", None)])
def test_a_training_step_is_recorded_and_launched_as_one_unless_experts_are_called(gpu, name, most, monkeypatch):
    counts = []
    for recorded in (2**26, 0):
        monkeypatch.setattr(training, "MOST_RECORDED", recorded)
        short, long = (quantize(MODELS[name](HALF), gpu, settings(True, epochs=each))[0] for each in (2, 3))
        counts.append((long.launches - short.launches) / (LAYERS * SAMPLES // BATCH))
        assert long.copies_to_device == short.copies_to_device
    if most is None:
        assert counts[0] == pytest.approx(counts[1], rel=0.05)  # the first run of all launches a few less
    else:
        assert counts[0] < most < counts[1] / 4


def test_samples_that_have_no_room_on_the_device_travel_at_every_step():
    with fake_device(free_memory=2**10) as gpu:
        short, long = (quantize(tiny_model(HALF), gpu, settings(trained=True, epochs=epochs))[0] for epochs in (2, 3))
    sample = TOKENS * 48 * 2  # bytes; three of each: input and two targets
    assert long.bytes_to_device - short.bytes_to_device == LAYERS * (2 - 1) * SAMPLES * 3 * sample


@every_model
def test_perplexity_waits_for_windows_and_layers_and_not_for_operations(gpu, name, dtype):
    model, traffic = MODELS[name](dtype), []
    spec = decoder_spec(model.config)
    for windows in (6, 12):
        before = gpu.traffic
        measured = perplexity(model, spec, random_tokens(windows, TOKENS), gpu.device)
        traffic.append(gpu.traffic - before)
        assert (measured.windows, measured.tokens_per_window) == (windows, TOKENS)
    assert traffic[1].waits - traffic[0].waits <= 2 * 6
    assert traffic[1].launches - traffic[0].launches > 5 * 6
    assert places(model) == {CPU}


@every_model
def test_divergence_from_the_full_model_is_measured(gpu, name, dtype):
    model, windows = MODELS[name](dtype), random_tokens(6, TOKENS)
    spec = decoder_spec(model.config)
    teacher = final_hidden(model, spec, windows, gpu.device, "full precision")
    quantize(model, gpu, settings())
    hidden = final_hidden(model, spec, windows, gpu.device, "quantized")
    assert (hidden.device, hidden.shape) == (CPU, teacher.shape)
    before = gpu.traffic
    measured = score(model, spec, windows, hidden, gpu.device, teacher)
    assert measured.divergence is not None
    shell = sum(tensor.nbytes for tensor in (model.lm_head.weight, model.model.norm.weight, *embeddings(model)))
    states = hidden[:, :-1].nbytes + teacher[:, :-1].nbytes + windows.nbytes
    assert (gpu.traffic - before).bytes_to_device == shell + states


def embeddings(model: nn.Module) -> list[Tensor]:
    return [model.model.embed_tokens.weight, *model.model.rotary_emb.buffers()]


@pytest.mark.parametrize(("name", "trained"), [("llama", False), ("llama with GQA", True), ("mixtral", False)])
def test_a_resumed_layer_is_neither_searched_nor_trained(gpu, name, trained):
    config, dtype = settings(trained), HALF
    whole, kept = quantize(MODELS[name](dtype), gpu, config)
    kept = {index: FinishedLayer(layer.state.to(CPU), layer.figures) for index, layer in kept.items()}
    model = MODELS[name](dtype)
    half, again = quantize(model, gpu, config, finished={0: kept[0]})
    assert list(again) == [1]
    assert places(model) == {CPU}
    model = MODELS[name](dtype)
    none, again = quantize(model, gpu, config, finished=kept)
    assert again == {}
    assert none.launches < half.launches < whole.launches
    assert none.waits < half.waits < whole.waits
    assert places(model) == {CPU}


def test_a_report_is_written_from_tensors_on_the_host(gpu, monkeypatch, tmp_path):
    written = []

    def save(tensors: dict[str, Tensor], path: Path, metadata: dict) -> None:
        Path(path).touch()
        written.append(tensors)

    monkeypatch.setattr(io, "save_file", save)
    for trained in (False, True):
        quantize(tiny_model(HALF), gpu, settings(trained), observers=(Recorder(tmp_path),))
        assert len(written) == LAYERS
        assert {tensor.device for tensors in written for tensor in tensors.values()} == {CPU}
        written.clear()


def test_a_tensor_that_was_left_on_the_host_ends_the_walk(gpu):
    model = tiny_model(HALF)
    norm = model.model.layers[1].input_layernorm
    norm.forward = lambda x: x * torch.ones(48, dtype=x.dtype)  # the device forgotten
    with pytest.raises(RuntimeError, match="same device"):
        statistics(model, gpu)


@pytest.mark.parametrize(
    "misplaced",
    [
        lambda there, here: there + here,
        lambda there, here: there @ here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.where(there > 0, there, here),
        lambda there, here: torch.mm(there, there, out=here),
        lambda there, here: here[there.argmax(0)],
        lambda there, here: there.index_select(0, here.argmax(0)),
        lambda there, here: nn.functional.embedding(here.argmax(0), there),
    ],
)
def test_an_operation_on_two_devices_raises(gpu, misplaced):
    here = torch.ones(4, 4)
    misplaced(here, here.clone())
    with pytest.raises(RuntimeError, match=r"same device"):
        misplaced(here.to(gpu.device), here)


def counted(gpu: FakeDevice, work) -> Traffic:
    before = gpu.traffic
    work()
    return gpu.traffic - before


def test_copies_reads_and_launches_are_counted(gpu):
    here = torch.ones(4, 4)
    there = here.to(gpu.device)
    assert gpu.traffic == Traffic(bytes_to_device=64, copies_to_device=1, bytes_held=64)
    assert counted(gpu, lambda: there.to(gpu.device)) == Traffic()
    assert counted(gpu, lambda: there.T[1:].reshape(-1)[None]).launches == 1  # the transposed rows become one row
    assert counted(gpu, lambda: there.view(-1)[2:]) == Traffic()
    assert counted(gpu, lambda: here * 2) == Traffic()
    assert counted(gpu, lambda: there * 2) == Traffic(launches=1)
    assert counted(gpu, lambda: torch._foreach_add_([there, there], 1.0)) == Traffic(launches=1)
    read = Traffic(bytes_to_host=64, copies_to_host=1, waits=1, bytes_held=64)
    for work in (there.cpu, there.tolist, lambda: here.copy_(there)):
        assert counted(gpu, work) == read
    assert counted(gpu, there[0, 0].item) == Traffic(bytes_to_host=4, copies_to_host=1, waits=1, bytes_held=4)
    assert counted(gpu, lambda: there.nonzero()).waits == counted(gpu, lambda: there[there > 0]).waits == 1
    assert counted(gpu, lambda: there[torch.tensor([1, 2])]) == Traffic(
        bytes_to_device=16, copies_to_device=1, launches=1, bytes_held=16
    )
    assert counted(gpu, lambda: there * torch.tensor(2.0)) == Traffic(launches=1)  # a number travels with the kernel


def test_a_stage_counts_what_is_inside_it_and_inside_its_stages(gpu):
    there = torch.ones(4, 4, device=gpu.device)
    holder = type("Holder", (), {"work": staticmethod(lambda: there * 2)})
    with gpu.stage("outer"):
        there + 1
        with gpu.staged(holder, "work", "inner"):
            holder.work()
            holder.work()
    holder.work()
    assert (gpu.stages["outer"].launches, gpu.stages["inner"].launches) == (3, 2)


def test_answers_are_plausible(gpu):
    there = torch.zeros(4, 4, device=gpu.device)
    assert there.sum().item() == 1.0
    assert there.isfinite().all()
    assert there.long().tolist() == [[1] * 4] * 4
    assert there.unique().tolist() == [0, 1, 2, 3]
    assert len(there[there > 0]) == 16
    assert len(torch.where(there == 2)[0]) == 4  # one in `distinct`
    assert torch.tensor([3, 5]).tolist() == [3, 5]  # known on the host
    assert torch.arange(2).repeat_interleave(torch.tensor([3, 5])).shape == (8,)


def test_a_gradient_is_where_its_tensor_is(gpu):
    weight = nn.Parameter(torch.ones(4, 4, device=gpu.device))
    (weight.half() @ torch.ones(4, 4, device=gpu.device, dtype=HALF)).sum().backward()
    assert (weight.grad.device, weight.grad.dtype) == (gpu.device, torch.float32)


def test_everything_is_put_back():
    before = torch.cuda.is_available(), FakeTensor.tolist, nn.functional.scaled_dot_product_attention
    with fake_device(free_memory=5) as gpu:
        assert torch.cuda.is_available()
        assert torch.cuda.mem_get_info(gpu.device)[0] == 5
        assert torch.ones(2, device=gpu.device).is_cuda
    after = torch.cuda.is_available(), FakeTensor.tolist, nn.functional.scaled_dot_product_attention
    assert after == before
    assert torch.ones(2).tolist() == [1, 1]


@every_model
def test_variants_stay_on_the_host_between_layers_and_leave_nothing_on_the_device(gpu, name, dtype):
    model, windows = MODELS[name](dtype), random_tokens(6, TOKENS)
    spec = decoder_spec(model.config)
    variants = Variants(model, spec, windows, gpu.device)
    peaks = channel_statistics(model, spec, random_tokens(SAMPLES, TOKENS), gpu.device).scales
    samples = random_tokens(SAMPLES, TOKENS)
    quantization = Quantization(model, spec, samples, peaks, settings(), gpu.device, None, [variants])
    walk(layers_in_memory(model, spec, gpu.device), [quantization, variants], LAYERS)
    assert len(variants.hidden) == 5 + GROUPS + LAYERS
    states = [variants.quantized.hidden, *variants.hidden.values()]
    assert {(each.device, each.dtype, each.shape) for each in states} == {(CPU, dtype, (6, TOKENS, 48))}
    assert len(scores(model, spec, windows, states, gpu.device, states[0])) == len(states)
    assert places(model) == {CPU}


@pytest.mark.parametrize("way", ["paper", "best", "transform trained"])
def test_a_model_that_stays_on_the_device_is_quantized_and_measured_there(gpu, way):
    model = tiny_model(HALF).to(gpu.device)
    quantize(model, gpu, settings() if way == "paper" else BEST[way])
    assert perplexity(model, decoder_spec(model.config), random_tokens(6, TOKENS), gpu.device).windows == 6
    assert places(model) == {gpu.device}


@pytest.mark.parametrize("way", ["best", "peaks of values", "transform trained"])
def test_what_processes_tell_each_other_is_on_the_host(gpu, way, monkeypatch):
    told = []
    monkeypatch.setattr(samples, "gather", lambda value: told.append(value) or [value])
    monkeypatch.setattr(samples, "world_size", lambda: 2)
    quantize(tiny_model(HALF).to(gpu.device), gpu, BEST[way])
    tensors = [each for each in tree_leaves(told) if isinstance(each, Tensor)]
    assert len(tensors) > LAYERS * GROUPS
    assert {tensor.device for tensor in tensors} == {CPU}


def test_what_one_process_finds_stays_on_the_device(gpu, monkeypatch):
    def traffic() -> Traffic:
        return quantize(tiny_model(HALF).to(gpu.device), gpu, BEST["best"])[0]

    alone = traffic()
    monkeypatch.setattr(samples, "gather", lambda value: [value])
    monkeypatch.setattr(samples, "world_size", lambda: 2)
    shared, rows = traffic(), LAYERS * GROUPS * BEST["best"].probe_tokens * 48 * 4
    assert shared.bytes_to_host - alone.bytes_to_host > rows
    assert shared.bytes_to_device - alone.bytes_to_device > rows


def test_of_hidden_states_beside_a_model_on_the_device_nothing_travels(gpu):
    def moved(samples: int) -> int:
        model = tiny_model(HALF).to(gpu.device)
        spec, tokens = decoder_spec(model.config), random_tokens(samples, TOKENS)
        before = gpu.traffic
        peaks = channel_statistics(model, spec, tokens, gpu.device).scales
        quantize_model(model, spec, tokens, peaks, settings(), gpu.device)
        perplexity(model, spec, tokens, gpu.device)
        return (gpu.traffic - before).bytes_to_device

    passes, number = 4, 8  # tokens go there for statistics, quantization, windows and scores: 8 bytes each
    assert moved(64) - moved(8) <= passes * number * (64 - 8) * TOKENS


@pytest.mark.parametrize(
    ("keep", "free", "whole", "kept"),
    [
        (Keep.AUTO, None, True, (False, False)),
        (Keep.AUTO, 2**40, True, (True, True)),
        (Keep.AUTO, 2**40, False, (True, False)),
        (Keep.AUTO, "states", True, (True, False)),
        (Keep.AUTO, 2**30, True, (False, False)),
        (Keep.HOST, 2**40, True, (False, False)),
        (Keep.DEVICE, 2**30, True, (True, True)),
        (Keep.DEVICE, 2**30, False, (True, False)),
    ],
)
def test_what_fits_stays_on_the_device(keep, free, whole, kept):
    config = zoo_config("llama-2-7b")
    plan = Plan(HALF, True, (128, 2048), ((341, 2048),))
    needed = estimate(load_skeleton(config), decoder_spec(config), settings(), plan)
    assert needed.device < needed.device + needed.states < needed.device + needed.states + needed.held
    room = int((needed.device + needed.states) * 1.2) if free == "states" else free
    found = choose_residence(keep, needed, room, whole)
    assert (found.states, found.weights) == kept
    larger = max(found.tokens - needed.window_tokens[0], 0) * needed.window_token
    assert found.needed - larger == needed.device + kept[0] * needed.states + kept[1] * needed.held


def test_what_is_left_is_for_larger_batches_of_windows():
    config = zoo_config("llama-2-7b")
    plan = Plan(HALF, True, (128, 2048), ((341, 2048),))
    needed = estimate(load_skeleton(config), decoder_spec(config), settings(), plan)
    least, most = needed.window_tokens
    everything = needed.device + needed.states + needed.held

    def tokens(free: float, keep: Keep = Keep.AUTO) -> int:
        found = choose_residence(keep, needed, int(free * 8 / 7) + 8, whole=True)
        assert found.needed <= max(free + 8, everything)
        return found.tokens

    assert tokens(everything) == least
    assert tokens(everything + 1000 * needed.window_token) == least + 1000
    assert tokens(everything + 10**6 * needed.window_token) == most
    assert tokens(needed.device, Keep.DEVICE) == least  # more than there is room for already
    assert tokens(everything, Keep.HOST) > least


def test_a_batch_of_windows_or_of_samples_is_as_large_as_a_gpu_has_room_for():
    taken = {}
    for free in (2**40, 2**22):
        with fake_device(free_memory=free) as gpu:
            model, batches = tiny_model(HALF), BatchSize.choose(None, TOKENS, gpu.device)
            spec, tokens = decoder_spec(model.config), random_tokens(6, TOKENS)
            perplexity(model, spec, tokens, gpu.device, batch_size=batches)
            observation = Observation(model, spec, tokens, gpu.device)
            walk(layers_in_memory(model, spec, gpu.device), [observation], LAYERS)
            taken[free] = batches.sequences, observation.batches.sequences
    width = 96  # of all heads
    fitting = int(2**22 * 7 / 8 / (TOKENS * width * 22))
    assert taken == {2**40: (65536 // TOKENS,) * 2, 2**22: (fitting, fitting)}


@pytest.mark.parametrize(("name", "dtype"), [("llama with GQA", HALF), ("llama with GQA", BFLOAT), ("mixtral", HALF)])
def test_the_whole_is_tuned_layer_by_layer_and_every_layer_is_back_where_it_was(name, dtype, gpu):
    model = MODELS[name](dtype)
    spec, tokens = decoder_spec(model.config), random_tokens(SAMPLES, TOKENS)
    teacher = Teacher(model, spec, tokens, gpu.device, None)
    walk(layers_in_memory(model, spec, gpu.device), [teacher], LAYERS)
    quantize(model, gpu, settings())
    before = places(model)
    report = tune_(model, spec, tokens, teacher.hidden, TuningSettings(SAMPLES), gpu.device)
    assert len(report.losses) == SAMPLES
    assert places(model) == before
