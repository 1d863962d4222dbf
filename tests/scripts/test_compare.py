"""The real compare.py: rows of one model, and finished runs side by side."""

import csv
import json
import math
import shutil
import signal
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import random_tokens, run_script
from safetensors.torch import save_file
from script_cases import FAIL_ONCE, assert_refused, kill_at, results_of, snapshot, the_run
from starter import shared_starter

from experiment.presets import VARIANTS

TINY = ("--block_size", 16, "--max_rotation_step", 20, "--wbits", 4, "--abits", 4, "--lac", 0.95, "--net", "tiny")
ROWS = {
    "full": "full precision",
    "rtn": "round-to-nearest",
    "smooth": "smoothing only",
    "hadamard": "smoothing + Hadamard rotation",
    "two_hadamard": "smoothing + two Hadamard rotations",
    "rotation": "smoothing + rotation",
    "permutation": "smoothing + permutation",
    "rotation_permutation": "smoothing + rotation + permutation",
    "dual": "DuQuant",
    "best": "preset best",
}


@pytest.fixture(scope="module")
def usual(model_folder, token_file) -> tuple:
    """Flags that compare.py and main.py share."""
    data = ("--calib_dataset", token_file, "--test_dataset", token_file)
    return ("--model", model_folder, *data, *TINY, "--eval_ppl")


@pytest.fixture(scope="module")
def whole(usual, tmp_path_factory):
    """A comparison of all rows: the folder it ran in, and its process."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_script("compare.py", *usual, "--swc", 0.9, "--eval_kl", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def runs(usual, tmp_path_factory):
    """A folder with the folders of finished runs of main.py: `a`, `b` (other settings), `full` (16 bits)."""
    folder = tmp_path_factory.mktemp("runs")
    ours = ("--smooth", "--swc", 0.9)
    for name, flags in {"a": ours, "b": (*ours, "--lac", 0.8, "--seed", 5), "full": (*ours, "--wbits", 16)}.items():
        more = ("--abits", 16) if name == "full" else ()
        done = run_script("main.py", *usual, *flags, *more, "--eval_kl", "--output_dir", name, folder=folder)
        assert done.returncode == 0, done.stderr
        the_run(folder / name).rename(folder / "its")
        (folder / name).rmdir()
        (folder / "its").rename(folder / name)
    return folder


def results_in(folder) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def table_in(folder) -> Path:
    """The folder of the one comparison that was started in `folder`."""
    return the_run(folder / "output", "tiny_w4a4_compare*")


def rows_of(folder) -> dict[str, list[dict]]:
    """Rows of a comparison's results by name, one per seed."""
    found: dict[str, list[dict]] = {}
    for row in results_in(table_in(folder))["rows"]:
        found.setdefault(row["row"], []).append(row)
    return found


def table_of(folder) -> list[dict[str, str]]:
    with open(table_in(folder) / "table.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_is_measured_in_the_order_of_the_table(whole):
    rows = results_in(table_in(whole[0]))["rows"]
    assert {row["row"]: row["title"] for row in rows} == ROWS
    assert [row["row"] for row in rows] == list(ROWS)
    assert [row["bits"] for row in rows] == ["–", *["W4A4"] * (len(ROWS) - 1)]
    assert len({row["perplexity"]["tokens"] for row in rows}) == len(rows), "no two rows do the same"
    table = [line.split("|")[1].strip() for line in whole[1].stdout.splitlines() if line.startswith("| ")]
    assert table == ["", ":" + "-" * (max(map(len, ROWS.values())) - 1), *ROWS.values()]
    assert results_in(table_in(whole[0]))["error"] is None


def test_rows_have_the_transforms_they_are_named_after(whole):
    stages = {
        name: [stage["name"] for stage in row["layers"][0]["groups"][0]["stages"]] if row["layers"] else None
        for name, [row] in rows_of(whole[0]).items()
    }
    smoothed = ["input", "smoothed"]
    two = [*smoothed, "Hadamard 1", "permutation 1", "Hadamard 2"]
    assert stages == {
        "full": None,
        "rtn": ["input"],
        "smooth": smoothed,
        "hadamard": [*smoothed, "Hadamard"],
        "two_hadamard": two,
        "rotation": [*smoothed, "rotation 1"],
        "permutation": [*smoothed, "permutation 1"],
        "rotation_permutation": [*smoothed, "rotation 1", "permutation 1"],
        "dual": [*smoothed, "rotation 1", "permutation 1", "rotation 2"],
        "best": two,
    }


def test_rows_are_bit_for_bit_what_main_finds(whole, runs):
    rows = rows_of(whole[0])
    assert rows["full"][0]["perplexity"] == results_in(runs / "full")["perplexity"]
    ours = results_in(runs / "a")
    assert rows["dual"][0]["perplexity_details"] == ours["perplexity_details"]
    assert rows["dual"][0]["layers"] == ours["layers"]
    assert ours["perplexity_details"]["tokens"]["divergence"] > 0


def test_channels_that_one_row_permutes_upstream_are_in_their_places_for_the_next(usual, runs, tmp_path):
    data = usual[: -len(TINY) - 1]
    ours = (*data, *TINY, "--eval_ppl", "--eval_kl", "--swc", 0.9)
    compared = run_script("compare.py", *ours, "--rows", "permute_rotate", "dual", folder=tmp_path)
    alone = run_script("main.py", *ours, "--smooth", "--transform", "permute_rotate", folder=tmp_path)
    assert compared.returncode == alone.returncode == 0, compared.stderr + alone.stderr
    rows = rows_of(tmp_path)
    mains = results_in(the_run(tmp_path / "output", "tiny_w4a4_lac*"))
    assert rows["permute_rotate"][0]["perplexity_details"] == mains["perplexity_details"]
    assert rows["dual"][0]["perplexity_details"] == results_in(runs / "a")["perplexity_details"]


def test_a_row_that_is_a_preset_is_what_main_finds_with_it_whatever_else_is_given(whole, usual, tmp_path):
    block_size, data = TINY[:2], usual[: -len(TINY) - 1]
    alone = run_script("main.py", *data, "--preset", "best", *block_size, "--eval_ppl", "--eval_kl", folder=tmp_path)
    assert alone.returncode == 0, alone.stderr
    ours, [row] = results_of(tmp_path), rows_of(whole[0])["best"]
    assert row["perplexity_details"] == ours["perplexity_details"]
    assert row["layers"] == ours["layers"]
    assert ours["method"] == row["title"] == "preset best"


def test_the_activation_statistics_are_computed_once(whole):
    assert whole[1].stdout.count("activation statistics: computed") == 1
    assert sum("statistics" in row["seconds"] for row in results_in(table_in(whole[0]))["rows"]) == 1


def test_csv_and_markdown_tell_the_same(whole):
    rows, table = rows_of(whole[0]), table_of(whole[0])
    markdown = (table_in(whole[0]) / "table.md").read_text(encoding="utf-8")
    assert markdown.strip() in whole[1].stdout
    for row in table:
        assert float(row["tokens ppl"]) == rows[row["row"]][0]["perplexity"]["tokens"]
        assert f"{float(row['tokens ppl']):.3f}" in markdown
        assert ROWS[row["row"]] == row["title"]
    assert table[0]["tokens KL"] == ""
    assert all(float(row["tokens KL"]) > 0 for row in table[1:])
    assert "tokens ppl std" not in table[0], "one seed has no spread"


def test_the_picture_names_every_row_and_figure(whole):
    folder = table_in(whole[0])
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n")
    svg = ElementTree.parse(folder / "comparison.svg")
    written = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert set(ROWS.values()) <= set(written)
    assert "tokens ppl (lower is better)" in written
    assert f"{rows_of(whole[0])['dual'][0]['perplexity']['tokens']:.3f}" in written


def test_a_missing_row_is_all_that_the_same_command_computes(whole, usual, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = results_in(table_in(tmp_path))["rows"]
    kept = snapshot(table_in(tmp_path) / "rows")
    (gone,) = (table_in(tmp_path) / "rows").glob("rotation_seed*")
    gone.unlink()
    done = run_script("compare.py", *usual, "--swc", 0.9, "--eval_kl", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from an earlier run") == len(ROWS) - 1
    assert done.stdout.count("layer 1: relative output error") == 1
    after = results_in(table_in(tmp_path))["rows"]
    assert [row["perplexity_details"] for row in after] == [row["perplexity_details"] for row in before]
    assert gone.exists()
    assert {path: facts for path, facts in snapshot(gone.parent).items() if path != gone} == {
        path: facts for path, facts in kept.items() if path != gone
    }


def test_an_interrupted_comparison_goes_on_behind_the_rows_it_has(whole, usual, tmp_path):
    flags = (*usual, "--swc", 0.9, "--eval_kl")
    interrupt = kill_at(tmp_path / "output/*/rows/rtn.json", sent=signal.SIGINT)
    done = shared_starter().run(tmp_path, *flags, script="compare.py", meanwhile=interrupt)
    assert done.returncode == 130, done.stderr
    assert "the same command goes on" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    kept = sorted(path.stem for path in (table_in(tmp_path) / "rows").glob("*.json"))
    assert "rtn" in kept
    assert len(kept) < len(ROWS), "interrupted too late to prove anything"
    done = run_script("compare.py", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from an earlier run") == len(kept)
    found, expected = rows_of(tmp_path), rows_of(whole[0])
    assert {name: row[0]["perplexity_details"] for name, row in found.items()} == {
        name: row[0]["perplexity_details"] for name, row in expected.items()
    }
    assert not list((table_in(tmp_path) / "rows").glob("*.unfinished.jsonl"))


def test_quiet_prints_the_table_alone(whole, usual, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    done = run_script("compare.py", *usual, "--swc", 0.9, "--eval_kl", "--quiet", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip() == (table_in(tmp_path) / "table.md").read_text().strip()
    runs = [table_in(tmp_path) / "rows", tmp_path]
    assert "error: " in run_script("compare.py", *runs, "--quiet", folder=tmp_path).stderr


def test_a_damaged_row_is_measured_again(whole, usual, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    (table_in(tmp_path) / "rows/rtn.json").write_text('{"identity": {')
    done = run_script("compare.py", *usual, "--swc", 0.9, "--eval_kl", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rtn.json: cannot be read" in done.stderr
    assert rows_of(tmp_path)["rtn"][0]["perplexity"] == rows_of(whole[0])["rtn"][0]["perplexity"]


@pytest.mark.parametrize(
    "flags", [("--swc", 0.8), ("--swc", 0.9, "--limit", 2), ("--swc", 0.9, "--attn_implementation", "eager")], ids=str
)
def test_another_comparison_has_a_folder_of_its_own(flags, whole, usual):
    folder = table_in(whole[0])
    before = snapshot(folder)
    done = run_script("compare.py", *usual, "--eval_kl", *flags, "--rows", "rtn", folder=whole[0])
    assert done.returncode == 0, done.stderr
    assert "from an earlier run" not in done.stdout
    others = set((whole[0] / "output").iterdir()) - {folder}
    assert len(others) == 1
    shutil.rmtree(others.pop())
    assert snapshot(folder) == before


def test_rows_of_other_data_are_refused_and_left_alone(usual, tmp_path):
    shutil.copy(usual[3], tmp_path / "own.safetensors")
    flags = ("--calib_dataset", "own.safetensors", "--rows", "rtn", "smooth")
    assert run_script("compare.py", *usual, *flags, folder=tmp_path).returncode == 0
    save_file({"calibration": random_tokens(8, 32, seed=11)}, tmp_path / "own.safetensors")
    before = snapshot(tmp_path / "output")
    done = run_script("compare.py", *usual, *flags, folder=tmp_path)
    assert_refused(done, "smooth_seed2.json is of another comparison (calibration was ")
    assert "choose another --output_dir" in done.stderr
    assert snapshot(tmp_path / "output") == before


def test_settings_that_a_row_does_not_use_do_not_matter_to_it(whole, usual, tmp_path):
    more = ("--swc", 0.9, "--eval_kl", "--max_rotation_step", 30)
    assert run_script("compare.py", *usual, *more, "--rows", "rtn", folder=tmp_path).returncode == 0
    shutil.rmtree(table_in(tmp_path) / "rows")
    shutil.copytree(table_in(whole[0]) / "rows", table_in(tmp_path) / "rows")
    done = run_script("compare.py", *usual, *more, "--rows", "full", "rtn", "smooth", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from an earlier run") == 3
    done = run_script("compare.py", *usual, *more, "--rows", "dual", folder=tmp_path)
    assert_refused(done, "quantization.max_rotation_step was 20, is 30")


def test_seeds_give_mean_and_sample_deviation_where_a_row_depends_on_them(usual, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{(7 * n * n) % 96}" for n in range(900)))
    more = ("--calib_dataset", "text.txt", "--nsamples", 3, "--seqlen", 32, "--rows", "rtn", "dual", "smooth")
    done = run_script("compare.py", *usual, *more, "--seeds", 2, 3, 4, 3, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows, table = rows_of(tmp_path), {row["row"]: row for row in table_of(tmp_path)}
    assert [row["seed"] for row in rows["dual"]] == [2, 3, 4]
    assert [row["seed"] for row in rows["rtn"]] == [None]
    for name in ("smooth", "dual"):
        found = [row["perplexity"]["tokens"] for row in rows[name]]
        assert len(set(found)) == 3
        assert float(table[name]["tokens ppl"]) == pytest.approx(statistics.fmean(found))
        assert float(table[name]["tokens ppl std"]) == pytest.approx(statistics.stdev(found))
        cell = f"{statistics.fmean(found):.3f} ± {statistics.stdev(found):.3f}"
        assert cell in (table_in(tmp_path) / "table.md").read_text(encoding="utf-8")
    assert (table["rtn"]["tokens ppl std"], table["rtn"]["seeds"]) == ("", "")
    assert done.stdout.count("activation statistics: ") == 3, "once for a seed, whatever the rows"
    assert "sample standard deviation over the seeds 2, 3, 4" in done.stdout
    alone = run_script("main.py", *usual, *more[:6], "--smooth", "--seed", 4, folder=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert results_of(tmp_path, "tiny_w4a4_[!c]*")["perplexity"] == rows["dual"][2]["perplexity"]


def test_the_ablation_measures_best_but_for_each_part_at_the_bits_given_and_goes_on_where_it_was(usual, tmp_path):
    flags = ("--rows", "ablation", "--wbits", 3, "--seed", 7)
    done = run_script("compare.py", *usual, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = the_run(tmp_path / "output", "tiny_w3a4_compare*")
    rows = results_in(folder)["rows"]
    assert [row["row"] for row in rows] == ["full", "paper", "best", *VARIANTS]
    assert [row["title"] for row in rows[3:]] == [each.title for each in VARIANTS.values()]
    assert {(row["bits"], row["seed"]) for row in rows[1:]} == {("W3A4", 7)}
    assert len({row["perplexity"]["tokens"] for row in rows}) == len(rows), "every part does something"
    (folder / "rows/best_without_gptq_seed7.json").unlink()
    done = run_script("compare.py", *usual, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from an earlier run") == len(rows) - 1
    assert [row["perplexity"] for row in results_in(folder)["rows"]] == [row["perplexity"] for row in rows]


def test_a_row_of_a_preset_that_was_another_then_is_refused(usual, tmp_path):
    flags = ("--rows", "best_without_lac")
    assert run_script("compare.py", *usual, *flags, folder=tmp_path).returncode == 0
    path = table_in(tmp_path) / "rows/best_without_lac_seed2.json"
    saved = json.loads(path.read_text())
    saved["identity"]["quantization.alpha"] = 0.4
    path.write_text(json.dumps(saved))
    done = run_script("compare.py", *usual, *flags, folder=tmp_path)
    assert_refused(done, "quantization.alpha was 0.4, is 0.5")


def test_lwc_adds_a_row_to_every_quantized_one(usual, tmp_path):
    flags = ("--swc", 0.9, "--lwc", "--epochs", 1, "--rows", "full", "rtn", "dual")
    done = run_script("compare.py", *usual, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert list(rows) == ["full", "rtn", "rtn_lwc", "dual", "dual_lwc"]
    assert [rows[name][0]["title"] for name in ("rtn_lwc", "dual_lwc")] == ["round-to-nearest + LWC", "DuQuant + LWC"]
    assert rows["dual"][0]["layers"][0]["training"] is None
    assert rows["rtn_lwc"][0]["layers"][0]["training"]["losses"]
    alone = run_script("main.py", *usual, "--smooth", "--lwc", "--epochs", 1, folder=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert results_of(tmp_path, "tiny_w4a4_[!c]*")["perplexity"] == rows["dual_lwc"][0]["perplexity"]


def test_without_smoothing_rows_say_so_by_their_names(usual, tmp_path):
    flags = ("--no_smooth", "--rows", "hadamard", "dual", "--prompt", "w1 w2", "--max_new_tokens", 3)
    done = run_script("compare.py", *usual, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert [row["title"] for [row] in rows.values()] == ["Hadamard rotation", "DuQuant without smoothing"]
    assert [row["layers"][0]["groups"][0]["scale"] for [row] in rows.values()] == ["none", "none"]
    assert "“w1 w2”" in (table_in(tmp_path) / "table.md").read_text(encoding="utf-8")


FAIL_ROW = """
import pathlib
import experiment.compare as module
travel = module.travel
def fail(setup, model, layers, quant, *rest, **more):
    if quant.transform == "hadamard" and not pathlib.Path("failed").exists():
        pathlib.Path("failed").touch()
        raise RuntimeError("no luck today")
    return travel(setup, model, layers, quant, *rest, **more)
module.travel = fail
"""


def test_a_row_that_fails_is_recorded_and_loses_no_other(usual, tmp_path):
    flags = ("--rows", "rtn", "hadamard", "dual")
    done = run_script("compare.py", *usual, *flags, folder=tmp_path, first=FAIL_ROW)
    assert done.returncode == 1
    assert "hadamard_seed2: RuntimeError: no luck today; the other rows are kept" in done.stderr.splitlines()[-1]
    rows = rows_of(tmp_path)
    assert rows["hadamard"][0]["error"] == "RuntimeError: no luck today"
    assert rows["dual"][0]["perplexity"]["tokens"] > 1
    table = (table_in(tmp_path) / "table.md").read_text(encoding="utf-8")
    assert "Failed: smoothing + Hadamard rotation (hadamard_seed2): RuntimeError: no luck today" in table
    done = run_script("compare.py", *usual, *flags, folder=tmp_path, first=FAIL_ROW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from an earlier run") == 2
    assert results_in(table_in(tmp_path))["error"] is None


def test_an_evaluation_that_fails_leaves_its_row_unfinished_and_is_all_that_is_tried_again(usual, tmp_path):
    save_file({"test": random_tokens(5, 32, seed=9)}, tmp_path / "second.safetensors")
    flags = ("--test_dataset", usual[5], "second.safetensors", "--rows", "rtn", "dual")
    done = run_script("compare.py", *usual, *flags, folder=tmp_path, first=FAIL_ONCE)
    assert done.returncode == 1
    assert "rtn: perplexity second (RuntimeError: no luck today)" in done.stderr.splitlines()[-1]
    assert table_of(tmp_path)[0]["second ppl"] == ""
    found = rows_of(tmp_path)["rtn"][0]["perplexity"]
    assert list(found) == ["tokens"]
    folder = table_in(tmp_path) / "rows"
    assert sorted(path.name for path in folder.iterdir()) == ["dual_seed2.json", "rtn.unfinished.jsonl"]
    done = run_script("compare.py", *usual, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["dual_seed2.json", "rtn.json"]
    assert rows_of(tmp_path)["rtn"][0]["perplexity"]["tokens"] == found["tokens"]
    assert float(table_of(tmp_path)[0]["second ppl"]) > 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rows", "finest"), "--rows"),
        (("--seeds", -1), "--seeds -1: must be between 0 and"),
        (("--wbits", 16, "--abits", 16), "nothing is quantized"),
        (("--no_smooth", "--rows", "smooth"), "--rows smooth is the row that only smooths"),
        (("--output", "x.md"), "--output is for finished runs"),
        (("somewhere",), "and not both"),
        (("--block_size", 32), "try 4 or 8 or 16 or auto"),
        (("--swc", 1.5), "--swc 1.5"),
        (("--transform", "none"), "--transform"),
        (("--limit", 0), "--limit 0"),
        (("--model", "nowhere/at/all"), "no such folder"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_are_named_in_one_line(flags, words, usual, tmp_path):
    assert_refused(run_script("compare.py", *usual, *flags, folder=tmp_path), words)
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / "output").exists()


def test_a_comparison_needs_a_measure_and_a_model(usual, tmp_path):
    none = (*usual[:-1], "--no_eval_ppl")
    assert_refused(run_script("compare.py", *none, folder=tmp_path), "nothing to compare by: drop --no_eval_ppl")
    assert_refused(run_script("compare.py", "--abits", 4, folder=tmp_path), "give --model")


def test_runs_side_by_side_show_all_figures_and_name_every_setting_that_differs(runs):
    done = run_script("compare.py", "a", "b", "--output", "both.md", folder=runs)
    assert done.returncode == 0, done.stderr
    for name in "ab":
        found = results_in(runs / name)
        assert f"{found['perplexity']['tokens']:.3f}" in done.stdout
        assert f"{found['perplexity_details']['tokens']['divergence']:.3f}" in done.stdout
    different = done.stdout.split("What differs:")[1]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in different.strip().splitlines()]
    assert cells[2:] == [["--lac", "0.95", "0.8"], ["--seed", "2", "5"]]
    assert (runs / "both.md").read_text(encoding="utf-8").strip() == done.stdout.strip()


def test_runs_that_differ_in_nothing_say_so_and_write_nothing(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "a")
    before = snapshot(tmp_path)
    done = run_script("compare.py", runs / "a", tmp_path / "a", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No setting differs." in done.stdout
    assert snapshot(tmp_path) == before


def test_half_finished_runs_are_reported_as_such(runs, tmp_path):
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    interrupted = results_in(tmp_path / "b") | {"error": "KeyboardInterrupt", "perplexity_details": {}}
    (tmp_path / "b/results.json").write_text(json.dumps(interrupted))
    (tmp_path / "full/results.json").unlink()
    done = run_script("compare.py", "a", "b", "full", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2. b (unfinished: KeyboardInterrupt)" in done.stdout
    assert "3. full (unfinished: no results.json" in done.stdout
    header = next(line for line in done.stdout.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header.split("|")[2:5]] == ["run 1", "run 2 (unfinished)", "run 3 (unfinished)"]
    (perplexity,) = (line for line in done.stdout.splitlines() if line.startswith("| tokens ppl"))
    assert [cell.strip() for cell in perplexity.split("|")[3:5]] == ["–", "–"]


def test_folders_that_are_no_runs_are_refused(runs, whole, tmp_path):
    run = runs / "a"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/results.json").write_text("{")
    for folder, words in {
        "nowhere": "nowhere: no such folder",
        "empty": "empty: no run there",
        "broken": "results.json: cannot be read",
        table_in(whole[0]): "is a comparison with a table of its own",
        run: "the same folder is named twice",
    }.items():
        assert_refused(run_script("compare.py", run, folder, folder=tmp_path), words)
    assert_refused(run_script("compare.py", run, folder=tmp_path), "give two or more runs")
    both = (run, runs / "b", "--output", "broken")
    assert_refused(run_script("compare.py", *both, folder=tmp_path), "--output broken: cannot be written")
    assert_refused(run_script("compare.py", run, run, "--abits", 4, folder=tmp_path), "--abits is for --model")


def test_a_saved_model_is_refused(usual, tmp_path):
    flags = ("--save_model", "saved", "--output_dir", "made")
    assert run_script("main.py", *usual, *flags, folder=tmp_path).returncode == 0
    done = run_script("compare.py", *usual, "--model", "saved", folder=tmp_path)
    assert_refused(done, "--model saved: is quantized already")


def test_a_model_without_any_finite_figure_still_has_a_table(usual, model_folder, tmp_path):
    save_file({"calibration": random_tokens(2, 8), "test": random_tokens(1, 8)}, tmp_path / "few.safetensors")
    few = ("--calib_dataset", "few.safetensors", "--test_dataset", "few.safetensors", "--rows", "full", "rtn")
    assert run_script("compare.py", *usual, *few, folder=tmp_path).returncode == 0
    path = table_in(tmp_path) / "rows/rtn.json"
    saved = json.loads(path.read_text())
    saved["figures"]["perplexity_details"]["few"]["perplexity"] = None  # as JSON has a perplexity that overflowed
    path.write_text(json.dumps(saved))
    done = run_script("compare.py", *usual, *few, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert math.isnan(float(table_of(tmp_path)[1]["few ppl"]))
