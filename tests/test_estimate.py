"""What a run needs, from shapes: held against real models and runs, and what makes it larger."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch
from conftest import random_tokens, run_script, tiny_config, tiny_model
from experiment.rates import Rates, measure_rates, stage_seconds
from quantize.config import (
    BitConfig,
    ClipConfig,
    GqaSmooth,
    Probe,
    QuantConfig,
    RotationConfig,
    SmoothConfig,
    TrainingConfig,
    Transform,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiment.dry_run import (
    Need,
    disk_needs,
    duration,
    group_table,
    memory_needs,
    number_ranges,
    refuse,
    short_names,
    size,
)
from experiment.estimate import CONTEXT_BYTES, Plan, calibration_copies, estimate, forward_operations, work_of
from models import decoder_spec
from models.load import load_skeleton
from quantize.greedy import GreedySearch, greedy_rotation
from quantize.observe import layer_calls
from quantize.statistics import channel_statistics
from quantize.walk import Flow, quantize_model
from utils.errors import InputError

CONFIG = tiny_config()
SKELETON, SPEC = load_skeleton(CONFIG), decoder_spec(CONFIG)
QUANT = QuantConfig(BitConfig(4, 4), smooth=SmoothConfig(0.5), rotation=RotationConfig(block_size=16, steps=20))
CPU = Plan(torch.float16, False, (8, 32), ((6, 32),))
GPU = replace(CPU, on_gpu=True)
HOST = torch.device("cpu")


def figures(quant: QuantConfig = QUANT, plan: Plan = CPU):
    return estimate(SKELETON, SPEC, quant, plan)


def held(modules: Iterable[nn.Module]) -> int:
    """Bytes that the parameters of real modules take."""
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(("plan", "dtype"), [(CPU, torch.float32), (GPU, torch.float16)])
def test_weights_layers_and_shell_are_as_large_as_a_real_model_s(plan, dtype):
    found, model = figures(plan=plan), tiny_model(dtype)
    assert (found.parameters, found.layers) == (model.num_parameters(), len(model.model.layers))
    assert found.weights == held([tiny_model(torch.float16)])
    assert found.layer_wide == max(held([layer]) for layer in tiny_model().model.layers)
    assert found.shell == held([model]) - held(model.model.layers)


@pytest.mark.parametrize(("plan", "dtype"), [(CPU, torch.float32), (GPU, torch.float16)])
def test_hidden_states_are_as_large_as_those_that_really_flow(plan, dtype):
    found = figures(plan=replace(plan, windows=((6, 32), (9, 32))))
    calibration, tests = (layer_calls(tiny_model(dtype), SPEC, random_tokens(n, 32), HOST).hidden for n in (8, 9))
    assert found.calibration_hidden == calibration.nbytes
    assert found.evaluation_hidden == tests.nbytes


def test_streaming_saves_at_least_the_memory_that_the_estimate_says(model_folder, token_file, tmp_path):
    model = tiny_model(num_hidden_layers=6, hidden_size=768, intermediate_size=2048, head_dim=128)
    model.save_pretrained(tmp_path / "model")
    for path in model_folder.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    data = ("--calib_dataset", token_file, "--test_dataset", token_file)
    flags = ("--wbits", 4, "--abits", 4, "--block_size", 16, "--max_rotation_step", 2, "--eval_ppl", "--net", "tiny")
    peaks = {}
    for flag in ("--no-stream", "--stream"):
        done = run_script("main.py", "--model", tmp_path / "model", *data, *flags, flag, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / "output/tiny_w4a4/results.json").read_text())
        peaks[flag] = results["peak_host_memory_bytes"]
    found = estimate(load_skeleton(model.config), decoder_spec(model.config), QUANT, CPU)
    assert peaks["--no-stream"] - peaks["--stream"] > found.host - found.host_streamed > 0.5 * held([model])


def test_training_holds_as_many_more_states_as_are_really_made():
    samples, made = random_tokens(8, 32), []

    def allocate(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        made.append(torch.empty(tuple(shape), dtype=dtype))
        return made[-1]

    trained = replace(QUANT, clip=ClipConfig(learned=True))
    more = calibration_copies(trained, False) - calibration_copies(QUANT, False)
    totals = []
    for quant in (QUANT, trained):
        made.clear()
        Flow(tiny_model(), SPEC, samples, quant, HOST, allocate)
        totals.append(sum(tensor.nbytes for tensor in made))
    assert totals[1] - totals[0] == more * figures().calibration_hidden > 0


def test_training_needs_more_on_the_host_on_the_device_and_on_disk():
    trained = replace(QUANT, clip=ClipConfig(learned=True))
    augmented = replace(trained, training=TrainingConfig(augmented=True))
    offloaded = replace(trained, training=TrainingConfig(offload=True))
    # many samples: what they take shows
    plan = replace(GPU, calibration=(800, 32))
    hosts = [figures(quant, plan).host for quant in (QUANT, trained, augmented, offloaded)]
    assert hosts == sorted(set(hosts))
    assert figures(trained, GPU).device > figures(plan=GPU).device
    assert figures(trained).save_dir > figures().save_dir


def test_larger_plans_need_more():
    assert figures(plan=replace(GPU, windows=((6, 4000),))).device > figures(plan=GPU).device
    divergence = replace(CPU, windows=((600, 32),))
    assert figures(plan=replace(divergence, divergence=True)).host > figures(plan=divergence).host
    sampled = replace(QUANT, probe=Probe.SAMPLE)
    assert (
        figures(sampled, replace(GPU, calibration=(8, 4096))).device
        > figures(plan=replace(GPU, calibration=(8, 4096))).device
    )


def test_an_evaluation_of_the_whole_model_needs_it_on_the_device():
    config = tiny_config(num_hidden_layers=80)
    deep = (load_skeleton(config), decoder_spec(config), QUANT)
    apart, whole = (estimate(*deep, replace(GPU, whole=whole)) for whole in (False, True))
    assert whole.device > whole.weights > apart.device - CONTEXT_BYTES


def test_a_model_that_is_not_quantized_writes_no_checkpoint():
    assert figures(replace(QUANT, bits=BitConfig(16, 16))).save_dir == 0


@pytest.mark.parametrize("length", [16, 32, 64])
def test_operations_are_those_that_pytorch_counts_in_a_forward_pass(length):
    model = tiny_model()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(random_tokens(3, length))
    assert counter.get_total_flops() == 3 * length * forward_operations(SKELETON, SPEC, length, head=True)


def test_greedy_steps_are_those_that_a_run_makes_at_most(monkeypatch):
    made = Counter()

    def counted(x: torch.Tensor, step: torch.Tensor, steps: int, *rest: object) -> GreedySearch:
        made[x.shape[-1]] += steps
        return greedy_rotation(x, step, steps, *rest)

    monkeypatch.setattr("quantize.transform.greedy_rotation", counted)
    model, tokens = tiny_model(), random_tokens(8, 32)
    peaks = channel_statistics(model, SPEC, tokens, HOST).scales
    quantize_model(model, SPEC, tokens, peaks, QUANT, HOST)
    assert work_of(SKELETON, SPEC, QUANT, CPU).steps == made


def test_what_is_not_done_takes_no_time():
    plain = work_of(SKELETON, SPEC, replace(QUANT, transform=Transform.NONE), replace(CPU, statistics=False))
    assert (plain.statistics, plain.steps) == (0, {})
    untouched = work_of(SKELETON, SPEC, replace(QUANT, bits=BitConfig(16, 16)), CPU)
    assert (untouched.statistics, untouched.layers, untouched.steps) == (0, 0, {})
    assert untouched.evaluation == work_of(SKELETON, SPEC, QUANT, CPU).evaluation > 0
    saved = work_of(SKELETON, SPEC, QUANT, replace(CPU, calibration=(0, 32), statistics=False))
    assert (saved.layers, saved.steps) == (0, {})
    assert figures(plan=replace(CPU, calibration=(0, 32))).calibration_hidden == 0


def test_seconds_are_work_over_rates():
    work = work_of(SKELETON, SPEC, QUANT, GPU)
    slow, fast = (stage_seconds(work, Rates(rate, {48: 1.0, 80: 2.0, 96: 3.0}, 1e9)) for rate in (1e9, 2e9))
    assert slow["activation statistics"] == 2 * fast["activation statistics"] > 0
    assert slow["search, at most"] == 160 * 1 + 80 * 2 + 80 * 3
    assert slow["copying to the GPU and back"] == work.moved / 1e9


def test_rates_are_measured_on_this_machine():
    rates = measure_rates(torch.device("cpu"), torch.float32, [48, 80], 32, QUANT.rotation)
    assert rates.operations > 1e6
    assert set(rates.step) == {48, 80}
    assert rates.copied == float("inf")


def test_a_step_on_very_large_blocks_is_not_tried_out():
    rates = measure_rates(torch.device("cpu"), torch.float32, [30000], 32, RotationConfig(block_size=-1))
    assert rates.step[30000] == pytest.approx((2 * 32 * 30000**2 + 4 * 30000**3) / rates.operations)


def test_the_group_table_says_what_is_transformed_and_where_its_scale_goes():
    lines = group_table(SKELETON, SPEC, QUANT).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["qkv", "0–1", "q_proj, k_proj, v_proj", "48", "16", "3", "folded into input_layernorm"]
    assert [row[-1] for row in cells][1:] == [
        "online",
        "folded into post_attention_layernorm",
        "folded into mlp.up_proj",
    ]
    assert cells[3][3:6] == ["80", "16", "5"]
    folded = group_table(SKELETON, SPEC, replace(QUANT, smooth=SmoothConfig(0.5, gqa=GqaSmooth.FOLD)))
    assert "folded into self_attn.v_proj, shared by 3 heads" in folded
    assert "| – |" in " ".join(group_table(SKELETON, SPEC, replace(QUANT, transform=Transform.NONE)).split())


def test_names_numbers_and_sizes_are_short():
    assert short_names(["a.up", "a.gate"]) == "up, gate"
    assert short_names([f"experts.{index}.down" for index in range(8)]) == "down ×8"
    assert number_ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert (size(13.5e9), size(830e6), duration(3723.4)) == ("13.5 GB", "830 MB", "1:02:03")


def test_what_does_not_fit_is_refused_with_what_to_do():
    found = figures(plan=GPU)
    refuse(memory_needs(found, True, False, found.host, found.device))
    refuse(memory_needs(found, True, False, None, None))  # unknown: nothing is said
    found = replace(found, host=2 * found.host_streamed)
    with pytest.raises(InputError, match=r"host memory: .* are needed, .*--stream"):
        refuse(memory_needs(found, True, False, found.host - 1, found.device))
    refuse(memory_needs(found, True, True, found.host_streamed, found.device))
    with pytest.raises(InputError, match="--nsamples") as both:
        refuse(memory_needs(found, True, True, 10, 10))
    assert "GPU memory" in str(both.value)
    assert "\n" not in str(both.value)


def test_a_disk_that_is_too_small_is_named_and_shared_by_its_folders(tmp_path, monkeypatch):
    found = figures()
    both = {"--save_dir": tmp_path / "new/a", "--save_model": tmp_path / "b"}
    monkeypatch.setattr("experiment.dry_run.free_disk", lambda folder: (1, found.save_model))
    refuse(disk_needs(found, {**both, "--save_dir": None}))
    with pytest.raises(InputError, match=f"--save_model {tmp_path}/b.*another disk"):
        refuse(disk_needs(found, both))
    assert not list(tmp_path.iterdir())


def test_a_need_without_a_known_limit_is_no_problem():
    assert Need("host memory", 5, None).problem is None
    assert Need("host memory", 5, 5).problem is None
    assert Need("host memory", 6, 5).problem is not None
