"""Evaluations of the real main.py: together, failing, interrupted, shared by processes, spread over devices."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, random_tokens, run_in_two, run_script
from safetensors.torch import save_file
from script_cases import FAIL_ONCE, results_of, the_run

from utils.io import read_tensors, write_tensors

TINY = ("--block_size", "16", "--max_rotation_step", "20", "--wbits", 4, "--abits", 4, "--net", "tiny")


@pytest.fixture(scope="module")
def usual(model_folder, token_file, tmp_path_factory) -> tuple:
    """Flags of a run over two test sets."""
    second = tmp_path_factory.mktemp("more") / "second.safetensors"
    save_file({"test": random_tokens(5, 32, seed=9)}, second)
    data = ("--calib_dataset", token_file, "--test_dataset", token_file, second)
    return ("--model", model_folder, *data, *TINY)


@pytest.fixture(scope="module")
def whole(usual, tmp_path_factory) -> dict:
    """Results of a run that nothing disturbed, with everything this file asks for."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ("--eval_ppl", "--eval_kl", "--prompt", "w1 w2 w3", "w5", "--max_new_tokens", 6)
    done = run_script("main.py", *usual, *flags, folder=folder)
    assert done.returncode == 0, done.stderr
    assert not (the_run(folder / "output") / "unfinished.jsonl").exists()
    return {**results_of(folder), "stdout": done.stdout}


def both_models(results: dict) -> dict[str, dict]:
    """Figures of the full-precision and of the quantized model."""
    return {"full": results["full_precision"], "ours": results}


def test_divergence_is_measured_from_the_full_model_which_has_none(whole):
    found = {
        name: figures["perplexity_details"]["tokens"]["divergence"] for name, figures in both_models(whole).items()
    }
    assert found["full"] is None
    assert 0 < found["ours"] < math.inf
    assert "tokens KL" in whole["stdout"]
    assert "nats" in whole["stdout"]


def test_prompts_show_what_both_models_write(whole):
    written = {name: figures["completions"] for name, figures in both_models(whole).items()}
    assert {tuple(texts) for texts in written.values()} == {("w1 w2 w3", "w5")}
    assert all(len(text.split()) == 6 for texts in written.values() for text in texts.values())
    assert "“w1 w2 w3”" in whole["stdout"]
    for title in ("full precision", "DuQuant"):
        assert any(line.startswith(f"    {title}") for line in whole["stdout"].splitlines())


def test_the_summary_shows_every_figure_beside_the_full_models(whole):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in whole["stdout"].splitlines() if "|" in line]
    rows = {first: rest for first, *rest in lines}
    assert rows[""] == ["full precision", "DuQuant without smoothing W4A4"]
    found = both_models(whole).values()
    assert rows["tokens ppl"] == [f"{figures['perplexity']['tokens']:.3f}" for figures in found]
    assert rows["tokens KL"] == ["–", f"{whole['perplexity_details']['tokens']['divergence']:.3f}"]


def test_sixteen_bits_diverge_from_nothing(usual, tmp_path):
    flags = ("--wbits", 16, "--abits", 16, "--eval_ppl", "--eval_kl")
    assert run_script("main.py", *usual, *flags, folder=tmp_path).returncode == 0
    details = results_of(tmp_path)["perplexity_details"]
    assert details["tokens"]["divergence"] == pytest.approx(0, abs=1e-7)


def test_an_evaluation_that_fails_loses_no_other_and_is_all_that_is_tried_again(usual, whole, tmp_path):
    flags = ("--eval_ppl",)
    done = run_script("main.py", *usual, *flags, folder=tmp_path, first=FAIL_ONCE)
    assert done.returncode == 1
    assert "perplexity second; the rest is kept" in done.stderr.splitlines()[-1]
    results = results_of(tmp_path)
    assert results["perplexity"] == {"tokens": whole["perplexity"]["tokens"]}
    assert results["failures"] == {"perplexity second": "RuntimeError: no luck today"}
    assert "no luck today" in (the_run(tmp_path / "output") / "log.txt").read_text()
    done = run_script("main.py", *usual, *flags, folder=tmp_path, first=FAIL_ONCE)
    assert done.returncode == 0, done.stderr
    assert "going on behind 1 parts" in done.stdout
    assert results_of(tmp_path)["perplexity"] == whole["perplexity"]
    assert not (the_run(tmp_path / "output") / "unfinished.jsonl").exists()


def test_other_flags_do_not_go_on_with_an_unfinished_evaluation(usual, tmp_path):
    assert run_script("main.py", *usual, "--eval_ppl", folder=tmp_path, first=FAIL_ONCE).returncode == 1
    unfinished = the_run(tmp_path / "output")
    other = unfinished.with_name(unfinished.name.replace("w4a4", "w4a4_lac0.8"))
    unfinished.rename(other)
    assert (other / "unfinished.jsonl").exists()
    done = run_script("main.py", *usual, "--eval_ppl", "--lac", 0.8, folder=tmp_path, first=FAIL_ONCE)
    assert done.returncode == 0, done.stderr
    assert "going on" not in done.stdout
    assert the_run(tmp_path / "output") == other


def test_figures_of_rewritten_statistics_are_not_revived(usual, tmp_path):
    assert run_script("main.py", *usual, "--smooth", "--output_dir", "first", folder=tmp_path).returncode == 0
    path = tmp_path / "act_scales/tiny.safetensors"
    flags = (*usual, "--eval_ppl", "--smooth", "--act-scales", path)
    assert run_script("main.py", *flags, folder=tmp_path, first=FAIL_ONCE).returncode == 1
    stale = results_of(tmp_path)["perplexity"]["tokens"]
    peaks, metadata = read_tensors(path)
    write_tensors(path, {name: peak**2 for name, peak in peaks.items()}, metadata)
    done = run_script("main.py", *flags, folder=tmp_path, first=FAIL_ONCE)
    assert done.returncode == 0, done.stderr
    assert "going on" not in done.stdout
    assert results_of(tmp_path)["perplexity"]["tokens"] != stale


def test_an_interrupted_evaluation_goes_on_behind_what_was_done(usual, whole, tmp_path):
    flags = [str(flag) for flag in (*usual, "--eval_ppl", "--eval_kl")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *flags],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    journal = "output/*/unfinished.jsonl"
    until = time.monotonic() + 120
    while not list(tmp_path.glob(journal)) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert list(tmp_path.glob(journal))
    done = run_script("main.py", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "an earlier run did not finish" in done.stdout
    results = results_of(tmp_path)
    assert results["perplexity"] == whole["perplexity"]
    assert results["perplexity_details"] == whole["perplexity_details"]


def test_two_processes_find_what_one_finds(usual, whole, tmp_path):
    flags = ("--eval_ppl", "--eval_kl", "--prompt", "w1 w2 w3", "w5", "--max_new_tokens", 6, "--save_dir", "ck")
    done = run_in_two(tmp_path, *usual, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results: ") == 1, "one process speaks"
    results = results_of(tmp_path)
    assert results["processes"] == 2
    for label, figures in results["perplexity_details"].items():
        assert figures == pytest.approx(whole["perplexity_details"][label], rel=1e-6)
    assert results["completions"] == whole["completions"]
    assert len(list((tmp_path / "ck/layers").iterdir())) == 2


def test_a_model_spread_over_host_and_disk_writes_the_same(usual, whole, tmp_path):
    flags = ("--prompt", "w1 w2 w3", "w5", "--max_new_tokens", 6, "--multigpu", "--max_memory", "cpu=150KB")
    done = run_script("main.py", *usual, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path)["completions"] == whole["completions"]


def test_prompts_of_different_lengths_are_completed_in_a_batch_as_one_at_a_time(usual, tmp_path):
    prompts = ("w1 w2 w3 w4 w5 w6 w7", "w5", "w8 w9 w10")
    found = []
    for size in (3, 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        flags = ("--prompt", *prompts, "--max_new_tokens", 6, "--eval_batch_size", size)
        done = run_script("main.py", *usual, *flags, folder=folder)
        assert done.returncode == 0, done.stderr
        found.append({name: each["completions"] for name, each in both_models(results_of(folder)).items()})
    assert found[0] == found[1]
    for texts in found[0].values():
        assert tuple(texts) == prompts
        assert len(set(texts.values())) == 3
        assert all(len(text.split()) == 6 for text in texts.values())


def test_a_batch_size_changes_no_figure(usual, whole, tmp_path):
    done = run_script("main.py", *usual, "--eval_ppl", "--eval_batch_size", 2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path)["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--eval_kl", "--no_eval_ppl"), "--eval_ppl"),
        (("--max_memory", "0=1GB"), "--multigpu"),
        (("--multigpu", "--max_memory", "gpu"), "--max_memory gpu"),
        (("--eval_batch_size", "0"), "neither a number from 1 nor auto"),
        (("--eval_batch_size", "many"), "neither a number from 1 nor auto"),
        (("--max_new_tokens", "0"), "--max_new_tokens 0"),
        (("--eval_ppl", "--limit", "0"), "--limit 0"),
    ],
)
def test_flags_that_cannot_be_are_named_in_one_line(usual, flags, words, tmp_path):
    done = run_script("main.py", *usual, *flags, folder=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
    assert not (tmp_path / "output").exists()
