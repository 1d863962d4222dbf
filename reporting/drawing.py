"""Which figures a report has: each with its name, and a caption that says how to read it."""

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure

from reporting import figures
from reporting import overview as over
from reporting.run_data import Arrays
from reporting.tables import accuracies, group_names, perplexities, standard_errors

ROLES = {"weight": "weights", "input": "inputs", "query": "q", "key": "k", "value": "v"}
MOST_NARROW = 3  # datasets or tasks whose bars fit into half of the page


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name, title and caption. `raster`: pixels in the page; `wide`: over its whole width."""

    name: str
    title: str
    caption: str
    figure: Figure
    raster: bool = False
    wide: bool = False


def scores(results: dict) -> Iterator[Drawing]:
    """Perplexity and accuracy against full precision, as far as they were measured."""
    rows, labels = perplexities(results)
    if labels:
        yield Drawing(
            "perplexity",
            "Perplexity",
            "exp of the mean loss per token on the test text. Lower is better.",
            over.bars_figure(rows, labels, "perplexity", may_be_log=True),
            wide=len(labels) > MOST_NARROW,
        )
    rows, labels = accuracies(results)
    if labels:
        yield Drawing(
            "accuracy",
            "Task accuracy",
            "Fraction of questions answered correctly (acc_norm where a task has it), ± standard error: what is apart "
            "by less may be chance. Higher is better.",
            over.bars_figure(rows, labels, "accuracy", errors=standard_errors(results)),
            wide=len(labels) > MOST_NARROW,
        )


def sensitivity(results: dict) -> Iterator[Drawing]:
    """What each part of the model costs, if it was measured."""
    measured = results.get("sensitivity")
    if not measured:
        return
    panels = [
        ("roles", [ROLES[role] for role in measured["roles"]], list(measured["roles"].values())),
        ("groups", list(measured["groups"]), list(measured["groups"].values())),
        ("layers", [str(each["layer"]) for each in measured["layers"]], measured["layers"]),
    ]
    yield Drawing(
        "sensitivity",
        "Where the gap is",
        "Each part of the model left at 16 bits in turn, everything else quantized: all tensors of one role, weights "
        "and inputs of one group of linears in all layers, everything in one layer. Bars: how much of the gap in log "
        f"perplexity to full precision is gone then; dots: of the KL divergence. On {measured['windows']} windows of "
        f"{measured['dataset']}: the fewer tokens, the more of it is chance. Shares need not "
        "add up.",
        over.sensitivity_figure([each for each in panels if each[1]]),
        wide=True,
    )


def overview_names(layers: list[dict]) -> list[str]:
    """The groups that any of the layers has, in forward order."""
    return group_names(layers)


def overview(layers: list[dict]) -> Iterator[Drawing]:
    """Figures over all layers that were recorded."""
    names = overview_names(layers)
    yield Drawing(
        "layers_output_error",
        "Error of each layer's output",
        "‖ŷ − y‖ / ‖y‖: how far the quantized layer's output is from the full-precision one on the same input. On "
        "the probe that the transforms were searched on, and on a real calibration sample; much more on the sample "
        "than on the probe would mean that the search has fitted the probe.",
        over.output_error_figure(layers),
    )
    groups = [group for layer in layers for group in layer["recorded"]["groups"]]
    if any(over.NOISE["activations"](group) is not None for group in groups):
        yield Drawing(
            "layers_activation_noise",
            "Signal to noise of the rounded activations",
            "Per group of linears that read the same activation: energy of their output over the energy that "
            "rounding their input adds to it. 6 dB are one bit. The dotted line is the whole layer, residual stream "
            "included, with all of its noise.",
            over.noise_figure(layers, names, "activations"),
        )
    if any(over.NOISE["weights"](group) is not None for group in groups):
        yield Drawing(
            "layers_weight_noise",
            "Signal to noise of the rounded weights",
            "Energy of the transformed weights of a group over the energy of their rounding errors, clipping included.",
            over.noise_figure(layers, names, "weights"),
        )
    yield Drawing(
        "layers_peak",
        "Largest activation of each group",
        "On the calibration sample, before anything was done (filled) and after the whole transform (open, dashed). "
        "What lies between is what smoothing and rotations took away.",
        over.group_figure(layers, names, "peak |activation| (log scale)", *_ends("peak"), log=True),
    )
    yield Drawing(
        "layers_peak_to_median",
        "Peak to median of each group",
        "The largest |activation| over the median one, before (filled) and after (open, dashed): how much of the "
        "range an ordinary value can use. Gaussian noise of the same size has 6 to 8.",
        over.group_figure(layers, names, "peak / median |activation| (log scale)", *_ends("peak_to_median"), log=True),
    )
    if any(group["clip"] for group in groups):
        yield Drawing(
            "layers_clipping",
            "Learned clipping of weights",
            "The factor on both ends of each weight range after training: median and middle half of a group's ranges. "
            "The dashed line is where all of them started; a layer that training does not improve goes back there.",
            over.clipping_figure(layers, names),
        )
    trained = [layer for layer in layers if (layer["training"] or {}).get("losses")]
    if trained:
        yield Drawing(
            "layers_clipping_loss",
            "Loss while the clipping is learned",
            "Mean squared error of the quantized layer's output against full precision, over that before training.",
            over.loss_figure(trained),
        )


def _ends(name: str) -> tuple[over.Lookup, over.Lookup]:
    return lambda group: group["stages"][0][name], lambda group: group["stages"][-1][name]


def group(layer: int, record: dict, arrays: Arrays) -> Iterator[Drawing]:
    """Figures of one input group of one layer, from its recorded figures and arrays."""
    name, prefix, label = record["name"], f"layer_{layer}_{record['name']}", f"layer {layer}, {record['name']}"
    landscapes = [arrays[f"{name}/input/{stage['name']}"] for stage in record["stages"]]
    yield Drawing(
        f"{prefix}_landscape",
        f"Activation landscape, {label}",
        f"|activation| over channels × {record['rows']}s of one calibration sample, stage by stage; every cell "
        "shows the largest entry of the neighbours it stands for (max-pooled). The original has its own scale, the "
        "later stages share one: a flat, even surface uses the quantization grid well, a spike wastes it.",
        figures.landscape_figure(record, landscapes, record["stages"]),
        raster=True,
        wide=len(landscapes) > 2,
    )
    if f"{name}/blocks/permutation 1" in arrays:
        yield Drawing(
            f"{prefix}_blocks",
            f"Blocks before and after the zigzag permutation, {label}",
            "A rotation evens out channels inside a block of channels; the zigzag deals large channels evenly to the "
            "blocks. It is made from the probe, and shown on the sample: the means should come level, the largest "
            "entries need not.",
            figures.blocks_figure(arrays[f"{name}/blocks/rotation 1"], arrays[f"{name}/blocks/permutation 1"]),
        )
    traces = sorted((key.rsplit("/", 1)[1], values) for key, values in arrays.items() if f"{name}/search/" in key)
    if any(len(values) > 1 for _, values in traces):
        yield Drawing(
            f"{prefix}_search",
            f"Greedy search, {label}",
            "Every step rotates the channel with the largest entry of its block into the others. max − min of the "
            "probe falls at first and then wanders; the steps up to its lowest point (star) are kept.",
            figures.search_figure(traces),
        )
    noise = [(each, arrays[f"{name}/error/{each}"]) for each in ("original", "transformed")]
    if any(values.any() for _, values in noise):
        yield Drawing(
            f"{prefix}_error",
            f"Error of each {record['rows']}, {label}",
            f"What rounding the activation adds to the output of {record['linear']}: if the activation were rounded as "
            "it was, and as it is rounded after the transform. Further left is better; 100 % means that nothing of the "
            "output is left.",
            figures.error_figure(noise, record["rows"]),
        )
    weights = [arrays[f"{name}/weight/{stage}"] for stage in ("original", "transformed")]
    yield Drawing(
        f"{prefix}_weight",
        f"Weight of {record['linear']}, {label}",
        "|weight| over output × input channels (max-pooled), before, and as it is when it is rounded: smoothing "
        "multiplies the channels that it divides in the activation, and rotations turn both alike.",
        figures.weights_figure(weights, record["weight_stages"], record["weight_shape"]),
        raster=True,
    )
