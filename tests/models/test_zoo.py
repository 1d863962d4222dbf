"""The zoo: configs of the paper's models, every one of them plannable without weights."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from experiment.estimate import Plan, estimate
from models import decoder_spec
from models.load import load_skeleton
from models.zoo import SHAPES, zoo_config
from quantize.bits import BitSettings, ClipSettings
from quantize.quantization import check_shapes
from quantize.settings import QuantSettings, SmoothSettings
from utils.errors import InputError

PAPER = QuantSettings(BitSettings(4, 4), ClipSettings(0.9, 0.8), SmoothSettings(0.6))
BILLIONS = {  # as published, or counted from the published checkpoints
    "llama-7b": 6.738,
    "llama-13b": 13.016,
    "llama-30b": 32.529,
    "llama-65b": 65.286,
    "llama-2-7b": 6.738,
    "llama-2-13b": 13.016,
    "llama-2-70b": 68.977,
    "llama-3-8b": 8.030,
    "llama-3-70b": 70.554,
    "vicuna-7b": 6.738,
    "vicuna-13b": 13.016,
    "mistral-7b": 7.242,
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_model_of_the_zoo_can_be_planned(name):
    config = zoo_config(name)
    skeleton, spec = load_skeleton(config), decoder_spec(config)
    check_shapes(skeleton, spec, PAPER)
    found = estimate(skeleton, spec, PAPER, Plan(config.dtype, True, (128, 2048), ((341, 2048),)))
    assert found.parameters / 1e9 == pytest.approx(BILLIONS[name], abs=5e-4)
    assert found.weights == 2 * found.parameters
    assert found.layers == config.num_hidden_layers
    assert found.layer_wide < found.device < found.host_streamed < found.host
    assert found.checkpoint < 1e-2 * found.weights


def test_the_zoo_has_the_published_dimensions_that_differ_between_series():
    assert zoo_config("llama-65b").max_position_embeddings == 2048
    assert zoo_config("llama-2-70b").num_key_value_heads == 8
    assert zoo_config("llama-3-8b").rope_parameters["rope_theta"] == 5e5
    assert zoo_config("llama-3-8b").dtype is torch.bfloat16
    assert zoo_config("mistral-7b").sliding_window == 4096
    assert zoo_config("llama-2-13b", layers=3).num_hidden_layers == 3


def test_a_model_that_is_not_in_the_zoo_is_refused_with_the_names_of_those_that_are():
    with pytest.raises(InputError, match=r"llama-9b.*llama-2-70b"):
        zoo_config("llama-9b")


def benchmark(*flags: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks/zoo.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def test_the_benchmark_times_the_layers_asked_for_and_ends_with_json():
    figures = json.loads(
        benchmark("--shape", "128x256", "--layers", 2, "--nsamples", 2, "--seqlen", 16, "--device", "cpu")
        .strip()
        .splitlines()[-1]
    )
    assert figures["layers"] == 2
    assert 0 < figures["seconds"]["search"] < figures["seconds"]["quantize"]
    assert figures["seconds"]["statistics"] > 0


def test_the_table_has_a_row_for_every_model():
    rows = benchmark("--table").strip().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == list(SHAPES)
