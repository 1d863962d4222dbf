"""--add_bos of the real scripts: which windows a run reads, what it says of them, and who is refused."""

import json

import pytest
from bos_cases import lost_model, save_with_bos, windows_of, words
from conftest import random_tokens, run_script, tiny_model
from families import make_model
from safetensors.torch import save_file
from script_cases import assert_refused, results_of, the_run

WORDS, SEQLEN = 400, 16
TINY = ("--block_size", 16, "--max_rotation_step", 5, "--net", "tiny", "--nsamples", 4, "--seqlen", SEQLEN)
W4A4 = ("--wbits", 4, "--abits", 4)
FULL = ("--wbits", 16, "--abits", 16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models whose tokenizers put BOS before a text."""
    folder = tmp_path_factory.mktemp("models")
    made = {"llama": tiny_model(), "gemma": make_model("gemma3_text"), "lost": lost_model()}
    return {name: save_with_bos(model, folder / name) for name, model in made.items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(WORDS))
    return path


@pytest.fixture
def ran(models, text, tmp_path):
    """Runs main.py on a model, in a folder of its own, and gives its results and stderr."""

    def run(model: str, *flags: object, name: str = "run") -> dict:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        data = ("--calib_dataset", text, "--test_dataset", text, "--cache_dir", tmp_path / "cache")
        done = run_script("main.py", "--model", models[model], *data, *TINY, "--eval_ppl", *flags, folder=folder)
        assert done.returncode == 0, done.stderr
        return {**results_of(folder), "stderr": done.stderr}

    return run


@pytest.mark.parametrize(("model", "same"), [("gemma", "always"), ("llama", "never")])
def test_auto_is_what_the_family_needs_to_the_bit(model, same, ran):
    found = {
        "auto": ran(model, *W4A4, name="auto"),
        **{way: ran(model, *W4A4, "--add_bos", way, name=way) for way in ("always", "never")},
    }
    for way, results in found.items():
        begins = way == "always" or (way, same) == ("auto", "always")
        windows = windows_of(WORDS, SEQLEN, begins)
        assert results["settings"]["add_bos"] is begins
        assert results["perplexity_details"]["text"]["windows"] == len(windows)
    other = {"always": "never", "never": "always"}[same]
    for key in ("data", "perplexity_details", "layers"):
        assert found["auto"][key] == found[same][key]
        assert found["auto"][key] != found[other][key]


def test_the_windows_that_are_measured_are_those_of_the_flag(ran, tmp_path):
    for begins, way in ((True, "always"), (False, "never")):
        path = tmp_path / "text.safetensors"
        save_file({"test": windows_of(WORDS, SEQLEN, begins)}, path)
        of_text = ran("llama", *FULL, "--add_bos", way, name=way)
        of_tokens = ran("llama", *FULL, "--test_dataset", path, name=f"{way} tokens")
        assert of_text["perplexity_details"] == of_tokens["perplexity_details"]


def test_a_lost_model_is_told_of_and_with_the_flag_it_is_not_lost(ran, tmp_path):
    results = ran("lost", *FULL, name="lost")
    check = results["bos_check"]["text"]
    assert check["perplexity_with_bos"] < 0.8 * check["perplexity"]
    assert "give --add_bos always" in check["warning"]
    assert results["stderr"].splitlines() == [check["warning"]]
    assert check["warning"] in (the_run(tmp_path / "lost/output") / "log.txt").read_text()
    found = ran("lost", *FULL, "--add_bos", "always", name="found")
    assert found["bos_check"] == {}
    assert found["stderr"] == ""
    assert found["perplexity"]["text"] < results["perplexity"]["text"] / 10


@pytest.mark.parametrize("memory", ["--stream", "--no-stream"])
def test_the_divergence_looks_at_the_full_model_and_not_at_the_quantized_one(memory, ran):
    results = ran("llama", *W4A4, "--eval_kl", memory)
    assert results["bos_check"] == {}
    check = results["full_precision"]["bos_check"]["text"]
    assert (check["windows"], check["warning"]) == (4, None)
    assert ran("llama", *W4A4, "--stream", name="alone")["perplexity"] == results["perplexity"]


def test_a_comparison_warns_below_its_table(models, text, tmp_path):
    flags = ("--model", models["lost"], "--calib_dataset", text, "--test_dataset", text, *TINY, "--eval_ppl")
    done = run_script("compare.py", *flags, "--wbits", 8, "--rows", "full", "rtn", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run = the_run(tmp_path / "output")
    results = json.loads((run / "results.json").read_text())
    full, rounded = results["rows"]
    warning = full["bos_check"]["text"]["warning"]
    assert f"Warning: {warning}." in (run / "table.md").read_text()
    assert rounded["bos_check"] == {}
    assert results["settings"]["add_bos"] is False


def test_statistics_are_of_the_windows_that_the_flag_says(models, text, tmp_path):
    common = ("--model", models["llama"], "--calib_dataset", text)
    way = ("--nsamples", 4, "--seqlen", SEQLEN, "--net", "tiny", "--add_bos", "always")
    done = run_script("generate_act_scale_shift.py", *common, *way, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    flags = (*common, *TINY, *W4A4, "--smooth", "--no_eval_ppl")
    for begins, said in (("always", "act_scales/tiny.safetensors\n"), ("never", "was left alone\n")):
        done = run_script("main.py", *flags, "--add_bos", begins, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_a_checkpoint_of_other_windows_is_refused(models, text, tmp_path):
    flags = ("--model", models["gemma"], "--calib_dataset", text, *TINY, *W4A4, "--no_eval_ppl")
    assert run_script("main.py", *flags, "--save_dir", "kept", folder=tmp_path).returncode == 0
    assert run_script("main.py", *flags, "--resume", "kept", "--add_bos", "always", folder=tmp_path).returncode == 0
    done = run_script("main.py", *flags, "--resume", "kept", "--add_bos", "never", folder=tmp_path)
    assert_refused(done, "calibration data was")


@pytest.mark.parametrize("script", ["main.py", "compare.py", "generate_act_scale_shift.py"])
def test_a_tokenizer_without_bos_is_refused(script, model_folder, text, tmp_path):
    measured = () if script.startswith("generate") else ("--eval_ppl",)
    flags = ("--model", model_folder, "--calib_dataset", text, "--add_bos", "always", *measured)
    assert_refused(run_script(script, *flags, folder=tmp_path), "--add_bos always: the model's tokenizer has no BOS")


def test_a_token_file_without_bos_is_refused_where_it_is_asked_for(models, tmp_path):
    path = tmp_path / "tokens.safetensors"
    save_file({"test": random_tokens(3, SEQLEN) % 90 + 3}, path)
    flags = ("--model", models["gemma"], "--test_dataset", path, *FULL, "--eval_ppl")
    assert_refused(run_script("main.py", *flags, "--add_bos", "always", folder=tmp_path), "3 rows of tensor 'test'")
    done = run_script("main.py", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_plan_needs_no_tokenizer_for_it(models, text, tmp_path):
    (tmp_path / "config.json").write_bytes((models["llama"] / "config.json").read_bytes())
    flags = ("--model", tmp_path, "--calib_dataset", text, "--test_dataset", text, *TINY, *W4A4, "--eval_ppl")
    done = run_script("main.py", *flags, "--dry_run", "--add_bos", "always", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "its tokenizer cannot be loaded" in done.stdout
    assert "--calib_dataset: needs the tokenizer" in done.stdout
