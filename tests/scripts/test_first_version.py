"""What the first version of the suite left: its checkpoints, saved models and results still serve."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from script_cases import results_of

FIRST_VERSION = ROOT / "tests/fixtures/version_1"
EXPECTED = json.loads((FIRST_VERSION / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of all that the first version left."""
    return shutil.copytree(FIRST_VERSION, tmp_path / "first")


def flags_of(name: str) -> list[str]:
    """The flags that made it, without those that say where to."""
    words, dropped = EXPECTED[name]["flags"].split(), ("--save_dir", "--save_model", "--output_dir")
    pairs = zip(words, ["", *words], strict=False)
    return [word for word, before in pairs if word not in dropped and before not in dropped]


def test_a_checkpoint_resumes_with_the_flags_that_it_was_made_with(folder):
    done = run_script("main.py", *flags_of("checkpoint"), "--resume", "checkpoint", folder=folder)
    assert done.returncode == 0, done.stderr
    assert results_of(folder)["perplexity"]["tokens"] == pytest.approx(EXPECTED["checkpoint"]["perplexity"], rel=1e-6)
    log = next((folder / "output").glob("*/log.txt")).read_text()
    assert log.count("from the checkpoint") == 2


def test_a_checkpoint_that_is_not_whole_goes_on(folder):
    (folder / "checkpoint/layers/layer_001.safetensors").unlink()
    done = run_script("main.py", *flags_of("checkpoint"), "--resume", "checkpoint", folder=folder)
    assert done.returncode == 0, done.stderr
    assert results_of(folder)["perplexity"]["tokens"] == pytest.approx(EXPECTED["checkpoint"]["perplexity"], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--wbits", 3), "--wbits was 4, is 3"), (("--kbits", 8), "--kbits"), (("--lac_kv", 0.9), "--lac_kv")],
    ids=str,
)
def test_a_checkpoint_is_refused_with_other_flags_than_it_was_made_with(flags, words, folder):
    done = run_script("main.py", *flags_of("checkpoint"), *flags, "--resume", "checkpoint", folder=folder)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_saved_model_is_evaluated_to_the_perplexity_that_it_had(folder):
    flags = ("--model", "saved", "--test_dataset", "tokens.safetensors", "--eval_ppl")
    done = run_script("main.py", *flags, folder=folder)
    assert done.returncode == 0, done.stderr
    assert results_of(folder)["perplexity"]["tokens"] == pytest.approx(EXPECTED["saved"]["perplexity"], rel=1e-6)


def test_the_report_of_a_run_is_drawn_again(folder):
    done = run_script("report.py", "run", folder=folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "run/report/index.html").read_text(encoding="utf-8")
    perplexity = json.loads((folder / "run/results.json").read_text())["perplexity"]["tokens"]
    assert f'<data value="{perplexity!r}">' in page
    assert "figures/layer_0_qkv_landscape.png" in page
    assert "layers 1" in page, "its file is not there"


def test_a_run_stands_beside_one_of_today_that_differs_in_what_was_changed_alone(folder):
    old = json.loads((folder / "run/results.json").read_text())
    flags = old["command"].split()[2:]
    done = run_script("main.py", *flags, "--lac", 0.8, "--report_layers", 1, folder=folder)
    assert done.returncode == 0, done.stderr
    [today] = (folder / "out").iterdir()
    done = run_script("compare.py", "run", today, folder=folder)
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    rows = {first: rest for first, *rest in lines}
    assert rows["tokens ppl"][0] == f"{old['perplexity']['tokens']:.3f}"
    assert rows["--lac"] == ["0.9", "0.8"]
    assert {name for name in rows if name.startswith("--")} == {"--lac"}


def test_results_have_every_key_that_they_had(folder):
    old = json.loads((folder / "run/results.json").read_text())
    assert run_script("main.py", *old["command"].split()[2:], folder=folder).returncode == 0
    results = results_of(folder, output="out")
    assert old["settings"].keys() - {"quiet"} <= results["settings"].keys()
    assert old.keys() <= results.keys()
    assert old["layers"][0].keys() <= results["layers"][0].keys()
    assert old["layers"][0]["recorded"].keys() <= results["layers"][0]["recorded"].keys()
    assert old["layers"][0]["groups"][0].keys() <= results["layers"][0]["groups"][0].keys()
    assert old["seconds"].keys() <= results["seconds"].keys()
    assert results["perplexity_details"] == old["perplexity_details"]
    assert results["full_precision"]["perplexity_details"] == old["full_precision"]["perplexity_details"]
    same = {name for name in old["settings"] if name in results["settings"]} - {"net", "output_dir"}
    assert {name: results["settings"][name] for name in same} == {name: old["settings"][name] for name in same}
