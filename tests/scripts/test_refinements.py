"""What goes beyond the paper, through the scripts: saved, reported, compared, and refused."""

import pytest
from best_settings import FLAGS
from conftest import run_script
from script_cases import assert_refused, common, results_of

TUNED = ("--tune_samples", 3, "--tune_lr", 0.003)  # which gains something on these models


@pytest.fixture(scope="module")
def usual(model_folder, token_file) -> tuple:
    return (*common(model_folder, token_file), *FLAGS, "--net", "tiny", "--eval_ppl")


@pytest.mark.parametrize(
    "more",
    [
        ("--sensitivity", "--sensitivity_windows", 3),
        ("--sensitivity", "--sensitivity_windows", 3, "--value_rotation", "--train", "transform", "--epochs", 2),
        TUNED,
    ],
    ids=["as it is", "trained", "tuned"],
)
def test_a_saved_model_is_evaluated_to_exactly_the_same_perplexity(more, usual, token_file, tmp_path):
    flags = ("--save_model", "saved", "--report", *more)
    done = run_script("main.py", *usual, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path)
    assert results["failures"] == {}
    assert results["settings"]["rounding"] == "gptq"
    assert more != TUNED or results["tuning"]["loss_after"] < results["tuning"]["loss_before"]
    flags = ("--model", "saved", "--test_dataset", token_file, "--eval_ppl", "--output_dir", "again")
    done = run_script("main.py", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path, output="again")["perplexity_details"] == results["perplexity_details"]


def test_a_checkpoint_of_layers_serves_whatever_is_tuned_behind_them(usual, tmp_path):
    tuned = ("--nsamples", 5, *TUNED)
    runs = {
        "plain": ("--nsamples", 5, "--save_dir", "ck"),
        "resumed": (*tuned, "--resume", "ck"),
        "fresh": (*tuned, "--save_dir", "tuned"),
        "back": ("--nsamples", 5, "--resume", "tuned"),
    }
    found, stdout = {}, {}
    for name, flags in runs.items():
        done = run_script("main.py", *usual, *flags, "--output_dir", name, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        found[name], stdout[name] = results_of(tmp_path, output=name)["perplexity_details"], done.stdout
    assert stdout["resumed"].count("from the checkpoint") == stdout["back"].count("from the checkpoint") == 2
    assert found["resumed"] == found["fresh"]
    assert found["back"] == found["plain"] != found["fresh"]


def test_rows_without_rotation_are_compared_too(usual, tmp_path):
    done = run_script("compare.py", *usual, "--rows", "full", "rtn", "smooth", "dual", folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_plan_counts_it(usual, tmp_path):
    done = run_script("main.py", *usual, "--dry_run", folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--swc", "serch"), "'serch' is neither a number nor search"),
        (("--lac", "serch"), "'serch' is neither a number nor search"),
        (("--lac_kv", "search"), "--lac_kv"),
        (("--gptq_target", 2), "--gptq_target 2: must be between 0 and 1"),
        (("--gptq_target", "nan"), "--gptq_target nan"),
        (("--gptq_damping", 0), "--gptq_damping 0: must be in (0, 1]"),
        (("--head_transform", "balanced", "--transform", "none"), "--head_transform balanced: nothing is rotated"),
        (("--probe_tokens", 0), "--probe_tokens 0: must be at least 1"),
        (("--tune_samples", -1), "--tune_samples -1: must not be negative"),
        (("--tune_lr", 0), "--tune_lr 0: must be positive"),
        (("--tune_samples", 2, "--sensitivity"), "before they are tuned: give --tune_samples 0"),
        (("--tune_samples", 1), "--tune_samples 1: more than 1 are needed"),
        (("--tune_samples", 1000), "--tune_samples 1000: leaves none of"),
        (("--tune_samples", 1, "--calib_dataset", "mix"), "--tune_samples: cannot be drawn from a mix"),
        (("--rounding", "gtpq"), "--rounding"),
        (("--smooth_measure", "energie"), "--smooth_measure"),
        (
            ("--resume", "duquant_parameters.pth"),
            "is of the paper's code, which knows nothing of --smooth_measure energy",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_code_2(flags, words, usual, tmp_path):
    done = run_script("main.py", *usual, *flags, folder=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_number_is_refused_in_one_line(usual, tmp_path):
    assert_refused(run_script("main.py", *usual, "--gptq_target", 2, folder=tmp_path), "--gptq_target 2")
