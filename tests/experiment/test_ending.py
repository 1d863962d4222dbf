"""The last lines of a run: what it cost, where it is, what comes next."""

from pathlib import Path

import pytest

from experiment.ending import cost, next_steps, place

HOST = {"peak_memory_bytes": 2_000_000_000, "peak_host_memory_bytes": 2_000_000_000}
GPU = HOST | {"peak_memory_bytes": 5_400_000_000}


def test_the_cost_is_by_stage_in_order_without_parts_of_stages():
    seconds = {"load": 0.04, "perplexity": 21.3, "statistics": 0.8, "quantize": 4.94, "search": 3.0}
    said = cost(seconds, 27.4, HOST)
    assert said == "took 27 s (statistics 0.8, quantize 4.9, perplexity 21), at most 2.0 GB of the host's memory"
    assert cost({}, 1.0, GPU) == "took 1.0 s, at most 5.4 GB of the GPU and 2.0 GB of the host's memory"


def test_the_place_names_what_is_there(tmp_path):
    (tmp_path / "log.txt").touch()
    assert place(tmp_path, ("results.json", "log.txt")) == f"results: {tmp_path} (log.txt)"


@pytest.mark.parametrize(
    ("saved", "can_save", "reported", "can_report", "words", "others"),
    [
        (None, True, False, True, ("--save_model DIR", "--report", "compare.py run OTHER_RUN"), ("index.html", "-m ")),
        (
            Path("my model"),
            True,
            True,
            True,
            ("duquant 'my model' --prompt", "run/report/index.html"),
            ("--save_model",),
        ),
        (None, False, False, False, ("compare.py run OTHER_RUN",), ("--save_model", "--report", "-m ")),
    ],
)
def test_what_comes_next_is_what_was_not_done(saved, can_save, reported, can_report, words, others):
    said = next_steps(Path("run"), saved, can_save, reported, can_report)
    assert said.startswith("next: ")
    assert all(word in said for word in words)
    assert not any(word in said for word in others)
