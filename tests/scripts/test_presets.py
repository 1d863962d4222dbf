"""`--preset` and block sizes that make way, in the real scripts."""

import json

import pytest
from conftest import run_script
from script_cases import assert_refused, common, results_of, the_run

QUICK = ("--max_rotation_step", 3, "--net", "tiny", "--eval_ppl")
SPELLED_OUT = ("--epochs", 1, "--lwc", "--lac", 0.9, "--alpha", 0.5, "--smooth", "--abits", 4, "--wbits", 4)
SAID = "block size 128 does not divide every width: it is 48 for 48 channels (model.layers.0.self_attn.q_proj, …), "
SAID += "80 for 80 channels (model.layers.0.mlp.down_proj, …), 96 for 96 channels (model.layers.0.self_attn.o_proj, …)"


@pytest.fixture(scope="module")
def usual(model_folder, token_file) -> tuple:
    return (*common(model_folder, token_file), *QUICK)


@pytest.fixture(scope="module")
def trained(usual, tmp_path_factory):
    """A run with a preset, one flag of which was given otherwise, and its checkpoint: the folder it was started in."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_script("main.py", "--epochs", 1, *usual, "--preset", "paper_lwc", "--save_dir", "ck", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_results_have_what_the_preset_says_what_was_given_and_its_name(trained):
    settings = results_of(trained)["settings"]
    assert settings["preset"] == "paper_lwc"
    expected = {"wbits": 4, "abits": 4, "smooth": True, "alpha": 0.5, "lac": 0.9, "swc": None, "lwc": True, "epochs": 1}
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize("flags", [SPELLED_OUT, ("--preset", "paper_lwc", "--epochs", 1)], ids=["by hand", "preset"])
def test_its_checkpoint_goes_on_however_the_settings_are_said(flags, trained, usual):
    before = results_of(trained)
    (trained / "ck/layers/layer_001.safetensors").unlink()
    done = run_script("main.py", *usual, *flags, "--resume", "ck", folder=trained)
    assert done.returncode == 0, done.stderr
    assert results_of(trained)["perplexity"] == before["perplexity"], "and it is the one run in its folder"
    assert (trained / "ck/layers/layer_001.safetensors").exists()


def test_its_checkpoint_is_not_of_the_preset_alone(trained, usual):
    done = run_script("main.py", *usual, "--preset", "paper_lwc", "--resume", "ck", folder=trained)
    assert_refused(done, "--epochs was 1, is 20")


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("main.py", ("--preset", "best", "--swc", 1.2), "--swc 1.2: the clip ratio"),
        ("main.py", ("--preset", "paper", "--lwc"), "--preset paper has --swc 0.8, which --swc none takes out"),
        ("main.py", ("--preset", "finest"), "(choose from paper, paper_lwc, best, best_trained, none)"),
        ("main.py", ("--preset", "paper", "--block_size", 128), "48 input channels do not divide by --block_size 128"),
        ("compare.py", ("--preset", "paper", "--block_size", 32), "try 4 or 8 or 16 or auto"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(script, flags, words, usual, tmp_path):
    assert_refused(run_script(script, *usual, *flags, folder=tmp_path), words)


def test_a_comparison_takes_presets_and_finished_runs_do_not(usual, tmp_path):
    done = run_script("compare.py", *usual, "--preset", "paper", "--rows", "rtn", "hadamard", "dual", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path)
    assert (results["settings"]["preset"], results["settings"]["swc"]) == ("paper", 0.8)
    assert done.stdout.count(SAID) == (the_run(tmp_path / "output") / "log.txt").read_text().count(SAID) == 1
    assert_refused(run_script("compare.py", "a", "b", "--preset", "paper", folder=tmp_path), "--preset is for --model")


def test_other_block_sizes_than_usual_are_said_once_and_are_autos(usual, tmp_path):
    for flags in ((), ("--block_size", "auto")):
        done = run_script("main.py", *usual, "--abits", 4, *flags, "--output_dir", f"out{len(flags)}", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("block size") == (not flags)
        assert (SAID in done.stdout) == (not flags)
        assert (the_run(tmp_path / f"out{len(flags)}") / "log.txt").read_text().count("block size") == (not flags)
    usual_blocks, auto = (results_of(tmp_path, output=folder) for folder in ("out0", "out2"))
    assert usual_blocks["layers"] == auto["layers"]
    assert usual_blocks["perplexity"] == auto["perplexity"]
    assert usual_blocks["memory"] == auto["memory"]
    assert usual_blocks["settings"]["block_size"] == 128


@pytest.mark.parametrize("flags", [("--transform", "none", "--abits", 4), ("--wbits", 16)], ids=str)
@pytest.mark.parametrize("size", [(), ("--block_size", 128)], ids=str)
def test_where_nothing_is_transformed_no_block_size_is_talked_of(flags, size, usual, tmp_path):
    done = run_script("main.py", *usual, *flags, *size, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "block" not in done.stdout.replace("--block_size", "")


def test_a_plan_says_it_too_and_counts_with_these_blocks(usual, tmp_path):
    plans = [
        run_script("main.py", *usual, *flags, "--dry_run", folder=tmp_path) for flags in ((), ("--block_size", "auto"))
    ]
    assert all(plan.returncode == 0 for plan in plans), plans
    assert plans[0].stdout.count(SAID) == 1
    assert SAID not in plans[1].stdout
    tables = [
        [line for line in plan.stdout.splitlines() if line.startswith(("| qkv", "| checkpoint"))] for plan in plans
    ]
    assert len(tables[0]) == 2
    assert tables[0] == tables[1]


def test_a_model_saved_with_such_blocks_is_evaluated(usual, token_file, tmp_path):
    done = run_script("main.py", *usual, "--preset", "paper", "--save_model", "saved", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    flags = ("--test_dataset", token_file, "--eval_ppl", "--output_dir", "again")
    again = run_script("main.py", "--model", "saved", *flags, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "block size" not in again.stdout
    before, after = results_of(tmp_path), results_of(tmp_path, output="again")
    assert after["perplexity"]["tokens"] == pytest.approx(before["perplexity"]["tokens"], rel=1e-6)
    assert after["memory"] == before["memory"]
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["quantization_config"]["settings"]["rotation"]["block_size"] == 128
