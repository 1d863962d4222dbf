"""Figures over all layers of a run, and of its scores: pure functions from results.json to a matplotlib figure."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reporting.style import COLOURS, MARKERS, REFERENCE, layer_axis, legend_below, line_figure, marker_size

LEAST_SPAN = 6.0  # dB
MOST_LABELS = 20  # below the bars of one panel
NARROWEST = 8  # a panel of few bars is as wide as one of so many
Lookup = Callable[[dict], float | None]  # a group's recorded figures → the number to draw


def output_error_figure(layers: Sequence[dict]) -> Figure:
    """Relative error of every layer's output, in per cent."""
    figure, axis = line_figure()
    numbers = [layer["layer"] for layer in layers]
    axis.plot(
        numbers,
        [100 * _number(layer["output_error"]) for layer in layers],
        "o-",
        markersize=marker_size(layers),
        color=COLOURS[0],
        label="probe",
    )
    sample = [100 * _number(layer["recorded"]["output_error"]) for layer in layers]
    axis.plot(numbers, sample, "s--", markersize=marker_size(layers), color=COLOURS[1], label="calibration sample")
    axis.set_ylabel("relative output error (%)")
    axis.set_ylim(bottom=0)
    layer_axis(axis)
    legend_below(figure, axis)
    return figure


def group_figure(layers: Sequence[dict], names: Sequence[str], label: str, *looks: Lookup, log: bool = False) -> Figure:
    """One line per group over the layers; a second look at the same groups is dashed and in the same colour."""
    figure, axis = line_figure()
    numbers = [layer["layer"] for layer in layers]
    for number, name in enumerate(names):
        for dashed, look in enumerate(looks):
            values = [_look(layer, name, look) for layer in layers]
            style = "--" if dashed else "-"
            axis.plot(
                numbers,
                values,
                style,
                marker=MARKERS[number % len(MARKERS)],
                markersize=marker_size(layers),
                color=COLOURS[number % len(COLOURS)],
                markerfacecolor="white" if dashed else None,
                label=None if dashed else name,
            )
    if log:
        axis.set_yscale("log")
    axis.set_ylabel(label)
    layer_axis(axis)
    legend_below(figure, axis)
    return figure


def noise_figure(layers: Sequence[dict], names: Sequence[str], part: str) -> Figure:
    """Signal-to-quantization-noise ratio of every group; with activations that of the layers' output too; in dB."""
    figure, axis = line_figure()
    numbers = [layer["layer"] for layer in layers]
    look = NOISE[part]
    for number, name in enumerate(names):
        values = [_look(layer, name, look) for layer in layers]
        axis.plot(
            numbers,
            values,
            "-",
            marker=MARKERS[number % len(MARKERS)],
            markersize=marker_size(layers),
            color=COLOURS[number % 6],
            label=name,
        )
    if part == "activations":
        output = [_number(layer["recorded"]["output_sqnr_db"]) for layer in layers]
        axis.plot(numbers, output, ":", color="black", linewidth=2, label="layer output")
    axis.set_ylabel(f"SQNR of the {part} (dB)")
    low, high = axis.get_ylim()
    if high - low < LEAST_SPAN:  # tenths of a decibel should not look like a finding
        axis.set_ylim((low + high - LEAST_SPAN) / 2, (low + high + LEAST_SPAN) / 2)
    layer_axis(axis)
    legend_below(figure, axis, 5)
    return figure


NOISE: dict[str, Lookup] = {
    "activations": lambda group: group["activation_noise"]["transformed"]["sqnr_db"],
    "weights": lambda group: group["weight_sqnr_db"],
}


def clipping_figure(layers: Sequence[dict], names: Sequence[str]) -> Figure:
    """Median of the learned clip ratios of every group, with the middle half of them, and where training started."""
    figure, axis = line_figure()
    start = None
    for number, name in enumerate(names):
        places, lows, middles, highs = [], [], [], []
        for layer in layers:
            clip = next((group["clip"] for group in _groups(layer) if group["name"] == name), None)
            if clip is None:
                continue
            start, at = clip["start"], [clip["quantiles"].index(each) for each in (0.25, 0.5, 0.75)]
            # both ends of a range are clipped alike at the start: their quantiles are averaged
            three = [(clip["low"][each] + clip["high"][each]) / 2 for each in at]
            places.append(layer["layer"] + 0.08 * (number - (len(names) - 1) / 2))
            for store, value in zip((lows, middles, highs), three, strict=True):
                store.append(value)
        reach = [np.subtract(middles, lows), np.subtract(highs, middles)]
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        axis.errorbar(
            places,
            middles,
            reach,
            fmt=marker,
            markersize=marker_size(layers),
            color=colour,
            capsize=marker_size(layers) / 2,
            label=name,
        )
    axis.axhline(start, color=REFERENCE, linestyle="--", label="start")
    axis.set_ylabel("clip ratio (of the range's ends)")
    layer_axis(axis)
    legend_below(figure, axis, 5)
    return figure


def loss_figure(layers: Sequence[dict]) -> Figure:
    """Loss of the clipping against epoch, a line per layer, relative to that layer's loss before training."""
    figure, axis = line_figure()
    colours = colormaps["viridis"]
    last = max(layer["layer"] for layer in layers) or 1
    for layer in layers:
        training = layer["training"]
        losses = [training["loss_before"], *training["losses"]]
        relative = [_number(loss) / training["loss_before"] for loss in losses]
        axis.plot(relative, color=colours(0.9 * layer["layer"] / last), linewidth=1.5)
    scale = ScalarMappable(Normalize(0, last / 0.9), "viridis")
    bar = figure.colorbar(scale, ax=axis, label="decoder layer", boundaries=np.linspace(-0.5, last + 0.5, last + 2))
    bar.set_ticks(sorted({0, last // 2, last}))
    axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axis.set_xlabel("epoch (0: before training)")
    axis.set_ylabel("loss / loss before training")
    return figure


def bars_figure(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    labels: Sequence[str],
    quantity: str,
    may_be_log: bool = False,
    errors: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Bars of every row (a way to run the model) side by side for every label (a dataset or task), each with its value.

    `errors`: by row and label, the standard errors there are, which are drawn. A bar that is far above the others would
    hide them: if it `may_be_log` the axis is logarithmic then, and says so.
    """
    figure, axis = line_figure(max(7.0, 0.75 * len(labels) * len(rows) + 2), 4.2)
    values = [value for _, row in rows for value in row if value is not None]
    form = ".3f" if max(values) <= 1 else ".4g"
    log = may_be_log and max(values) > 20 * min(values) > 0
    width = 0.8 / len(rows)
    for number, (name, row) in enumerate(rows):
        own = number == len(rows) - 1  # the run comes last, and full precision first
        colour = COLOURS[0] if own else REFERENCE if number == 0 else COLOURS[number % len(COLOURS)]
        places = np.arange(len(labels)) + width * (number - (len(rows) - 1) / 2)
        heights = [_number(value) for value in row]
        spread = [errors[name].get(label, np.nan) for label in labels] if errors else None
        bars = axis.bar(places, heights, 0.92 * width, color=colour, label=name, yerr=spread, capsize=4)
        axis.bar_label(bars, [f"{value:{form}}" if value is not None else "" for value in row], padding=2)
    axis.set_xticks(range(len(labels)), labels)
    axis.grid(False, axis="x")
    axis.margins(y=0.12)
    if log:
        axis.set_yscale("log")
    axis.set_ylabel(quantity + (" (log scale)" if log else ""))
    if len(labels) == 1:
        axis.set_xlim(-0.9, 0.9)
    legend_below(figure, axis, 2)
    return figure


def sensitivity_figure(panels: Sequence[tuple[str, Sequence[str], Sequence[dict]]]) -> Figure:
    """Bars of the share of the gap that every variant removes, and dots of that of the divergence; in per cent.

    `panels`: title, labels and figures of the variants of one kind.
    """
    figure = Figure(figsize=(14.0, 4.6), layout="constrained")
    widths = [max(NARROWEST, len(labels)) for _, labels, _ in panels]
    axes = figure.subplots(1, len(panels), sharey=True, width_ratios=widths, squeeze=False)[0]
    for axis, (title, labels, variants) in zip(axes, panels, strict=True):
        places = np.arange(len(labels))
        gap, divergence = ([100 * _number(e[name]) for e in variants] for name in ("share", "divergence_share"))
        axis.bar(places, gap, 0.7, color=COLOURS[0], label="of the gap in log perplexity")
        axis.plot(places, divergence, "D", color=COLOURS[1], markersize=6, label="of the KL divergence")
        axis.axhline(0, color=REFERENCE, linewidth=1)
        step = -(-len(labels) // MOST_LABELS)
        words = not all(label.isdigit() for label in labels)
        axis.set_xticks(places[::step], labels[::step], rotation=30 if words else 0, ha="right" if words else "center")
        axis.grid(False, axis="x")
        axis.set_title(title)
    axes[0].set_ylabel("removed (%)")
    legend_below(figure, axes[0])
    return figure


def _groups(layer: dict) -> list[dict]:
    return layer["recorded"]["groups"]


def _look(layer: dict, name: str, look: Lookup) -> float:
    return next((_number(look(group)) for group in _groups(layer) if group["name"] == name), np.nan)


def _number(value: float | None) -> float:
    return np.nan if value is None else value
