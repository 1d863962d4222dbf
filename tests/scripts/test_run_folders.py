"""Every experiment has a folder of its own, and the same one again replaces only its own results."""

import shutil
from pathlib import Path

import pytest
from conftest import random_tokens, run_script
from safetensors.torch import save_file
from script_cases import common, snapshot

TINY = ("--block_size", 16, "--max_rotation_step", 5, "--wbits", 4, "--abits", 4, "--net", "tiny", "--eval_ppl")


@pytest.fixture(scope="module")
def usual(model_folder, token_file) -> tuple:
    return (*common(model_folder, token_file), *TINY)


@pytest.fixture(scope="module")
def first(usual, tmp_path_factory) -> Path:
    """Where one run was started."""
    folder = tmp_path_factory.mktemp("first")
    assert run_script("main.py", *usual, folder=folder).returncode == 0
    return folder


@pytest.fixture
def folder(first, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(first, tmp_path / "copy")


def runs_in(folder: Path) -> set[Path]:
    return set((folder / "output").iterdir())


OTHERS = [
    ("--transform", "hadamard"),
    ("--transform", "none"),
    ("--seed", 7),
    ("--nsamples", 4),
    ("--seqlen", 16),
    ("--calib_dataset", "other.safetensors"),
    ("--test_dataset", "other.safetensors"),
    ("--limit", 2),
    ("--prompt", "w1", "--max_new_tokens", 2),
    ("--eval_kl",),
    ("--group_size", 16),
    ("--kbits", 8),
    ("--lac_kv", 0.9),
    ("--symmetric",),
    ("--lac", 0.9),
    ("--lac", 0.9000001),
    ("--smooth",),
    ("--smooth", "--alpha", 0.6),
    ("--lwc", "--epochs", 1),
    ("--dtype", "float16"),
    ("--attn_implementation", "eager"),
    ("--permutation_times", 2),
]


@pytest.mark.parametrize("flags", OTHERS, ids=lambda flags: " ".join(map(str, flags)))
def test_another_experiment_has_a_folder_of_its_own_and_leaves_the_first_alone(flags, usual, folder):
    save_file({"calibration": random_tokens(8, 32, 5), "test": random_tokens(4, 32, 6)}, folder / "other.safetensors")
    [own] = runs_in(folder)
    before = snapshot(own)
    done = run_script("main.py", *usual, *flags, folder=folder)
    assert done.returncode == 0, done.stderr
    assert snapshot(own) == before
    [other] = runs_in(folder) - {own}
    assert (other / "results.json").exists()
    again = run_script("main.py", *usual, *flags, folder=folder)
    assert again.returncode == 0, again.stderr
    assert runs_in(folder) == {own, other}
    assert snapshot(own) == before


def test_values_that_differ_late_have_different_folders(usual, folder):
    for ratio in (0.9, 0.9000001):
        assert run_script("main.py", *usual, "--lac", ratio, folder=folder).returncode == 0
    assert len(runs_in(folder)) == 3


@pytest.mark.parametrize(
    "flags",
    [(), ("--no-stream",), ("--eval_batch_size", 2), ("--quiet",), ("--save_dir", "ck"), ("--save_model", "saved")],
    ids=str,
)
def test_the_same_experiment_replaces_its_own_results_however_it_is_run(flags, usual, folder):
    [own] = runs_in(folder)
    before = snapshot(own)[own / "results.json"]
    assert run_script("main.py", *usual, *flags, folder=folder).returncode == 0
    assert runs_in(folder) == {own}
    assert snapshot(own)[own / "results.json"] != before
