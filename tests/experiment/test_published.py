"""Published figures: the file itself, and which runs and rows of comparisons are laid beside which of them."""

import json

import pytest
from conftest import ROOT
from script_cases import settings_of

from evaluation.figures import figures_of
from experiment.presets import PRESETS
from experiment.published import method_of, published_text, read_published
from experiment.rows import CompareSettings
from utils.errors import InputError
from utils.settings import flat

PAPER = "--wbits 4 --abits 4 --smooth --alpha 0.6 --lac 0.9 --swc 0.8"
README = {  # WikiText-2, of the paper's Tables 1 and 5: full precision, DuQuant, with LWC
    "llama-2-7b": (5.47, 6.28, 6.08),
    "llama-2-13b": (4.88, 5.42, 5.33),
    "llama-2-70b": (3.31, 3.79, 3.76),
    "llama-7b": (5.68, 6.40, 6.18),
    "llama-13b": (5.09, 5.65, 5.47),
    "llama-30b": (4.10, 4.72, 4.55),
    "llama-65b": (3.53, 4.13, 3.93),
    "llama-3-8b": (6.14, 8.56, 8.06),
}


def write_run(folder, flags: str, perplexity: float, **facts) -> None:
    """A run's folder with a results.json of settings and one perplexity."""
    folder.mkdir()
    settings = flat(settings_of(*flags.split()))
    results = {"settings": settings | {"net": settings["net"] or settings["model"]}, "seconds": {}}
    found = {"wikitext2": {"perplexity": perplexity, "divergence": None}}
    (folder / "results.json").write_text(json.dumps(results | {"perplexity_details": found, "error": None} | facts))


def beside(tmp_path, flags: str, perplexity: float = 6.30) -> str:
    """What is printed for a run with these flags."""
    write_run(tmp_path / "run", flags, perplexity)
    return published_text([tmp_path / "run"])


def table(text: str) -> list[list[str]]:
    """The cells of the table's lines."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][2:]


@pytest.mark.parametrize("model", README)
def test_the_file_has_the_figures_that_are_known_by_heart(model):
    entries = read_published().entries
    for name, value in zip(("full", "paper", "paper_lwc"), README[model], strict=True):
        flags = "--wbits 16 --abits 16" if name == "full" else f"{PAPER}"
        if name == "paper_lwc":
            flags = "--wbits 4 --abits 4 --smooth --alpha 0.5 --lac 0.9 --lwc --epochs 20"
        method = method_of(settings_of(*flags.split()).quant)
        found = [each.figures for each in entries if (each.model, each.method) == (model, method)]
        assert value in [figures.get("wikitext2 ppl") for figures in found]


def test_no_two_entries_say_different_things_of_the_same():
    said = {}
    for entry in read_published().entries:
        for heading, value in entry.figures.items():
            key = (entry.model, json.dumps(entry.method, sort_keys=True), heading, json.dumps(entry.protocol))
            assert said.setdefault(key, value) == value, key


def test_six_tasks_have_the_mean_that_is_printed():
    means = 0
    for entry in read_published().entries:
        tasks = [value for heading, value in entry.figures.items() if heading.endswith(("acc", "acc_norm"))]
        if "mean of six acc_norm" in entry.figures:
            means += 1
            *six, mean = tasks
            assert len(six) == 6
            assert sum(six) / 6 == pytest.approx(mean, abs=0.06)  # rounded, and the 70B model to one digit
    assert means > 20


def test_every_model_is_named_and_every_figure_says_where_it_stands():
    content = json.loads((ROOT / "assets/published.json").read_text())
    assert {entry["model"] for entry in content["entries"]} == set(content["names"])
    assert all(entry["table"] and entry["figures"] for entry in content["entries"])
    assert all(source["url"] for source in content["sources"].values())


def test_headings_are_those_of_our_tables():
    results = {"perplexity_details": {name: {"perplexity": 1.0} for name in ("wikitext2", "c4", "ptb", "test")}}
    metrics = {"acc": 0.5, "acc_norm": 0.5}
    tasks = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "stories_qa")
    scores = [{"task": task, "group": None, "metrics": metrics} for task in tasks]
    results |= {"zero_shot": {"scores": scores, "average": {"acc_norm": 0.5}}}
    results |= {"mmlu": {key: {"accuracy": 0.5} for key in ("0_shot", "5_shot")}}
    known = figures_of(results)
    assert {heading for entry in read_published().entries for heading in entry.figures} <= set(known)


@pytest.mark.parametrize("model", ["meta-llama/Llama-2-7b-hf", "/data/llama-2-7b", "x --net Llama_2_7b", "llama2-7b"])
def test_a_run_of_the_paper_is_laid_beside_the_paper(model, tmp_path):
    [row] = table(beside(tmp_path, f"--model {model} {PAPER}"))
    assert row[1:] == ["wikitext2 ppl", "6.300", "6.280", "+0.020", "Table 1, the paper"]


@pytest.mark.parametrize(
    "more",
    ["--alpha 0.5", "--wbits 8", "--kbits 8", "--rotation_search row", "--symmetric", "--train transform --swc none"],
)
def test_another_method_is_not(more, tmp_path):
    text = beside(tmp_path, f"--model llama-2-7b {PAPER} {more}")
    assert not table(text)
    assert "no published figures of this method" in text


@pytest.mark.parametrize(
    ("flags", "published"),
    [
        ("--transform rotation", "7.920"),
        ("--no_smooth", "6.790"),
        ("--block_size 32", "6.960"),
        ("--max_rotation_step 16", "6.320"),
        ("--wbits 6 --abits 6", "5.530"),
        ("--wbits 16 --abits 16", "5.470"),
    ],
)
def test_parts_and_bits_are_laid_beside_their_own_figures(flags, published, tmp_path):
    [row] = table(beside(tmp_path, f"--model llama-2-7b {PAPER} {flags}"))
    assert row[3] == published


def test_a_seed_and_what_a_search_does_not_do_make_no_other_method(tmp_path):
    assert table(beside(tmp_path, f"--model llama-2-7b {PAPER} --seed 5"))
    none = settings_of(*f"{PAPER} --transform none".split()).quant
    assert method_of(none) == method_of(settings_of(*f"{PAPER} --transform none --max_rotation_step 3".split()).quant)


def test_a_model_that_is_not_there_is_said(tmp_path):
    text = beside(tmp_path, f"--model somebody/Llama-2-7b-chat-hf {PAPER}")
    assert not table(text)
    assert "no published figures of a model called somebody/Llama-2-7b-chat-hf" in text


def test_another_text_is_said(tmp_path):
    text = beside(tmp_path, f"--model llama-2-7b {PAPER} --limit 4 --seqlen 512 --calib_dataset wikitext2=train.txt")
    assert len(table(text)) == 1
    assert "--limit 4 here, --limit all in Table 1" in text
    assert "--seqlen 512 here, --seqlen 2048" in text
    assert "calib_dataset" not in text


def test_accuracies_are_fractions_as_in_our_tables(tmp_path):
    scores = [{"task": "piqa", "group": None, "metrics": {"acc": 0.75, "acc_norm": 0.76, "acc_norm_stderr": 0.01}}]
    write_run(tmp_path / "run", f"--model llama-2-7b {PAPER}", 6.3, zero_shot={"scores": scores, "average": None})
    rows = {row[1]: row[2:] for row in table(published_text([tmp_path / "run"]))}
    assert rows["piqa acc_norm"] == ["0.760", "0.752", "+0.008", "Table D1, the paper"]


def test_full_precision_that_was_measured_beside_a_run_has_its_line(tmp_path):
    full = {"perplexity": {"wikitext2": 5.47}, "perplexity_details": {"wikitext2": {"perplexity": 5.472}}}
    write_run(tmp_path / "run", f"--model llama-2-7b {PAPER}", 6.3, full_precision=full)
    assert [row[0].split(", ")[1] for row in table(published_text([tmp_path / "run"]))] == [
        "full precision",
        "DuQuant W4A4",
    ]


def test_rows_of_a_comparison_are_laid_beside_theirs_seeds_joined(tmp_path):
    folder = tmp_path / "compared"
    folder.mkdir()
    flags = f"--model llama-2-7b {PAPER} --rows full paper paper_lwc dual rotation best --seeds 2 3".split()
    settings = flat(settings_of(*flags, cls=CompareSettings))
    values = {"full": [5.5], "paper": [6.2, 6.4], "paper_lwc": [6.1], "rotation": [7.9], "best": [5.9]}
    rows = [
        {"row": name, "seed": seed, "error": None, "perplexity_details": {"wikitext2": {"perplexity": value}}}
        for name, each in values.items()
        for seed, value in enumerate(each, start=2)
    ]
    (folder / "results.json").write_text(json.dumps({"settings": settings, "rows": rows, "error": None}))
    text = published_text([folder])
    found = {row[0].split(", ")[1]: row[2:4] for row in table(text)}
    assert found == {
        "full precision": ["5.500", "5.470"],
        "preset paper W4A4": ["6.300 ± 0.141", "6.280"],
        "preset paper_lwc W4A4": ["6.100", "6.080"],
        "smoothing + rotation W4A4": ["7.900", "7.920"],
    }
    assert "preset best W4A4: no published figures" in text


def test_folders_that_hold_no_run_are_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        published_text([tmp_path / "nothing"])
    write_run(tmp_path / "run", f"--model m {PAPER}", 6.3)
    results = json.loads((tmp_path / "run/results.json").read_text())
    results["settings"]["transform"] = "sideways"
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match="not those of this version"):
        published_text([tmp_path / "run"])


def test_presets_that_are_published_are_presets():
    content = json.loads((ROOT / "assets/published.json").read_text())
    assert {entry["preset"] for entry in content["entries"]} <= {"full", *PRESETS}
