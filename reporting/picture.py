"""The picture of a comparison: a panel per figure, a dot per row, full precision as a line."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation.base import FULL, Kind
from evaluation.figures import TableRow, headings, show
from utils.io import write_atomically

# Okabe and Ito's colours, which all kinds of colour vision tell apart
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#555555"
MOST_PANELS = 6
LOG_RANGE = 5  # largest over smallest value from which on a linear axis would squeeze the small ones together


def draw(rows: Sequence[TableRow], title: str, folder: Path) -> None:
    """Write comparison.png and comparison.svg into `folder`; nothing where no figure was measured."""
    figures = {heading: spread.figure for row in rows for heading, spread in row.values.items()}
    panels = [heading for heading in headings([figures]) if figures[heading].kind is not Kind.SECONDS][:MOST_PANELS]
    if not panels:
        return
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "comparison", "font.size": 10}):
        height = 1.4 + 0.42 * len(rows)
        figure = Figure(figsize=(2.4 + 3.4 * len(panels), height), layout="constrained")
        figure.suptitle(title)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, heading in zip(axes, panels, strict=True):
            draw_panel(axis, rows, heading)
        axes[0].set_yticks(range(len(rows)), [row.title for row in rows])
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        for suffix, more in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            write_atomically(folder / f"comparison.{suffix}", saver(figure, suffix, more))


def saver(figure, suffix: str, more: dict) -> Callable[[Path], None]:
    """What writes `figure` in one format."""
    return lambda path: figure.savefig(path, format=suffix, **more)


def draw_panel(axis, rows: Sequence[TableRow], heading: str) -> None:
    """One figure of all rows: dots with their spread and value, and a dashed line at full precision."""
    shown = [(place, row, row.values[heading]) for place, row in enumerate(rows) if heading in row.values]
    shown = [(place, row, value) for place, row, value in shown if math.isfinite(value.mean)]
    for place, row, value in shown:
        colour = GREY if row.name == FULL else VERMILION if row.name.startswith("dual") else BLUE
        axis.errorbar(value.mean, place, xerr=value.deviation, fmt="o", color=colour, capsize=3)
        text, clear = show(value.figure), {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        where = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        axis.annotate(text, (value.mean, place), **where, fontsize=8, bbox=clear)
        if row.name == FULL:
            axis.axvline(value.mean, color=GREY, linestyle="--", linewidth=1, zorder=0)
    means = [value.mean for _, _, value in shown]
    if means and min(means) > 0 and max(means) / min(means) > LOG_RANGE:
        axis.set_xscale("log")
    axis.margins(x=0.15)
    lower = next(row.values[heading].figure.lower_is_better for row in rows if heading in row.values)
    better = "lower" if lower else "higher"
    axis.set_xlabel(f"{heading} ({better} is better)")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
