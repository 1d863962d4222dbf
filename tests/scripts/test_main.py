"""The real scripts as subprocesses, as a user runs them."""

import json
import shutil

import pytest
import torch
from conftest import run_script, tiny_model
from safetensors.torch import load_file, save_file
from script_cases import assert_refused, common, results_of, snapshot, the_run

from quantize.rotation import base_rotation

TINY = ("--block_size", "16", "--max_rotation_step", "20")


@pytest.fixture(scope="module")
def finished(model_folder, token_file, tmp_path_factory):
    """A finished W4A4 run: its folder and process."""
    folder = tmp_path_factory.mktemp("run")
    flags = ("--wbits", 4, "--abits", 4, "--smooth", "--lac", 0.95, "--swc", 0.9, "--eval_ppl", "--net", "tiny")
    done = run_script("main.py", *common(model_folder, token_file), *TINY, *flags, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_results_json_holds_what_a_run_is_and_what_it_found(finished):
    results = results_of(finished[0], "tiny_*")
    assert results["settings"]["wbits"] == 4
    assert results["settings"]["rotation_search"] == "channel"
    assert (results["settings"]["nsamples"], results["settings"]["seqlen"]) == (8, 32)
    assert results["versions"]["torch"] == torch.__version__
    assert results["device"].startswith("cpu")
    assert results["perplexity"]["tokens"] > 1
    assert results["perplexity_details"]["tokens"]["windows"] == 6
    assert results["peak_memory_bytes"] > 1e7
    assert results["seconds"]["total"] > results["seconds"]["quantize"] > 0
    assert "statistics" in results["seconds"]


def test_results_json_holds_figures_of_every_layer_and_group(finished):
    layers = results_of(finished[0], "tiny_*")["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    for layer in layers:
        assert 0 < layer["output_error"] < 1
        assert [group["name"] for group in layer["groups"]] == ["qkv", "o", "gate_up", "down"]
        for group in layer["groups"]:
            names = [stage["name"] for stage in group["stages"]]
            assert names == ["input", "smoothed", "rotation 1", "permutation 1", "rotation 2"]
            assert len(group["steps"]) == 2


def test_console_and_log_file_tell_the_same_and_end_with_the_table(finished):
    folder, done = finished
    log = (the_run(folder / "output", "tiny_*") / "log.txt").read_text()
    for line in done.stdout.splitlines():
        assert line in log
    assert "| DuQuant " in done.stdout
    assert done.stderr.strip() == ""


def test_quiet_prints_the_results_alone_and_logs_everything(finished, model_folder, token_file):
    folder, talking = finished
    flags = (*common(model_folder, token_file), *TINY, "--wbits", 4, "--abits", 4, "--eval_ppl", "--prompt", "w1")
    done = run_script("main.py", *flags, "--net", "quiet", "--quiet", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[0].split() == ["|", "|", "DuQuant", "without", "smoothing", "W4A4", "|"]
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["tokens ppl", "quantize s", "evaluate s"]
    assert lines[5].startswith("“w1”")
    assert len(lines) == 8  # the prompt's two completions are the last
    log = (the_run(folder / "output", "quiet_*") / "log.txt").read_text()
    assert "layer 1: relative output error" in log
    assert all(line in log for line in done.stdout.splitlines())
    assert "layer 1: relative output error" in talking.stdout


def test_quiet_keeps_what_goes_wrong(tmp_path):
    done = run_script("main.py", "--model", "nowhere/at/all", "--quiet", folder=tmp_path)
    assert_refused(done, "nowhere/at/all")


@pytest.mark.parametrize("script", ["main.py", "compare.py", "report.py", "get_rot.py", "generate_act_scale_shift.py"])
def test_every_script_can_be_quiet(script, tmp_path):
    assert "--quiet" in run_script(script, "--help", folder=tmp_path).stdout


def test_a_second_run_gives_the_same_figures_from_the_kept_statistics(finished, model_folder, token_file):
    folder, _ = finished
    flags = ("--wbits", 4, "--abits", 4, "--smooth", "--lac", 0.95, "--swc", 0.9, "--eval_ppl", "--net", "tiny")
    done = run_script(
        "main.py", *common(model_folder, token_file), *TINY, *flags, "--output_dir", "again", folder=folder
    )
    assert done.returncode == 0, done.stderr
    again = results_of(folder, output="again")
    assert "statistics" not in again["seconds"]
    assert again["perplexity"] == results_of(folder, "tiny_*")["perplexity"]
    assert [layer["output_error"] for layer in again["layers"]] == [
        layer["output_error"] for layer in results_of(folder, "tiny_*")["layers"]
    ]


def test_statistics_script_writes_what_main_computes(finished, model_folder, token_file, tmp_path):
    flags = ("--model", model_folder, "--calib_dataset", token_file, "--net", "tiny")
    done = run_script("generate_act_scale_shift.py", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    scales = load_file(tmp_path / "act_scales/tiny.safetensors")
    expected = load_file(finished[0] / "act_scales/tiny.safetensors")
    assert scales.keys() == expected.keys()
    assert all(torch.equal(scales[name], expected[name]) for name in scales)
    assert load_file(tmp_path / "act_shifts/tiny.safetensors").keys() == scales.keys()


def test_full_precision_evaluation_quantizes_nothing(model_folder, token_file, tmp_path):
    flags = ("--wbits", 16, "--abits", 16, "--eval_ppl", "--net", "tiny")
    done = run_script("main.py", *common(model_folder, token_file), *TINY, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "quantize" not in results_of(tmp_path)["seconds"]
    assert "| full precision |" in done.stdout


def test_full_precision_evaluation_needs_no_calibration_data(model_folder, token_file, tmp_path):
    usual = ("--model", model_folder, "--test_dataset", token_file, *TINY, "--eval_ppl", "--net", "tiny")
    assert_refused(run_script("main.py", *usual, "--abits", 4, folder=tmp_path), "--calib_dataset wikitext2=PATH")
    for more in ((), ("--stream",), ("--eval_kl",), ("--save_dir", "ck")):
        done = run_script("main.py", *usual, "--wbits", 16, "--abits", 16, *more, folder=tmp_path)
        if "--save_dir" in more:
            assert_refused(done, "16-bit weights and activations leave nothing to keep")
            continue
        assert done.returncode == 0, done.stderr
        [results] = tmp_path.glob("output/*/results.json")
        assert json.loads(results.read_text())["data"] == {}
        assert json.loads(results.read_text())["perplexity"]["tokens"] > 1
        shutil.rmtree(tmp_path / "output")


def test_limit_evaluates_exactly_that_many_windows(model_folder, token_file, tmp_path):
    flags = ("--wbits", 16, "--abits", 16, "--eval_ppl", "--net", "tiny", "--limit", 2)
    assert run_script("main.py", *common(model_folder, token_file), *TINY, *flags, folder=tmp_path).returncode == 0
    limited = results_of(tmp_path)
    assert limited["perplexity_details"]["tokens"]["windows"] == 2
    two = tmp_path / "tokens.safetensors"
    save_file({"test": load_file(token_file)["test"][:2].clone()}, two)
    flags = ("--wbits", 16, "--abits", 16, "--eval_ppl", "--net", "two", "--test_dataset", two)
    assert run_script("main.py", *common(model_folder, token_file), *TINY, *flags, folder=tmp_path).returncode == 0
    assert results_of(tmp_path, "two_*")["perplexity"] == limited["perplexity"]


def test_several_test_sets_by_comma_and_by_space_in_text_files(model_folder, token_file, tmp_path):
    for name in ("first", "second", "third"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{(7 * index) % 96}" for index in range(200)))
    flags = ("--wbits", 16, "--abits", 16, "--eval_ppl", "--net", "tiny", "--seqlen", 16)
    tests = ("--test_dataset", "first.txt,second.txt", "wikitext2=third.txt")
    done = run_script(
        "main.py", "--model", model_folder, "--calib_dataset", token_file, *TINY, *flags, *tests, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert list(results_of(tmp_path)["perplexity"]) == ["first", "second", "wikitext2"]


def test_half_precision_names_work_on_a_cpu(model_folder, token_file, tmp_path):
    flags = ("--wbits", 8, "--abits", 8, "--smooth", "--eval_ppl", "--net", "tiny")
    found = {}
    for dtype in ("float32", "float16", "bfloat16"):
        where = ("--output_dir", dtype, "--dtype", dtype)
        done = run_script("main.py", *common(model_folder, token_file), *TINY, *flags, *where, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        found[dtype] = results_of(tmp_path, output=dtype)["perplexity"]["tokens"]
    assert found["float16"] == pytest.approx(found["float32"], rel=0.01)
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.05)


def test_get_rot_writes_the_sizes_asked_for(tmp_path):
    done = run_script("get_rot.py", "--sizes", 8, 12, "--output", "rot.safetensors", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rotations = load_file(tmp_path / "rot.safetensors")
    assert set(rotations) == {"base_8", "base_12"}
    assert torch.equal(rotations["base_12"], base_rotation(12))


@pytest.mark.parametrize(
    ("script", "flag"),
    [("main.py", "--help-all"), ("compare.py", "--help-all"), ("get_rot.py", "-h"), ("report.py", "--help")],
)
def test_the_whole_help_explains_every_flag(script, flag, tmp_path):
    done = run_script(script, flag, folder=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {script} ")
    assert done.stdout.splitlines()[1] == ""
    assert "default:" in done.stdout


@pytest.mark.parametrize("script", ["main.py", "compare.py"])
@pytest.mark.parametrize("columns", [100, 120])
def test_the_help_fits_two_screens(script, columns, tmp_path):
    done = run_script(script, "--help", folder=tmp_path, COLUMNS=str(columns))
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) <= 56
    assert max(map(len, lines)) <= 120
    assert done.stdout.startswith(f"usage: {script} ")
    assert sum(line.startswith(f"  python {script} ") for line in lines) == 3
    assert all(f"  {flag} " in done.stdout for flag in ("--model", "--preset", "--eval_ppl", "--output_dir"))
    assert "--gptq_damping" not in done.stdout


def test_a_mistyped_flag_ends_in_one_line_that_names_the_right_one(tmp_path):
    done = run_script("main.py", "--model", "m", "--evl_ppl", folder=tmp_path)
    assert_refused(done, "error: unrecognized --evl_ppl; did you mean --eval_ppl?\n")


def alone(model: object, tokens: object) -> tuple:
    """Flags that say nothing of the method, nor of an evaluation."""
    return (*common(model, tokens), "--net", "alone")


def test_a_model_alone_is_measured_with_the_papers_settings_and_both_are_said(model_folder, token_file, tmp_path):
    done = run_script("main.py", *alone(model_folder, token_file), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    results, log = results_of(tmp_path), (the_run(tmp_path / "output") / "log.txt").read_text()
    assert results["perplexity"]["tokens"] > 1
    assert (results["settings"]["preset"], results["settings"]["lac"], results["settings"]["abits"]) == (
        "paper",
        0.9,
        4,
    )
    said = ["no flag decides the method: --preset paper is taken", "no evaluation is asked for"]
    assert all(each in text for each in said for text in (done.stdout, log))
    flags = ("--preset", "paper", "--eval_ppl")
    again = run_script("main.py", *alone(model_folder, token_file), *flags, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert results_of(tmp_path)["perplexity"] == results["perplexity"], "it is the same run, in the same folder"
    assert not any(each in again.stdout for each in said)


def test_its_checkpoint_goes_on_with_the_command_that_is_told(model_folder, token_file, tmp_path):
    flags = ("--no-eval-ppl",)
    done = run_script("main.py", *alone(model_folder, token_file), *flags, "--save-dir", "ck", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path)["perplexity"] == {}
    (tmp_path / "ck/layers/layer_001.safetensors").unlink()
    done = run_script("main.py", *alone(model_folder, token_file), "--resume", "ck", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    other = run_script("main.py", *alone(model_folder, token_file), "--wbits", 4, "--resume", "ck", folder=tmp_path)
    assert_refused(other, "--abits was 4, is 16")


def test_a_plan_of_a_model_alone_says_what_is_taken(model_folder, token_file, tmp_path):
    done = run_script("main.py", *alone(model_folder, token_file), "--dry_run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--preset paper is taken" in done.stdout
    assert "weights 4 bits per output channel, asymmetric, clipping 0.8" in done.stdout


def test_data_that_are_missing_for_what_nobody_asked_for_say_how_to_do_without(model_folder, token_file, tmp_path):
    usual = ("--model", model_folder, "--calib_dataset", token_file)
    done = run_script("main.py", *usual, folder=tmp_path)
    assert_refused(done, "perplexity is measured by itself, --no_eval_ppl leaves it out")
    asked = run_script("main.py", *usual, "--eval_ppl", folder=tmp_path)
    assert asked.returncode == 2
    assert "--no_eval_ppl" not in asked.stderr


def test_a_run_ends_with_its_cost_its_place_and_what_comes_next(finished):
    folder, done = finished
    took, place, then = done.stdout.splitlines()[-3:]
    assert took.startswith("took ")
    assert "quantize" in took
    assert place == f"results: {the_run(folder / 'output', 'tiny_*').relative_to(folder)} (results.json, log.txt)"
    assert "--save_model DIR" in then


@pytest.fixture(scope="module")
def broken(model_folder, tmp_path_factory):
    """Model folders that cannot be used, by what is wrong with them."""
    root = tmp_path_factory.mktemp("broken")
    for name in ("nan", "pickled", "foreign"):
        (root / name).mkdir()
        for path in model_folder.glob("*.json"):
            (root / name / path.name).write_bytes(path.read_bytes())
    weights = load_file(model_folder / "model.safetensors")
    torch.save(weights, root / "pickled/pytorch_model.bin")
    weights["model.layers.1.mlp.down_proj.weight"][2, 3] = torch.nan
    save_file(weights, root / "nan/model.safetensors", metadata={"format": "pt"})
    (root / "foreign/config.json").write_text('{"model_type": "gpt2"}')
    other = tiny_model(seed=5)
    other.save_pretrained(root / "other")
    for path in model_folder.glob("tokenizer*"):
        (root / "other" / path.name).write_bytes(path.read_bytes())
    return root


BAD_FLAGS = [
    (("--model", "nowhere/at/all"), "no such folder"),
    (("--wbits", 1), "--wbits 1"),
    (("--abits", 17), "--abits 17"),
    (("--wbits", "four"), "--wbits"),
    (("--lac", 0), "--lac 0"),
    (("--swc", 1.2), "--swc 1.2"),
    (("--alpha", 1.5), "--alpha 1.5"),
    (
        ("--block_size", 32),
        "self_attn.q_proj: 48 input channels do not divide by --block_size 32; try 4 or 8 or 16 or auto",
    ),
    (("--block_size", "x"), "--block_size"),
    (("--group_size", 32), "--group_size 32"),
    (("--max_rotation_step", -1), "--max_rotation_step -1"),
    (("--permutation_times", -1), "--permutation_times -1"),
    (("--nsamples", 9), "--nsamples 9, but tensor 'calibration' has only 8 rows"),
    (("--seqlen", 33), "--seqlen 33, but tensor 'calibration' has only 32 columns"),
    (("--seqlen", 65), "--seqlen 65: the model's maximum is 64"),
    (("--limit", 0), "--limit 0"),
    (("--seed", -1), "--seed -1"),
    (("--epochs", -1), "--epochs -1"),
    (("--lwc", "--swc", 0.8), "--lwc learns the clipping that --swc fixes"),
    (("--resume", "nowhere"), "no checkpoint there"),
    (("--save_dir", "a", "--resume", "b"), "give one of them"),
    (("--calib_dataset", "nowhere.txt"), "nowhere.txt: no such file"),
    (("--calib_dataset", "wikitext2"), "--calib_dataset wikitext2=PATH"),
    (("--test_dataset", "c4"), "--test_dataset c4=PATH"),
    (("--device", "cuda:99"), "--device cuda:99"),
    (("--act-scales", "nowhere.safetensors", "--smooth"), "nowhere.safetensors: no such file"),
    (("--act-scales", "nowhere.safetensors"), "--smooth"),
    (("--no_such_flag",), "--no_such_flag"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=lambda value: " ".join(map(str, value))[:40])
def test_bad_flags_get_one_line_and_leave_everything_as_it_was(flags, message, finished, model_folder, token_file):
    folder, _ = finished
    before = snapshot(folder)
    usual = (*common(model_folder, token_file), *TINY, "--eval_ppl", "--net", "tiny", "--abits", 4)
    assert_refused(run_script("main.py", *usual, *flags, folder=folder), message)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "model.layers.1.mlp.down_proj.weight contains NaN or inf"),
        ("pickled", "no safetensors weights"),
        ("foreign", "model type 'gpt2' is not supported; supported are gemma2, "),
    ],
)
def test_unusable_models_are_refused(name, message, broken, token_file, tmp_path):
    usual = ("--model", broken / name, "--calib_dataset", token_file, *TINY, "--no_eval_ppl")
    done = run_script("main.py", *usual, folder=tmp_path)
    assert_refused(done, message)


def test_statistics_of_another_model_are_refused(finished, broken, token_file, tmp_path):
    statistics = finished[0] / "act_scales/tiny.safetensors"
    flags = ("--smooth", "--act-scales", statistics)
    usual = ("--model", broken / "other", "--calib_dataset", token_file, *TINY, "--no_eval_ppl")
    assert_refused(run_script("main.py", *usual, *flags, folder=tmp_path), "not of the weights of")


def test_an_unwritable_output_folder_is_refused(model_folder, token_file, tmp_path):
    (tmp_path / "taken").write_text("a file")
    done = run_script("main.py", *common(model_folder, token_file), *TINY, "--output_dir", "taken", folder=tmp_path)
    assert_refused(done, "--output_dir")
    assert (tmp_path / "taken").read_text() == "a file"


def test_overflowing_activations_are_named_by_layer_and_linear(model_folder, token_file, tmp_path):
    weights = load_file(model_folder / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"] *= 1e37
    folder = tmp_path / "overflowing"
    folder.mkdir()
    for path in model_folder.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = run_script("main.py", *common(folder, token_file), *TINY, "--smooth", "--abits", 4, folder=tmp_path)
    assert_refused(done, "model.layers.1.mlp.")
