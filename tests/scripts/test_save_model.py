"""--save_model through the scripts: what is evaluated again, and what is refused."""

import json
import shutil

import pytest
from conftest import run_script
from script_cases import assert_refused, results_of, settings_of, snapshot

from experiment.prepare import refuse_for_saved
from models.saved import INDEX
from utils.errors import InputError

FLAGS = ("--wbits", 4, "--abits", 4, "--smooth", "--lac", 0.95, "--swc", 0.9, "--block_size", 16)
STEPS = ("--max_rotation_step", 20)


@pytest.fixture(scope="module")
def exported(model_folder, token_file, tmp_path_factory):
    """A run of main.py --save_model: its folder and results."""
    folder = tmp_path_factory.mktemp("exported")
    data = ("--model", model_folder, "--calib_dataset", token_file, "--test_dataset", token_file, "--net", "tiny")
    done = run_script("main.py", *data, *FLAGS, *STEPS, "--eval_ppl", "--save_model", "saved", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, results_of(folder)


def test_the_command_line_evaluates_a_saved_model_to_exactly_the_same_perplexity(exported, token_file, tmp_path):
    folder, results = exported
    flags = ("--model", folder / "saved", "--calib_dataset", "nowhere.txt", "--test_dataset", token_file, "--eval_ppl")
    done = run_script("main.py", *flags, "--net", "again", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    again = results_of(tmp_path)
    assert again["perplexity"] == results["perplexity"]
    assert again["perplexity_details"] == results["perplexity_details"]
    assert not {"quantize", "statistics"} & set(again["seconds"])


def test_a_target_that_is_not_empty_is_refused_before_any_work(exported, model_folder, token_file):
    folder, _ = exported
    before = snapshot(folder)
    data = ("--model", model_folder, "--calib_dataset", token_file, "--net", "tiny")
    done = run_script("main.py", *data, *FLAGS, "--save_model", "saved", folder=folder)
    assert_refused(done, "--save_model saved: is there already and not empty")
    assert snapshot(folder) == before


def test_flags_that_quantize_again_are_refused_for_a_saved_model(exported, token_file, tmp_path):
    usual = ("--model", exported[0] / "saved", "--test_dataset", token_file, "--eval_ppl")
    done = run_script("main.py", *usual, "--save_dir", "d", folder=tmp_path)
    assert_refused(done, f"--save_dir: {exported[0] / 'saved'} is quantized already")
    assert list(tmp_path.iterdir()) == []
    file = (tmp_path / "file",)
    for flag, *more in (
        ("--save_dir", *file),
        ("--resume", *file),
        ("--save_model", *file),
        ("--act-scales", *file, "--smooth"),
        ("--eval_kl", "--eval_ppl"),
        ("--report",),
    ):
        settings = settings_of("--model", "saved", flag, *more)
        with pytest.raises(InputError, match=f"{flag}: saved is quantized already"):
            refuse_for_saved(settings)


def test_a_saved_model_without_its_index_is_refused(exported, token_file, tmp_path):
    shutil.copytree(exported[0] / "saved", tmp_path / "broken")
    (tmp_path / "broken" / INDEX).unlink()
    done = run_script("main.py", "--model", "./broken", "--test_dataset", token_file, "--eval_ppl", folder=tmp_path)
    assert_refused(done, f"{INDEX}: cannot be read")


def test_a_model_quantized_by_another_method_is_refused(model_folder, token_file, tmp_path):
    shutil.copytree(model_folder, tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq/config.json").write_text(json.dumps(config))
    done = run_script("main.py", "--model", "./gptq", "--calib_dataset", token_file, "--abits", 4, folder=tmp_path)
    assert_refused(done, "quantized already, by another method")


def test_saving_what_16_bits_leave_alone_is_refused(model_folder, token_file, tmp_path):
    flags = ("--calib_dataset", token_file, "--wbits", 16, "--abits", 16, "--block_size", 16, "--save_model", "saved")
    assert_refused(run_script("main.py", "--model", model_folder, *flags, folder=tmp_path), "--save_model")
    assert not (tmp_path / "saved").exists()
