"""Results become figures in one place: which metric of a task is shown, and that old files are read."""

import math

from evaluation.base import Kind
from evaluation.figures import figures_of, headings, show
from reporting import tables

SCORES = [
    {"task": "piqa", "metrics": {"acc": 0.7, "acc_stderr": 0.1, "acc_norm": 0.6, "acc_norm_stderr": 0.2}},
    {"task": "boolq", "metrics": {"acc": 0.5, "acc_stderr": 0.3}},
    {"task": "gsm8k", "metrics": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1}},
    {"task": "member", "metrics": {"acc": 0.9}, "group": "all"},
]
RESULTS = {
    "perplexity": {"c4": 7.0, "ptb": None},
    "perplexity_details": {
        "c4": {"perplexity": 7.0, "divergence": 0.5},
        "ptb": {"perplexity": None, "divergence": None},
    },
    "zero_shot": {"scores": SCORES, "average": None},
    "mmlu": {"5_shot": {"shots": 5, "accuracy": 0.25, "standard_error": 0.01}},
    "mt_bench": {"scores": {"average": 6.5}},
    "completions": {"a": "b"},
    "seconds": {"quantize": 2.0, "perplexity": 3.0, "MMLU": 4.0, "placing": 9.0},
}


def test_compact_tables_show_the_metric_a_task_is_published_with_and_long_ones_all():
    compact, whole = figures_of(RESULTS, compact=True), figures_of(RESULTS)
    of_tasks = [heading for heading in compact if heading.startswith(("piqa", "boolq", "gsm8k", "member"))]
    assert of_tasks == ["piqa acc_norm", "boolq acc", "gsm8k exact_match,strict"]
    assert set(whole) - set(compact) == {"piqa acc"}


def test_the_page_shows_the_accuracies_of_the_compact_table():
    results = {**RESULTS, "method": "DuQuant", "settings": {"wbits": 4, "abits": 4}}
    [(_, values)], labels = tables.accuracies(results)
    shown = dict(zip(labels, values, strict=True))
    compact = figures_of(RESULTS, compact=True).values()
    assert shown == {each.label: each.value for each in compact if each.kind is Kind.ACCURACY}
    assert shown == {"piqa": 0.6, "boolq": 0.5, "MMLU 5-shot": 0.25}
    assert tables.standard_errors(results)["DuQuant W4A4"] == {"piqa": 0.2, "boolq": 0.3, "MMLU 5-shot": 0.01}


def test_cells_have_the_digits_of_their_figure_and_seconds_come_last():
    found = figures_of(RESULTS)
    assert headings([{"quantize s": 1}, found])[-2:] == ["quantize s", "evaluate s"]
    assert (show(found["c4 ppl"]), show(found["MT-Bench"]), show(found["evaluate s"])) == ("7.000", "6.50", "7.0")
    assert math.isnan(found["ptb ppl"].value)
    assert show(None) == "–"
    assert [heading for heading, each in found.items() if each.lower_is_better] == [
        *("c4 ppl", "c4 KL", "ptb ppl", "quantize s", "evaluate s")
    ]


def test_results_without_details_and_unfinished_ones_are_read():
    assert figures_of({"perplexity": {"c4": 7.0}})["c4 ppl"].value == 7.0
    assert figures_of({}) == {}
    assert figures_of({"zero_shot": None, "mmlu": {}, "mt_bench": None, "perplexity": {}}) == {}
