"""Figures of one input group: pure functions from what was recorded to a matplotlib figure."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D

from reporting.style import COLOURS, MAP, line_figure

SURFACE_BINS = (24, 72)  # tokens and channels of a surface: more cannot be told apart at its size
TITLES = {"input": "original"}
MOST_BARS = 40  # blocks; more are drawn as a line


def landscape_figure(
    group: dict, landscapes: Sequence[np.ndarray], stages: Sequence[dict], quantity: str = "|activation|"
) -> Figure:
    """Surfaces above heat maps, one column per stage.

    `landscapes` [rows, columns] are the pooled magnitudes of `stages`, which name their peaks; `group["shape"]` is what
    they are pooled from. The first column has its own colour scale, the others share one.
    """
    count = len(stages)
    inches = 2.9 * count + 0.5
    figure, margin = Figure(figsize=(inches, 7.4)), 0.7 / inches
    shared = max((each.max() for each in landscapes[1:]), default=1.0)
    rows_name, extent = group["rows"], (0, group["shape"][1], 0, group["shape"][0])
    width = (0.98 - margin) / count
    for column, (stage, values) in enumerate(zip(stages, landscapes, strict=True)):
        norm = Normalize(0, values.max() if column == 0 else shared)
        left = margin + column * width
        surface = figure.add_axes((left - 0.06 * width, 0.53, 0.98 * width, 0.38), projection="3d")
        draw_surface(surface, values, norm, extent)
        surface.set_ylabel(rows_name, labelpad=1)
        position = f"{stage['row']}, channel {stage['channel']}"
        name = TITLES.get(stage["name"], stage["name"])
        figure.text(left + 0.43 * width, 0.985, name, ha="center", va="top", fontsize=15, fontweight="bold")
        figure.text(
            left + 0.43 * width, 0.945, f"peak {stage['peak']:.3g}\n{rows_name} {position}", ha="center", va="top"
        )
        heat = figure.add_axes((left, 0.19, 0.84 * width, 0.31))
        mesh = draw_map(heat, values, norm, extent)
        heat.set_xlabel("channel")
        heat.tick_params(labelleft=column == 0)
        heat.set_ylabel(rows_name if column == 0 else "")
        bar = figure.add_axes((left, 0.085, 0.84 * width, 0.022))
        scale = "own scale" if column == 0 or count == 1 else "shared scale"
        figure.colorbar(mesh, cax=bar, orientation="horizontal").set_label(f"{quantity}, {scale}")
        bar.locator_params(nbins=4)
    return figure


def draw_surface(axis: Axes3D, values: np.ndarray, norm: Normalize, extent: tuple[int, int, int, int]) -> None:
    """One landscape as a surface, pooled once more so that every peak stays."""
    values = pool_to(values, SURFACE_BINS)
    y, x = (np.linspace(0, end, size, endpoint=False) for end, size in zip(extent[3::-2], values.shape, strict=True))
    mesh = np.meshgrid(x, y)
    axis.plot_surface(
        *mesh, values, rstride=1, cstride=1, cmap=MAP, norm=norm, shade=False, antialiased=False, rasterized=True
    )
    axis.set_zlim(0, norm.vmax)
    axis.patch.set_alpha(0)  # numbers of its neighbour reach into it
    axis.view_init(elev=28, azim=-58)
    axis.set_box_aspect((1.25, 1, 0.8), zoom=0.9)
    for each in (axis.xaxis, axis.yaxis, axis.zaxis):
        each.set_major_locator(_few_ticks())
        each.set_tick_params(labelsize=11, pad=-1)
    axis.set_xlabel("channel", labelpad=1)


def draw_map(axis: Axes, values: np.ndarray, norm: Normalize, extent: tuple[int, int, int, int]):
    """One landscape as a heat map with the first row on top; returns what a colour bar needs."""
    axis.grid(False)
    mesh = axis.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap=MAP,
        norm=norm,
        extent=(extent[0], extent[1], extent[3], extent[2]),
    )
    axis.xaxis.set_major_locator(_few_ticks())
    axis.yaxis.set_major_locator(_few_ticks())
    return mesh


def blocks_figure(before: np.ndarray, after: np.ndarray) -> Figure:
    """Largest and mean channel peak of every block [2, blocks], before and after the first zigzag permutation."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = ("largest |activation|", "mean channel peak")
    for axis, title, *pair in zip(axes, titles, before, after, strict=True):
        for number, (values, name) in enumerate(zip(pair, ("before", "after"), strict=True)):
            place = np.arange(len(values))
            label = f"{name}: variance {values.astype(np.float64).var():.2g}"
            if len(values) <= MOST_BARS:
                axis.bar(place + 0.4 * (number - 0.5), values, 0.38, color=COLOURS[1 - number], label=label)
            else:
                axis.plot(place, values, color=COLOURS[1 - number], label=label, linewidth=1.3)
        axis.set_title(title + " per block")
        axis.set_xlabel("block of channels")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), handlelength=1.2)
    axes[0].set_ylabel("|activation|")
    return figure


def search_figure(traces: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """Peak (max − min of the probe) against greedy step, with the step that is kept marked."""
    figure, axis = line_figure()
    for number, (name, peaks) in enumerate(traces):
        kept = int(peaks.argmin())
        axis.plot(peaks, color=COLOURS[number % len(COLOURS)], label=name, linewidth=1.6)
        marked = f"kept: step {kept}, {peaks[kept]:.3g}"
        axis.plot(kept, peaks[kept], "*", color=COLOURS[number % len(COLOURS)], markersize=15, label=marked)
    axis.set_xlabel("greedy step")
    axis.set_ylabel("max − min of the probe")
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


def error_figure(errors: Sequence[tuple[str, np.ndarray]], rows: str) -> Figure:
    """Histograms of what rounding the activation adds to the output of every row [N], relative to that output."""
    figure, axis = line_figure()
    positive = np.concatenate([each[each > 0] for _, each in errors])
    low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
    edges = np.geomspace(low * 0.98, high * 1.02, 48)
    for number, (name, values) in enumerate(errors):
        colour = COLOURS[1 - number]
        median = float(np.median(values))
        axis.hist(values, edges, color=colour, alpha=0.65, label=f"{name}: median {100 * median:.3g} %")
        axis.axvline(median, color=colour, linewidth=1.6, linestyle="--")
    axis.set_xscale("log")
    decades = [base * 10.0**power for power in range(-4, 5) for base in (1, 2, 5)]
    ticks = [each for each in decades if edges[0] <= each <= edges[-1]]
    axis.set_xticks(ticks, [f"{100 * each:g}" for each in ticks])
    axis.minorticks_off()
    axis.set_xlabel(f"‖error‖ / ‖output‖ of a {rows} (%, log scale)")
    axis.set_ylabel(f"{rows}s")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


def weights_figure(landscapes: Sequence[np.ndarray], stages: Sequence[dict], shape: Sequence[int]) -> Figure:
    """Heat maps of |weight| [outputs, channels] before and after smoothing and rotation, with a scale each."""
    figure = Figure(figsize=(8.8, 4.7), layout="constrained")
    axes = figure.subplots(1, len(landscapes), squeeze=False)[0]
    names = ("original", "smoothed and rotated")
    for axis, values, stage, name in zip(axes, landscapes, stages, names, strict=False):
        mesh = draw_map(axis, values, Normalize(0, values.max()), (0, shape[1], 0, shape[0]))
        axis.set_title(f"{name}\npeak {stage['peak']:.3g} at {stage['row']}, {stage['channel']}")
        axis.set_xlabel("input channel")
        figure.colorbar(mesh, ax=axis, label="|weight|, own scale")
    axes[0].set_ylabel("output channel")
    return figure


def pool_to(values: np.ndarray, most: tuple[int, int]) -> np.ndarray:
    """The largest entry of every bin, at most `most` bins along each axis of `values`."""
    for axis, (size, limit) in enumerate(zip(values.shape, most, strict=True)):
        values = np.maximum.reduceat(values, np.arange(0, size, max(1, -(-size // limit))), axis=axis)
    return values


def _few_ticks(count: int = 4) -> MaxNLocator:
    return MaxNLocator(count, integer=False, steps=[1, 2, 2.5, 5, 10])
