"""How every figure looks: fonts that survive a narrow page, colours that colour-blind readers can tell apart."""

import textwrap
from collections.abc import Sequence

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, darkest contrast first; black and grey are for reference lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
REFERENCE = "#555555"
MAP = "viridis"
CHARACTER_WIDTH = 0.085  # of a legend's text, in inches
HANDLE_CHARACTERS = 5  # the room of a legend's handle and of the space about it
SETTINGS = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "legend.fontsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "report",  # the same data gives the same file
}


def styled():
    """Inside the block figures are made and drawn in the report's style, whatever the user's matplotlibrc says."""
    return rc_context(SETTINGS)


def map_palette() -> list[int]:
    """224 colours of the map and 32 greys, as the 256 × 3 bytes of a palette."""
    colours = [round(255 * part) for place in range(224) for part in colormaps[MAP](place / 223)[:3]]
    return [*colours, *(round(255 * grey / 31) for grey in range(32) for _ in range(3))]


def line_figure(width: float = 7.0, height: float = 4.2) -> tuple[Figure, Axes]:
    """A figure with one axis."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def layer_axis(axis: Axes) -> None:
    """Name the x axis, with a tick at whole layers only."""
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 5, 10]))
    axis.set_xlabel("decoder layer")


def marker_size(layers: Sequence) -> float:
    """Of one point per layer: smaller where there are many."""
    return 6.0 if len(layers) <= 24 else 3.0


def legend_below(figure: Figure, axis: Axes, columns: int = 4) -> None:
    """The legend outside, where it hides no data; names that its columns have no room for are broken into lines."""
    handles, names = axis.get_legend_handles_labels()
    columns = min(columns, len(names))
    room = max(12, int(figure.get_figwidth() / columns / CHARACTER_WIDTH) - HANDLE_CHARACTERS)
    names = [textwrap.fill(name, room) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=columns)
