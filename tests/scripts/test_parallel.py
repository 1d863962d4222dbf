"""main.py in two processes that share the calibration: real ones, once started by torchrun, and then forked."""

import os
import subprocess
import sys

import best_settings
import pytest
import torch
from conftest import ROOT, run_in_two, run_script
from safetensors.torch import load_file
from script_cases import results_of, the_run

FLAGS = ("--wbits", 4, "--abits", 4, "--smooth", "--lac", 0.95, "--block_size", 16, "--max_rotation_step", 20)
TRAINED = (*FLAGS, "--lwc", "--epochs", 3, "--batch_size", 3, "--eval_ppl", "--net", "tiny", "--save_dir", "ck")


def launch(folder, *flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, str(ROOT / "main.py"), *map(str, flags)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def usual(model_folder, token_file) -> tuple:
    return ("--model", model_folder, "--calib_dataset", token_file, "--test_dataset", token_file)


@pytest.fixture(scope="module")
def both(usual, tmp_path_factory):
    """Folders of the same run in one process and in two. Batches of three of eight samples: shares are unequal."""
    alone, shared = (tmp_path_factory.mktemp(name) for name in ("alone", "shared"))
    done = run_script("main.py", *usual, *TRAINED, folder=alone)
    assert done.returncode == 0, done.stderr
    done = launch(shared, *usual, *TRAINED)
    assert done.returncode == 0, done.stderr
    return alone, shared


def test_statistics_are_the_same_to_the_bit(both):
    for kind in ("act_scales", "act_shifts"):
        alone, shared = (load_file(folder / kind / "tiny.safetensors") for folder in both)
        assert alone.keys() == shared.keys()
        assert all(torch.equal(alone[name], shared[name]) for name in alone)


def test_rotations_and_permutations_of_the_first_layer_are_the_same_to_the_bit(both):
    alone, shared = (load_file(folder / "ck/layers/layer_000.safetensors") for folder in both)
    assert alone.keys() == shared.keys()
    decided = [name for name in alone if "rotations" in name or "permutations" in name or "scale" in name]
    assert len(decided) >= 12
    assert all(torch.equal(alone[name], shared[name]) for name in decided)


def test_training_losses_and_clips_agree_to_the_order_of_sums(both):
    alone, shared = (results_of(folder)["layers"] for folder in both)
    for one, other in zip(alone, shared, strict=True):
        for name in ("loss_before", "loss_after"):
            assert other["training"][name] == pytest.approx(one["training"][name], rel=1e-3)
        assert other["training"]["losses"] == pytest.approx(one["training"]["losses"], rel=1e-3)
        assert other["training"]["restored"] == one["training"]["restored"] == 0
    assert results_of(both[1])["perplexity"]["tokens"] == pytest.approx(
        results_of(both[0])["perplexity"]["tokens"], rel=0.01
    )


def test_layers_that_each_process_reads_when_their_turn_comes_are_those_of_models_in_memory(usual, both, tmp_path):
    done = run_in_two(tmp_path, *usual, *TRAINED, "--stream", "--save_model", "saved")
    assert done.returncode == 0, done.stderr
    for name in ("layer_000.safetensors", "layer_001.safetensors"):
        here, there = (load_file(folder / "ck/layers" / name) for folder in (tmp_path, both[1]))
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], there[key]) for key in here)
    assert results_of(tmp_path)["perplexity"] == results_of(both[1])["perplexity"]
    assert any((tmp_path / "saved").glob("*.safetensors"))


def test_only_one_process_writes_and_speaks(both):
    log = (the_run(both[1] / "output") / "log.txt").read_text()
    assert log.count("results: ") == 1
    assert sorted(path.name for path in (both[1] / "ck/layers").iterdir()) == [
        "layer_000.safetensors",
        "layer_001.safetensors",
    ]


BEST = (*best_settings.FLAGS, "--eval_ppl", "--net", "tiny", "--save_dir", "ck")


def test_what_samples_decide_is_decided_by_those_of_all_processes(usual, tmp_path):
    """Sums have another order, and codes near the middle of two values may go either way, no more."""
    folders = alone, shared = [tmp_path / name for name in ("alone", "shared")]
    for folder in folders:
        folder.mkdir()
    done = run_script("main.py", *usual, *BEST, folder=alone)
    assert done.returncode == 0, done.stderr
    done = run_in_two(shared, *usual, *BEST)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(folder / "ck/layers/layer_000.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    for name in first:
        if name.endswith(("shift", "mean", "groups.qkv.scale", "groups.qkv.rotations")):
            torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-4)
    same = (first["weights.self_attn.q_proj.values"] == second["weights.self_attn.q_proj.values"]).float().mean()
    assert same > 0.95
    found = [results_of(folder)["perplexity"]["tokens"] for folder in folders]
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_a_transform_is_trained_by_all_processes_as_by_one(usual, tmp_path):
    """In the first layer, that is: a code that goes the other way there changes everything behind it."""
    flags = (*usual, *BEST, "--value_rotation", "--train", "transform", "--epochs", 2, "--batch_size", 2)
    folders = alone, shared = [tmp_path / name for name in ("alone", "shared")]
    for folder in folders:
        folder.mkdir()
    done = run_script("main.py", *flags, folder=alone)
    assert done.returncode == 0, done.stderr
    done = run_in_two(shared, *flags)
    assert done.returncode == 0, done.stderr
    first, second = ([layer["training"] for layer in results_of(folder)["layers"]] for folder in folders)
    for training in (*first, *second):
        assert training["loss_after"] < training["loss_before"]
    for key in ("loss_before", "loss_after"):
        assert second[0][key] == pytest.approx(first[0][key], rel=0.05)


def test_the_whole_is_tuned_by_all_processes_on_a_sample_of_each(usual, tmp_path):
    folders = alone, shared = [tmp_path / name for name in ("alone", "shared")]
    for folder in folders:
        folder.mkdir()
    flags = (*usual, "--tune_samples", 3)
    done = run_script("main.py", *flags, folder=alone)
    assert done.returncode == 0, done.stderr
    done = run_in_two(shared, *flags)
    assert done.returncode == 0, done.stderr
    one, two = (results_of(folder)["tuning"] for folder in folders)
    assert (len(one["losses"]), len(two["losses"])) == (3, 2)
    assert two["loss_before"] == pytest.approx(one["loss_before"], rel=0.1)
    assert two["losses"][0] == pytest.approx(sum(one["losses"][:2]) / 2, rel=0.1)  # the second is of a step later


def test_a_process_without_samples_to_decide_by_is_refused(usual, tmp_path):
    trained = ("--swc", "none", "--lwc", "--epochs", 1, "--batch_size", 1)
    done = run_in_two(tmp_path, *usual, *best_settings.FLAGS, *trained)
    assert done.returncode != 0
    assert "--batch_size 1: leaves some of the 2 processes without samples" in done.stderr


DIE = """
import os, sys
if os.environ.get("RANK") == "1":
    import builtins
    real = builtins.__import__
    def patched(name, *arguments, **keywords):
        module = real(name, *arguments, **keywords)
        if name == "quantize.layer" and hasattr(module, "decide") and not hasattr(module, "patched"):
            module.patched, decide = True, module.decide
            def die(layer, index, *rest, **more):
                if index == 1:
                    os._exit(9)
                return decide(layer, index, *rest, **more)
            module.decide = die
        return module
    builtins.__import__ = patched
"""


def test_a_process_that_dies_ends_the_run_with_a_checkpoint_that_resumes(usual, both, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(DIE)
    done = launch(tmp_path, *usual, *TRAINED, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "--resume ck" in done.stderr
    assert [path.name for path in (tmp_path / "ck/layers").iterdir()] == ["layer_000.safetensors"]
    again = [flag for flag in TRAINED if flag not in ("--save_dir", "ck")]
    done = run_in_two(tmp_path, *usual, *again, "--resume", "ck")
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path)["perplexity"] == results_of(both[1])["perplexity"]


def test_fewer_samples_than_processes_are_refused(usual, tmp_path):
    done = run_in_two(tmp_path, *usual, *FLAGS, "--nsamples", 1)
    assert done.returncode != 0
    assert "--nsamples 1" in done.stderr
