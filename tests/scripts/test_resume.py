"""Runs of main.py that are killed, interrupted or fail, and go on."""

import os
import shlex
import shutil
import signal
import subprocess
import sys

import best_settings
import pytest
from conftest import ROOT, run_script, tiny_model
from script_cases import assert_refused, kill_at, layer_content, results_of, the_run
from starter import shared_starter

LAYERS = 4
FLAGS = ("--wbits", 4, "--abits", 4, "--smooth", "--lac", 0.95, "--block_size", 16, "--eval_ppl", "--net", "tiny")
TRAINED = ("--lwc", "--epochs", 6, "--max_rotation_step", 60)
BEST = (*best_settings.FLAGS, "--max_rotation_step", 250, "--tune_samples", 3, "--tune_lr", 0.003)
SEARCHED = ("--swc", 0.9, "--max_rotation_step", 350)


@pytest.fixture(scope="module")
def starter():
    return shared_starter()


@pytest.fixture(scope="module")
def usual(model_folder, token_file, tmp_path_factory) -> tuple:
    """The flags that all runs share, with a model of several layers."""
    folder = tmp_path_factory.mktemp("deep-llama")
    tiny_model(num_hidden_layers=LAYERS).save_pretrained(folder)
    for path in model_folder.glob("tokenizer*"):
        shutil.copy(path, folder)
    data = ("--calib_dataset", token_file, "--test_dataset", token_file)
    return ("--model", folder, *data, *FLAGS)


@pytest.fixture(scope="module", params=[SEARCHED, TRAINED, BEST], ids=["searched", "trained", "best"])
def uninterrupted(request, starter, usual, tmp_path_factory):
    """Flags and folder of a run that nothing disturbed, with the checkpoint `ck`."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    flags = (*usual, *request.param)
    done = starter.run(folder, *flags, "--save_dir", "ck")
    assert done.returncode == 0, done.stderr
    assert len(layer_content(folder / "ck")) == LAYERS
    if request.param == BEST:
        tuning = results_of(folder)["tuning"]
        assert tuning["loss_after"] < tuning["loss_before"]
    return flags, folder


KILLED_AT = {
    "run.json": ("run.json", 0),
    "first layer": ("layers/layer_000.safetensors", 0),
    "inside the second layer": ("layers/layer_000.safetensors", 0.05),
    "third layer": ("layers/layer_002.safetensors", 0),
}


@pytest.mark.parametrize("point", KILLED_AT)
def test_a_killed_run_resumes_to_bitwise_the_same_result(point, uninterrupted, starter, tmp_path):
    flags, whole = uninterrupted
    name, delay = KILLED_AT[point]
    killed = starter.run(tmp_path, *flags, "--save_dir", "ck", meanwhile=kill_at(tmp_path / "ck" / name, delay))
    assert killed.returncode == -signal.SIGKILL
    assert len(layer_content(tmp_path / "ck")) < LAYERS, "killed too late to prove anything"
    done = starter.run(tmp_path, *flags, "--resume", "ck")
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path)["perplexity_details"] == results_of(whole)["perplexity_details"]
    assert layer_content(tmp_path / "ck") == layer_content(whole / "ck")
    assert [path.name for path in (tmp_path / "ck/layers").glob(".*")] == []


def test_a_run_killed_in_the_middle_of_a_write_resumes_to_the_same_result(uninterrupted, starter, tmp_path):
    flags, whole = uninterrupted
    shutil.copytree(whole / "ck", tmp_path / "ck")
    last = tmp_path / "ck/layers/layer_003.safetensors"
    last.with_name(f".{last.name}.4711").write_bytes(last.read_bytes()[:1000])  # what such a write leaves
    last.unlink()
    assert starter.run(tmp_path, *flags, "--resume", "ck").returncode == 0
    assert layer_content(tmp_path / "ck") == layer_content(whole / "ck")
    assert sorted(path.name for path in (tmp_path / "ck/layers").iterdir()) == sorted(layer_content(whole / "ck"))


def test_a_complete_checkpoint_is_evaluated_without_statistics(uninterrupted, starter, tmp_path):
    flags, whole = uninterrupted
    shutil.copytree(whole / "ck", tmp_path / "ck")
    done = starter.run(tmp_path, *flags, "--resume", "ck")
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path)
    assert "statistics" not in results["seconds"]
    assert ("statistics" in results_of(whole)["seconds"]) == ("energy" not in flags), "which takes none from a file"
    assert results["perplexity_details"] == results_of(whole)["perplexity_details"]
    assert results["layers"] == results_of(whole)["layers"]
    assert not (tmp_path / "act_scales").exists()


def test_flags_of_evaluation_may_differ_and_others_are_refused_by_name(uninterrupted, starter, token_file, tmp_path):
    flags, whole = uninterrupted
    shutil.copytree(whole / "ck", tmp_path / "ck")
    shutil.copy(token_file, tmp_path / "other.safetensors")
    before = layer_content(tmp_path / "ck")
    for changed, message in (
        (("--wbits", 3), "--wbits was 4, is 3"),
        (("--seed", 7), "--seed was 2, is 7"),
        (("--alpha", 0.6), "--alpha was 0.5, is 0.6"),
        (("--nsamples", 4), "calibration data"),
    ):
        done = starter.run(tmp_path, *flags, *changed, "--resume", "ck")
        assert_refused(done, message)
    assert layer_content(tmp_path / "ck") == before
    done = starter.run(tmp_path, *flags, "--resume", "ck", "--limit", 2, "--test_dataset", "other.safetensors")
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path)["perplexity_details"]["other"]["windows"] == 2


def test_save_dir_and_resume_together_and_a_second_save_dir_are_refused(uninterrupted, starter, tmp_path):
    flags, whole = uninterrupted
    shutil.copytree(whole / "ck", tmp_path / "ck")
    assert_refused(starter.run(tmp_path, *flags, "--save_dir", "a", "--resume", "ck"), "--save_dir")
    assert_refused(starter.run(tmp_path, *flags, "--save_dir", "ck"), "go on with --resume ck")
    assert_refused(starter.run(tmp_path, *flags, "--resume", "nowhere"), "--resume nowhere: no checkpoint there")
    assert layer_content(tmp_path / "ck") == layer_content(whole / "ck")


@pytest.mark.parametrize("save_dir", [("--save_dir", "c k"), ("--save_dir=c k",)], ids=["space", "equals sign"])
def test_an_interrupted_run_prints_the_command_that_really_goes_on(save_dir, uninterrupted, starter, tmp_path):
    flags, whole = uninterrupted
    first = tmp_path / "c k/layers/layer_000.safetensors"
    done = starter.run(tmp_path, *flags, *save_dir, meanwhile=kill_at(first, sent=signal.SIGINT))
    assert done.returncode == 130
    assert "Traceback" not in done.stdout + done.stderr
    assert "KeyboardInterrupt" in results_of(tmp_path)["error"]
    [line] = [line for line in done.stderr.splitlines() if "--resume" in line]
    assert line in (the_run(tmp_path / "output") / "log.txt").read_text()
    assert 0 < len(layer_content(tmp_path / "c k")) < LAYERS
    program, script, *arguments = shlex.split(line.split("go on with: ")[1])
    assert (program, script) == ("python", str(ROOT / "main.py"))
    again = starter.run(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    assert results_of(tmp_path)["error"] is None
    assert results_of(tmp_path)["perplexity_details"] == results_of(whole)["perplexity_details"]


def test_a_real_ctrl_c_on_the_real_script_exits_130_with_what_is_done_saved(usual, tmp_path):
    command = [sys.executable, ROOT / "main.py", *usual, *SEARCHED, "--save_dir", "ck"]
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's shell ignores it
    ) as process:
        kill_at(tmp_path / "ck/layers/layer_000.safetensors", sent=signal.SIGINT)(process.pid)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume ck" in errors
    assert 0 < len(layer_content(tmp_path / "ck")) < LAYERS


def test_a_failing_evaluation_leaves_its_error_and_the_finished_layers(usual, tmp_path):
    fails = (
        "import evaluation.perplexity as module\n"
        "def fail(*a, **k):\n"
        "    raise RuntimeError('no memory left')\n"
        "module.head_logits = fail\n"
    )
    flags = (*usual, *SEARCHED, "--max_rotation_step", 20, "--save_dir", "ck")
    done = run_script("main.py", *flags, folder=tmp_path, first=fails)
    assert done.returncode == 1, done.stderr
    results = results_of(tmp_path)
    assert results["error"] == "failed: DuQuant: perplexity tokens"
    assert results["failures"] == {"perplexity tokens": "RuntimeError: no memory left"}
    assert results["perplexity"] == {}
    assert len(results["layers"]) == LAYERS
    assert len(layer_content(tmp_path / "ck")) == LAYERS
    assert "--resume ck" in done.stderr
    assert "no memory left" in (the_run(tmp_path / "output") / "log.txt").read_text()
