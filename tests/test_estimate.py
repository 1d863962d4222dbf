"""What a run needs, from shapes: sums that can be checked by hand, and what makes them larger."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config

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
from experiment.estimate import CONTEXT_BYTES, PROCESS_BYTES, Plan, estimate, forward_operations, work_of
from experiment.rates import Rates, measure_rates, stage_seconds
from models import decoder_spec
from models.load import load_skeleton
from quantize.settings import (
    BitSettings,
    ClipSettings,
    GqaSmooth,
    Probe,
    QuantSettings,
    RotationSettings,
    SmoothSettings,
    TrainingSettings,
    Transform,
)
from utils.errors import InputError

CONFIG = tiny_config()
SKELETON, SPEC = load_skeleton(CONFIG), decoder_spec(CONFIG)
QUANT = QuantSettings(BitSettings(4, 4), smooth=SmoothSettings(0.5), rotation=RotationSettings(block_size=16, steps=20))
CPU = Plan(torch.float16, False, (8, 32), ((6, 32),))
GPU = replace(CPU, on_gpu=True)
LINEARS = 48 * 96 + 2 * 48 * 32 + 96 * 48 + 3 * 48 * 80  # q, k and v, o, MLP
LAYER = LINEARS + 2 * 48
SHELL = 2 * 97 * 48 + 48


def figures(quant: QuantSettings = QUANT, plan: Plan = CPU):
    return estimate(SKELETON, SPEC, quant, plan)


def test_parameters_layers_and_shell_are_counted_from_the_shapes():
    found = figures()
    assert (found.parameters, found.layers) == (2 * LAYER + SHELL, 2)
    assert found.layer_wide == 4 * LAYER
    assert found.shell == 4 * SHELL  # a CPU computes in float32
    assert figures(plan=GPU).shell == 2 * SHELL
    assert found.weights == figures(plan=GPU).weights == 2 * (2 * LAYER + SHELL)
    assert found.calibration_hidden == 4 * 8 * 32 * 48
    assert figures(plan=replace(GPU, windows=((6, 32), (9, 32)))).evaluation_hidden == 2 * 9 * 32 * 48


def test_the_host_holds_the_model_the_states_and_what_works_on_a_layer():
    found = figures()
    least = 4 * found.parameters + PROCESS_BYTES + found.calibration_hidden
    assert least < found.host < least + 10**7
    assert found.device == 0
    assert (
        figures(plan=GPU).host == 2 * found.parameters + found.calibration_hidden // 2 + PROCESS_BYTES + CONTEXT_BYTES
    )


def test_streamed_one_layer_and_a_half_take_the_place_of_the_model():
    found = figures()
    assert found.host - found.host_streamed == 4 * found.parameters - found.shell - found.layer_wide * 3 // 2


def test_training_holds_more_states_and_more_on_the_device():
    trained = replace(QUANT, clip=ClipSettings(learned=True))
    augmented = replace(trained, training=TrainingSettings(augmented=True))
    offloaded = replace(trained, training=TrainingSettings(offload=True))
    # many samples: what they take shows
    hosts = [
        figures(quant, replace(GPU, calibration=(800, 32))).host for quant in (QUANT, trained, augmented, offloaded)
    ]
    states = 2 * 800 * 32 * 48
    assert [host - hosts[0] for host in hosts] == [0, states, 2 * states, 3 * states]
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


def test_disk_is_that_of_the_checkpoint_and_of_the_model_with_its_transforms():
    found = figures()
    assert found.save_model == 4 * found.parameters + found.save_dir
    assert figures(replace(QUANT, bits=BitSettings(16, 16))).save_dir == 0


def test_operations_follow_the_linears_attention_and_the_head():
    per_token = forward_operations(SKELETON, SPEC, 32)
    assert per_token == 2 * 2 * (LINEARS + 2 * 32 * 96)
    assert forward_operations(SKELETON, SPEC, 32, head=True) - per_token == 2 * 97 * 48
    work = work_of(SKELETON, SPEC, QUANT, CPU)
    assert work.statistics == 8 * 32 * per_token
    assert work.steps == {48: 2 * 2 * 2 * 20, 96: 2 * 2 * 20, 80: 2 * 2 * 20}  # layers × groups × rotations × steps
    assert work.moved == work.training == 0
    # to the GPU and back: the layers for statistics, quantization and perplexity, and for statistics the states
    assert work_of(SKELETON, SPEC, QUANT, GPU).moved == 2 * (3 * 2 * 2 * LAYER + 2 * 2 * 8 * 32 * 48)


def test_what_is_not_done_takes_no_time():
    plain = work_of(SKELETON, SPEC, replace(QUANT, transform=Transform.NONE), replace(CPU, statistics=False))
    assert (plain.statistics, plain.steps) == (0, {})
    untouched = work_of(SKELETON, SPEC, replace(QUANT, bits=BitSettings(16, 16)), CPU)
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
    rates = measure_rates(torch.device("cpu"), torch.float32, [30000], 32, RotationSettings(block_size=-1))
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
    folded = group_table(SKELETON, SPEC, replace(QUANT, smooth=SmoothSettings(0.5, gqa=GqaSmooth.FOLD)))
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
