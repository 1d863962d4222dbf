"""`main.py --dry_run` as a user runs it."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, run_script

FLAGS = ("--block_size", 16, "--wbits", 4, "--abits", 4, "--smooth", "--eval_ppl", "--dry_run")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "cache" not in path.parts}


@pytest.fixture
def dry(model_folder, token_file, tmp_path):
    """Runs main.py --dry_run in an empty folder."""

    def run(*flags: object, model: Path = model_folder):
        data = ("--calib_dataset", token_file, "--test_dataset", token_file)
        return run_script("main.py", "--model", model, *data, *FLAGS, *flags, folder=tmp_path)

    return run


def test_it_says_what_the_run_would_do_and_writes_nothing(dry, tmp_path):
    done = dry("--save_dir", "new/checkpoint", "--save_model", "model")
    assert done.returncode == 0, done.stderr
    for part in (
        "| qkv ",
        "folded into mlp.up_proj",
        "| host memory ",
        "--save_dir new/checkpoint",
        "| search, at most",
    ):
        assert part in done.stdout
    assert "calibration on 8×32 tokens" in done.stdout
    assert files(tmp_path) == set()


def test_no_weights_are_read(dry, model_folder, tmp_path):
    empty = tmp_path / "no-weights"
    empty.mkdir()
    for path in model_folder.iterdir():
        (empty / path.name).write_bytes(path.read_bytes() if path.suffix == ".json" else b"")
    done = dry(model=empty)
    assert done.returncode == 0, done.stderr


def missing(done) -> list[str]:
    """The lines on what is missing."""
    _, _, listed = done.stdout.partition("missing for a real run")
    return [line.strip() for line in listed.splitlines()[1:]]


@pytest.fixture
def config_alone(model_folder, tmp_path):
    folder = tmp_path / "config-alone"
    folder.mkdir()
    (folder / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("memory", ["--stream", "--no-stream"])
def test_a_config_is_enough_and_what_else_a_run_takes_is_listed(dry, config_alone, tmp_path, memory):
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    texts = ("--calib_dataset", "short.txt", "--test_dataset", "nowhere.txt", "--nsamples", 5, "--seqlen", 16)
    done = dry(*texts, "--save_model", "model", memory, model=config_alone)
    assert done.returncode == 0, done.stderr
    assert "calibration on 5×16 tokens" in done.stdout
    assert "| search, at most" in done.stdout
    weights, tokenizer, calibration, test = missing(done)
    assert "no safetensors weights" in weights
    assert "tokenizer" in tokenizer
    assert calibration == "--calib_dataset: needs the tokenizer"
    assert test == "--eval_ppl: nowhere.txt: no such file or folder (given to --test_dataset)"


def test_a_token_file_counts_where_the_tokenizer_is_missing(dry, config_alone):
    done = dry(model=config_alone)
    assert done.returncode == 0, done.stderr
    assert "calibration on 8×32 tokens" in done.stdout
    assert "| evaluation " in done.stdout
    assert len(missing(done)) == 2


def test_too_little_text_is_listed_and_planned_as_if_it_were_enough(dry, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2 w3 " * 9)
    texts = ("--calib_dataset", "short.txt", "--nsamples", 2, "--seqlen", 24)
    done = dry(*texts)
    assert done.returncode == 0, done.stderr
    assert "calibration on 2×24 tokens" in done.stdout
    [line] = missing(done)
    assert line.startswith("--calib_dataset: short.txt: 27 tokens, but --nsamples 2")
    assert missing(dry()) == []


def test_what_is_missing_ends_a_real_run(config_alone, token_file, tmp_path):
    data = ("--calib_dataset", token_file, "--test_dataset", token_file)
    done = run_script("main.py", "--model", config_alone, *data, "--block_size", 16, folder=tmp_path)
    assert done.returncode == 2
    assert "no safetensors weights" in done.stderr


def test_settings_that_cannot_work_end_it_even_where_things_are_missing(dry, config_alone):
    for flags, reason in (
        (("--block_size", 32), "do not divide by --block_size 32"),
        (("--tasks", "no_such_task"), "no task or group 'no_such_task'"),
        (("--stream", "--prompt", "w1"), "--prompt needs the whole model"),
        (("--calib_dataset", "wikitext=x"), "unknown dataset"),
    ):
        done = dry(*flags, model=config_alone)
        assert done.returncode == 2, flags
        assert reason in done.stderr


def test_a_checkpoint_is_not_compared_with_a_run_that_lacks_its_data(dry, config_alone, tmp_path):
    (tmp_path / "old").mkdir()
    done = dry("--resume", "old", model=config_alone)
    assert done.returncode == 0, done.stderr
    assert missing(done)[-1].startswith("--resume old: whether it is of this run")


def test_full_precision_is_planned_and_measured_without_calibration_data(dry, model_folder, token_file, tmp_path):
    flags = ("--wbits", 16, "--abits", 16, "--calib_dataset", "nowhere.txt", "--seqlen", 32)
    done = dry(*flags)
    assert done.returncode == 0, done.stderr
    assert "nothing is quantized" in done.stdout
    assert "calibration on" not in done.stdout
    assert missing(done) == []
    data = ("--test_dataset", token_file, "--eval_ppl")
    done = run_script("main.py", "--model", model_folder, *flags, *data, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("output/*/results.json")
    results = json.loads(path.read_text())
    assert results["perplexity"]["tokens"] > 1
    assert results["data"] == {}
    assert results["memory"]["ratio"] == 1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(("--block_size", 32), "do not divide by --block_size 32"), (("--group_size", 7), "--group_size 7")],
)
def test_settings_that_cannot_work_end_it_with_the_reason(dry, flags, reason):
    done = dry(*flags)
    assert done.returncode == 2
    assert reason in done.stderr


def test_an_unknown_family_ends_it_before_anything_else(dry, tmp_path):
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    done = dry(model=unknown)
    assert done.returncode == 2
    assert "model type 'mamba' is not supported" in done.stderr


def test_a_checkpoint_is_looked_at_and_left_as_it_is(dry, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/run.json").write_text(json.dumps({"format": 1, "model": "m", "dtype": "other"}))
    before = files(tmp_path)
    begin, go_on = dry("--save_dir", "old"), dry("--resume", "old")
    assert (begin.returncode, go_on.returncode) == (2, 2)
    assert "holds a checkpoint" in begin.stderr
    assert "is of another run" in go_on.stderr
    assert files(tmp_path) == before


def test_a_run_for_which_the_bundled_model_is_planned_has_every_stage(tmp_path):
    stories = ROOT / "assets/stories"
    done = run_script(
        *("main.py", "--model", ROOT / "assets/tiny-llama", "--calib_dataset", stories / "calibration.txt"),
        *("--test_dataset", stories / "test.txt", "--nsamples", 4, "--seqlen", 128, "--eval_ppl", "--dry_run"),
        *("--wbits", 4, "--abits", 4, "--smooth", "--lwc", "--epochs", 1),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for stage in ("activation statistics", "search, at most", "training", "evaluation", "all"):
        assert f"| {stage} " in done.stdout
    assert "clipping trained" in done.stdout


def test_a_model_that_is_quantized_already_is_planned_for_evaluation_alone(model_folder, token_file, tmp_path):
    data = ("--calib_dataset", token_file, "--test_dataset", token_file)
    quantize = ("--block_size", 16, "--max_rotation_step", 2, "--save_model", "saved")
    made = run_script("main.py", "--model", model_folder, *data, *quantize, folder=tmp_path)
    assert made.returncode == 0, made.stderr
    before = files(tmp_path)
    done = run_script("main.py", "--model", "saved", *data, "--eval_ppl", "--dry_run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "it is only evaluated" in done.stdout
    assert "| evaluation " in done.stdout
    assert "| search" not in done.stdout
    assert files(tmp_path) == before
