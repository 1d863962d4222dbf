"""Formats of blocks through the scripts: quantized, trained, saved, loaded again, resumed, and refused."""

import json

import pytest
from best_settings import FLAGS
from conftest import run_script
from script_cases import assert_refused, common, results_of
from transformers import AutoModelForCausalLM

from duquant.formats import FORMATS
from duquant.linear import linears_of
from quantize.bits import Format

NVFP4 = ("--wformat", "nvfp4", "--aformat", "nvfp4")  # the one whose blocks divide the tiny model's widths
PLAIN = ("--wbits", 4, "--abits", 4, "--block_size", 16, "--max_rotation_step", 20)


@pytest.fixture(scope="module")
def usual(model_folder, token_file) -> tuple:
    return (*common(model_folder, token_file), "--net", "tiny", "--eval_ppl")


def test_the_names_of_formats_are_those_of_the_runtime():
    assert tuple(Format) == FORMATS


@pytest.mark.parametrize(
    "flags",
    [
        PLAIN,
        FLAGS,
        (*FLAGS, "--train", "transform", "--epochs", 1),
        (*FLAGS, "--train", "transform", "--epochs", 1, "--lac", "block"),
    ],
    ids=["nearest", "searched", "trained", "fitted"],
)
def test_a_saved_model_has_bytes_for_scales_and_the_perplexity_of_its_run(flags, usual, token_file, tmp_path):
    done = run_script("main.py", *usual, *flags, *NVFP4, "--save_model", "saved", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path)
    assert results["settings"]["wformat"] == results["settings"]["aformat"] == "nvfp4"
    again = ("--model", "saved", "--test_dataset", token_file, "--eval_ppl", "--output_dir", "again")
    done = run_script("main.py", *again, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path, output="again")["perplexity_details"] == results["perplexity_details"]
    for linear in linears_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert linear.scale.numel() * 16 == linear.in_features * linear.out_features
        assert (linear.scale.element_size(), linear.codes.numel() * 2) == (1, linear.in_features * linear.out_features)
    assert "4 (nvfp4) | symmetric | 16 channels" in (tmp_path / "saved/README.md").read_text(encoding="utf-8")


def test_a_resumed_run_has_the_same_figures(usual, tmp_path):
    whole = run_script("main.py", *usual, *FLAGS, *NVFP4, "--save_dir", "layers", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    first = results_of(tmp_path)
    (tmp_path / "layers/layers/layer_001.safetensors").unlink()
    again = run_script(
        "main.py", *usual, *FLAGS, *NVFP4, "--resume", "layers", "--output_dir", "again", folder=tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert results_of(tmp_path, output="again")["perplexity_details"] == first["perplexity_details"]
    other = run_script("main.py", *usual, *FLAGS, "--resume", "layers", folder=tmp_path)
    assert_refused(other, "--wformat was nvfp4, is int")


def test_weights_and_activations_have_formats_of_their_own(usual, tmp_path):
    done = run_script("main.py", *usual, *PLAIN, "--aformat", "nvfp4", "--kbits", 8, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = run_script("main.py", *usual, *PLAIN, "--aformat", "nvfp4", "--kbits", 8, "--dry_run", folder=tmp_path)
    assert "weights 4 bits per output channel, asymmetric; linear inputs nvfp4 in blocks of 16" in plan.stdout
    assert "k 8 bits per head" in plan.stdout


def test_tables_name_the_format(usual, tmp_path):
    done = run_script("compare.py", *usual, *PLAIN, *NVFP4, "--rows", "full", "rtn", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "NVFP4" in done.stdout
    [results] = (tmp_path / "output").glob("*/results.json")
    assert "NVFP4" in json.dumps(json.loads(results.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--wformat", "mxfp5"), "mxfp5"),
        (("--wformat", "nvfp4", "--wbits", 8), "--wformat nvfp4: has 4 bits; give --wbits 4"),
        (("--wformat", "nvfp4", "--group_size", 16), "--wformat nvfp4: has blocks and symmetric numbers of its own"),
        (("--aformat", "nvfp4", "--abits", 16), "--aformat nvfp4: has 4 bits; give --abits 4"),
        (("--aformat", "nvfp4", "--act_symmetric"), "drop --act_symmetric"),
        (("--qformat", "nvfp4", "--qbits", 8), "--qformat nvfp4: has 4 bits; give --qbits 4"),
        (("--wformat", "mxfp4"), "blocks of 32, which do not divide its 48 input channels; try nvfp4"),
        (("--vformat", "mxfp4"), "--vformat mxfp4 has blocks of 32, which do not divide heads of 16"),
        (("--lac", "block"), "--lac block: integers have no blocks; give --lac search, or --aformat nvfp4"),
        (("--aformat", "nvfp4", "--vbits", 8, "--lac", "block"), "--lac block: integers have no blocks"),
        (("--aformat", "nvfp4", "--vbits", 8, "--value_rotation", "--lac", 1.3), "--lac 1.3: the clip ratio must be"),
        (("--swc", "block"), "'block' is neither a number nor search"),
        (("--lac", 1.3), "--lac 1.3: the clip ratio must be in (0, 1]"),
        (("--wformat", "nvfp4", "--swc", 2.5), "--swc 2.5"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(flags, words, usual, tmp_path):
    assert_refused(run_script("main.py", *usual, *PLAIN, *flags, "--quiet", folder=tmp_path), words)
