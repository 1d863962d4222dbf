"""The real scripts where files may not grow beyond a limit, which the system refuses as it does a full disk."""

import shutil
from pathlib import Path

import pytest
from conftest import run_script, tiny_config
from script_cases import assert_refused, common, the_run
from starter import Ended, shared_starter
from transformers import LlamaForCausalLM

QUICK = ("--wbits", 4, "--abits", 4, "--max_rotation_step", 4, "--net", "tiny")
WIDE_BLOCKS = ("--block_size", -1)  # a layer's file is larger than everything else that a run writes
REASON = "File too large"


def run_limited(largest: int, script: str, *arguments: object, folder: Path) -> Ended:
    """Run a script that cannot make a file larger than `largest` bytes."""
    return shared_starter().run(folder, *arguments, script=script, largest=largest)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too, but the log."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def wide(model_folder, tmp_path_factory) -> Path:
    """A model whose statistics are larger than everything else that a run writes."""
    folder = tmp_path_factory.mktemp("wide-llama")
    LlamaForCausalLM(tiny_config(hidden_size=1536)).save_pretrained(folder)
    for path in model_folder.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def test_a_layer_that_does_not_fit_ends_the_run_and_the_checkpoint_goes_on_later(model_folder, token_file, tmp_path):
    flags = (*common(model_folder, token_file), *QUICK, *WIDE_BLOCKS)
    done = run_script("main.py", *flags, "--save_dir", "ck", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    last = tmp_path / "ck/layers/layer_001.safetensors"
    whole = last.read_bytes()
    last.unlink()
    before = contents(tmp_path)
    done = run_limited(len(whole) // 2, "main.py", *flags, "--resume", "ck", folder=tmp_path)
    assert_refused(done, f"layer_001.safetensors: cannot be written ({REASON}); mend it and --resume")
    assert contents(tmp_path).keys() == before.keys()
    assert all(contents(tmp_path)[name] == before[name] for name in before if ".lock" not in name)
    done = run_script("main.py", *flags, "--resume", "ck", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(last.read_bytes()) == len(whole)


def test_statistics_that_do_not_fit_cost_a_warning_and_not_the_run(wide, token_file, tmp_path):
    flags = (*common(wide, token_file), *QUICK, "--block_size", 16, "--smooth")
    done = run_limited(50_000, "main.py", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"activation statistics: computed, not kept ([Errno 27] {REASON}: 'act_scales/tiny" in done.stderr
    assert "Traceback" not in done.stderr
    assert (the_run(tmp_path / "output") / "results.json").exists()
    assert not list((tmp_path / "act_scales").iterdir())


def test_the_statistics_script_says_that_they_do_not_fit_and_keeps_what_is_there(wide, token_file, tmp_path):
    (tmp_path / "act_scales").mkdir()
    (tmp_path / "act_scales/tiny.safetensors").write_bytes(b"earlier")
    flags = ("--model", wide, "--calib_dataset", token_file, "--net", "tiny")
    done = run_limited(50_000, "generate_act_scale_shift.py", *flags, folder=tmp_path)
    assert_refused(done, f"the statistics cannot be written ([Errno 27] {REASON}")
    assert contents(tmp_path) == {"act_scales/tiny.safetensors": b"earlier"}


def test_rotations_that_do_not_fit_leave_the_earlier_file(tmp_path):
    (tmp_path / "rot.safetensors").write_bytes(b"earlier")
    done = run_limited(1000, "get_rot.py", "--sizes", 64, "--output", "rot.safetensors", folder=tmp_path)
    assert_refused(done, f"--output rot.safetensors: cannot be written ({REASON})")
    assert contents(tmp_path) == {"rot.safetensors": b"earlier"}


def test_a_model_that_does_not_fit_is_refused_in_one_line(model_folder, token_file, tmp_path):
    flags = (*common(model_folder, token_file), *QUICK, "--block_size", 16, "--save_model", "saved")
    done = run_limited(20_000, "main.py", *flags, folder=tmp_path)
    assert_refused(done, "--save_model saved: cannot be written ")
    assert REASON in done.stderr


def test_a_record_that_does_not_fit_costs_the_report_and_not_the_run(wide, token_file, tmp_path):
    flags = (*common(wide, token_file), *QUICK, "--block_size", 16, "--report")
    done = run_limited(50_000, "main.py", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "layer 1: not in the report" in done.stderr
    assert "no report: " in done.stderr
    assert "Traceback" not in done.stderr
    assert (the_run(tmp_path / "output") / "results.json").exists()
