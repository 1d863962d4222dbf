"""What `--dry_run` tells of a run, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config

from experiment.dry_run import (
    Need,
    describe_bits,
    disk_needs,
    duration,
    group_table,
    memory_needs,
    number_ranges,
    refuse,
    short_names,
    size,
)
from experiment.estimate import Plan, estimate
from experiment.residence import Residence
from models import decoder_spec
from models.load import load_skeleton
from quantize.bits import BitSettings, ClipSettings
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import GqaSmooth, QuantSettings, SmoothSettings, TrainingSettings
from utils.errors import InputError, Missing, noting

CONFIG = tiny_config()
SKELETON, SPEC = load_skeleton(CONFIG), decoder_spec(CONFIG)
QUANT = QuantSettings(BitSettings(4, 4), smooth=SmoothSettings(0.5), rotation=RotationSettings(block_size=16, steps=20))
NEEDED = estimate(SKELETON, SPEC, QUANT, Plan(torch.float16, True, (8, 32), ((6, 32),)))
NOTHING = Residence(False, False, NEEDED.device)


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


def test_bits_are_told_by_role():
    clipped = replace(QUANT, clip=ClipSettings(0.9, 0.8))
    assert describe_bits(clipped) == (
        "weights 4 bits per output channel, asymmetric, clipping 0.8; linear inputs 4 bits per token, asymmetric, "
        "clipping 0.9; q 4 bits per head, asymmetric, clipping 0.9; k 4 bits per head, asymmetric, clipping 0.9; "
        "v 4 bits per head, asymmetric"
    )
    trained = replace(QUANT, bits=BitSettings(3, 16, 8, True), training=TrainingSettings())
    assert describe_bits(trained) == (
        "weights 3 bits per group of 8, symmetric, clipping trained; linear inputs 16 bits; q, k, v 16 bits"
    )


def test_names_numbers_and_sizes_are_short():
    assert short_names(["a.up", "a.gate"]) == "up, gate"
    assert short_names([f"experts.{index}.down" for index in range(8)]) == "down ×8"
    assert number_ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert (size(13.5e9), size(830e6), duration(3723.4)) == ("13.5 GB", "830 MB", "1:02:03")


def test_what_does_not_fit_is_refused_with_what_to_do():
    refuse(memory_needs(NEEDED, False, 0, NEEDED.host, NEEDED.device, NOTHING))
    refuse(memory_needs(NEEDED, False, 0, None, None, NOTHING))  # unknown: nothing is said
    larger = replace(NEEDED, host=2 * NEEDED.host_streamed)
    with pytest.raises(InputError, match=r"host memory: .* are needed, .*--stream"):
        refuse(memory_needs(larger, False, 0, larger.host - 1, larger.device, NOTHING))
    refuse(memory_needs(larger, True, 0, larger.host_streamed, larger.device, NOTHING))
    with pytest.raises(InputError, match="--nsamples") as both:
        refuse(memory_needs(larger, True, 0, 10, 10, NOTHING))
    assert "GPU memory" in str(both.value)
    assert "\n" not in str(both.value)


def test_hidden_states_that_live_in_files_need_no_memory():
    refuse(memory_needs(NEEDED, False, NEEDED.hidden, NEEDED.host - NEEDED.hidden, NEEDED.device, NOTHING))
    with pytest.raises(InputError, match="host memory"):
        refuse(memory_needs(NEEDED, False, NEEDED.hidden, NEEDED.host - NEEDED.hidden - 1, NEEDED.device, NOTHING))


def test_a_disk_that_is_too_small_is_named_and_shared_by_its_folders(tmp_path, monkeypatch):
    folders = {"--save_dir": (tmp_path / "new/a", 10), "--save_model": (tmp_path / "b", 100)}
    monkeypatch.setattr("experiment.dry_run.free_disk", lambda folder: (1, 100))
    refuse(disk_needs({**folders, "--save_dir": (None, 10)}))
    with pytest.raises(InputError, match=f"--save_model {tmp_path}/b.*another disk"):
        refuse(disk_needs(folders))
    assert not list(tmp_path.iterdir())


def test_a_need_without_a_known_limit_is_no_problem():
    assert Need("host memory", 5, None).problem is None
    assert Need("host memory", 5, 5).problem is None
    assert Need("host memory", 6, 5).problem is not None


def test_only_what_is_missing_is_noted():
    missing = []
    with noting(missing, "--flag"):
        raise Missing("no such file")
    assert missing == ["--flag: no such file"]
    with pytest.raises(InputError, match="wrong"), noting(missing):
        raise InputError("wrong")
    with pytest.raises(Missing), noting(None):
        raise Missing("no such file")
    assert len(missing) == 1
