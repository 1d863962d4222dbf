"""Figures and tables of the report, drawn from values that are known."""

import itertools

import numpy as np
import pytest

from reporting import drawing, figures, overview, style, tables
from reporting.page import duration, number, size


def planted(row: int, channel: int) -> tuple[dict, list[np.ndarray], list[dict]]:
    """A group of 40 tokens × 60 channels with one large entry: (group, landscapes, stages)."""
    values = np.random.default_rng(0).random((40, 60))
    values[row, channel] = 30
    stages = [{"name": name, "row": row, "channel": channel, "peak": 30.0} for name in ("input", "smoothed")]
    return {"rows": "token", "shape": [400, 600]}, [values, values[::-1] / 10], stages


def test_a_planted_outlier_is_where_the_landscape_says():
    group, landscapes, stages = planted(7, 41)
    figure = figures.landscape_figure(group, landscapes, stages)
    first, second = [axis for axis in figure.axes if axis.images]
    image = first.images[0]
    assert np.unravel_index(image.get_array().argmax(), image.get_array().shape) == (7, 41)
    assert image.get_extent() == [0, 600, 400, 0]  # bins are of 10 tokens × 10 channels, the first token on top
    assert (image.norm.vmax, second.images[0].norm.vmax) == (30, 3)
    assert np.unravel_index(second.images[0].get_array().argmax(), (40, 60)) == (32, 41)
    surface = next(axis for axis in figure.axes if axis.name == "3d")
    x, y, z = surface.collections[0]._faces.reshape(-1, 3).T
    top = int(np.argmax(z))
    assert abs(x[top] - 410) <= 10
    assert abs(y[top] - 70) <= 20
    texts = " ".join(text.get_text() for text in figure.texts)
    assert "token 7, channel 41" in texts


def test_pooling_for_the_surface_loses_no_peak():
    values = np.random.default_rng(0).random((64, 251))
    values[63, 250] = 9
    found = figures.pool_to(values, figures.SURFACE_BINS)
    assert found.shape <= figures.SURFACE_BINS
    assert found[-1, -1] == 9


def test_the_search_figure_marks_the_step_with_the_smallest_peak():
    trace = np.array([9.0, 5.0, 2.0, 4.0])
    axis = figures.search_figure([("rotation 1", trace)]).axes[0]
    line, star = axis.lines
    assert line.get_ydata().tolist() == trace.tolist()
    assert (star.get_xdata(), star.get_ydata()) == ([2], [2.0])
    assert "step 2" in star.get_label()


def test_the_block_figure_shows_each_block_before_and_after():
    before, after = np.array([[4.0, 1.0], [2.0, 1.0]]), np.array([[3.0, 3.0], [1.5, 1.5]])
    axes = figures.blocks_figure(before, after).axes
    assert [patch.get_height() for patch in axes[0].patches] == [4, 1, 3, 3]
    assert [patch.get_height() for patch in axes[1].patches] == [2, 1, 1.5, 1.5]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == [
        "before: variance 2.2",
        "after: variance 0",
    ]


def test_the_error_histogram_counts_every_token():
    errors = [("original", np.array([0.5, 0.6, 0.9])), ("transformed", np.array([0.01, 0.02, 0.05]))]
    axis = figures.error_figure(errors, "token").axes[0]
    assert sum(patch.get_height() for patch in axis.patches) == 6


def test_bars_have_the_scores_heights_and_a_far_one_makes_the_axis_logarithmic():
    axis = overview.bars_figure([("full precision", [5.5]), ("DuQuant", [6.5])], ["wikitext2"], "perplexity").axes[0]
    assert [patch.get_height() for patch in axis.patches] == [5.5, 6.5]
    assert axis.get_yscale() == "linear"
    rows = [("full precision", [5.5]), ("rtn", [650])]
    axis = overview.bars_figure(rows, ["wikitext2"], "perplexity", may_be_log=True).axes[0]
    assert axis.get_yscale() == "log"
    assert [text.get_text() for text in axis.texts] == ["5.5", "650"]
    assert "log" in axis.get_ylabel()


def inside(figure, part) -> bool:
    """Whether `part` is not cut off by the figure's left and right edge."""
    figure.draw_without_rendering()
    box = part.get_window_extent()
    return box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_a_legend_of_long_names_is_inside_its_figure():
    long = "energy smoothing + two Hadamard rotations + GPTQ, searched clips, shifts, heads"
    with style.styled():
        figure = overview.bars_figure([("full precision", [5.5]), (long, [6.5])], ["wikitext2"], "perplexity")
        assert inside(figure, figure.legends[0])
    assert figure.legends[0].get_texts()[1].get_text().replace("\n", " ") == long


def test_words_below_the_bars_of_a_gap_do_not_lie_on_each_other():
    part = {"share": 0.2, "divergence_share": 0.1}
    panels = [("roles", ["weights", "inputs", "q", "k", "v"]), ("layers", [str(index) for index in range(30)])]
    with style.styled():
        figure = overview.sensitivity_figure([(title, names, [part] * len(names)) for title, names in panels])
        figure.draw_without_rendering()
    roles, layers = ([label for label in axis.get_xticklabels() if label.get_text()] for axis in figure.axes)
    assert [label.get_text() for label in roles] == panels[0][1]
    assert {label.get_rotation() for label in roles} == {30.0}
    assert {label.get_rotation() for label in layers} == {0.0}
    boxes = [label.get_window_extent() for label in layers]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_accuracies_have_the_standard_error_of_the_metric_that_is_shown():
    metrics = {"acc": 0.7, "acc_stderr": 0.1, "acc_norm": 0.6, "acc_norm_stderr": 0.2}
    scores = [{"task": "piqa", "metrics": metrics}, {"task": "own", "metrics": {"acc": 0.5}}]
    found = {"method": "DuQuant", "settings": {"wbits": 4, "abits": 4}, "zero_shot": {"scores": scores}}
    assert tables.standard_errors(found) == {"full precision": {}, "DuQuant W4A4": {"piqa": 0.2}}
    rows, labels = tables.accuracies(found)
    assert (rows, labels) == ([("DuQuant W4A4", [0.6, 0.5])], ["piqa", "own"])
    [drawn] = drawing.scores(found)
    [lines] = drawn.figure.axes[0].collections
    [segment] = [each for each in lines.get_segments() if np.isfinite(each).all() and len(each)]
    assert segment[:, 1] == pytest.approx([0.4, 0.8])


def test_scores_are_read_from_tasks_and_mmlu_and_say_what_was_not_measured():
    own = {"perplexity": {"c4": 7.5}, "zero_shot": {"scores": [{"task": "piqa", "metrics": {"acc": 0.7}}]}}
    settings = {"wbits": 4, "abits": 4}
    found = {"method": "DuQuant", "settings": settings, "mmlu": {"5_shot": {"accuracy": 0.4}}, **own}
    assert tables.scores(found) == [
        ("perplexity", "c4", 7.5, None),
        ("accuracy", "piqa", 0.7, None),
        ("accuracy", "MMLU 5-shot", 0.4, None),
    ]
    found["full_precision"] = {"perplexity": {"c4": 7.0}, "zero_shot": None}
    assert tables.scores(found)[:2] == [("perplexity", "c4", 7.5, 7.0), ("accuracy", "piqa", 0.7, None)]


def test_units_are_those_that_fit():
    assert [str(size(value)).partition(">")[2] for value in (512, 3 * 2**20)] == ["512 B</data>", "3 MiB</data>"]
    assert "1 h 01 min" in str(duration(3665))
    assert "99.0 s" in str(duration(99))
    assert str(number(None)) == "<span>–</span>"
