"""The words and rows of the page, all from results.json."""

from collections.abc import Iterable
from math import isnan

from evaluation.base import Figure, Kind
from evaluation.figures import figures_of

NOT_MEASURED = "not measured; compare.py puts both side by side"
HALF_THE_NOISE = 3.01  # dB
Rows = list[tuple[str, list[float | None]]]


def ways(results: dict) -> list[tuple[str, dict]]:
    """(title, figures) of full precision and of the run itself."""
    full = results.get("full_precision") or {}
    return [("full precision", full), (f"{results['method']} {bits(results)}", results)]


def bits(results: dict) -> str:
    """Bits of weights and activations, as in W4A4."""
    return f"W{results['settings']['wbits']}A{results['settings']['abits']}"


def perplexities(results: dict) -> tuple[Rows, list[str]]:
    """Perplexity by way and dataset; ways without any are left out."""
    return _rows(results, Kind.PERPLEXITY)


def accuracies(results: dict) -> tuple[Rows, list[str]]:
    """Accuracy by way and task, MMLU included; of a task the metric that it is published with."""
    return _rows(results, Kind.ACCURACY)


def standard_errors(results: dict) -> dict[str, dict[str, float]]:
    """Standard errors of the accuracies, by title and task, of all `ways`; tasks that have none are left out."""
    return {
        title: {each.label: each.error for each in _figures(way, Kind.ACCURACY) if each.error is not None}
        for title, way in ways(results)
    }


def scores(results: dict) -> list[tuple[str, str, float, float | None]]:
    """(kind, dataset or task, the run's value, full precision's) of everything that was measured."""
    pairs = []
    for kind, look in (("perplexity", perplexities), ("accuracy", accuracies)):
        rows, labels = look(results)
        own, full = rows[-1][1] if labels else [], dict(rows).get("full precision")
        pairs += [
            (kind, label, own[number], full[number] if full else None)
            for number, label in enumerate(labels)
            if own[number] is not None
        ]
    return pairs


def group_names(layers: Iterable[dict]) -> list[str]:
    """The groups that any of the recorded layers has, in forward order."""
    return list(dict.fromkeys(group["name"] for layer in layers for group in layer["recorded"]["groups"]))


def reason(layer: dict) -> dict:
    """What is to blame for a layer's error.

    `part`: of its activations, the one without whose rounding the output would be best; `group`: whose input that is
    (None: it is q, k and v); `all`: the same without rounding any activation, so that only the weights' noise is left;
    `weights`: whether that is more than half of the noise.
    """
    *parts, everything = layer["recorded"]["unrounded"]
    part = max(parts, key=lambda each: _decibels(each["output_sqnr_db"]))
    group = next((each for each in layer["recorded"]["groups"] if part["part"] == f"inputs of {each['name']}"), None)
    gain = _decibels(everything["output_sqnr_db"]) - _decibels(layer["recorded"]["output_sqnr_db"])
    return {"part": part, "group": group, "all": everything, "weights": gain < HALF_THE_NOISE}


def _decibels(value: float | None) -> float:
    return float("inf") if value is None else value  # None: no noise at all


def _figures(way: dict, kind: Kind) -> list[Figure]:
    """What a compact table shows of one way, of one kind."""
    return [each for each in figures_of(way, compact=True).values() if each.kind is kind]


def _rows(results: dict, kind: Kind) -> tuple[Rows, list[str]]:
    rows = [
        (title, {each.label: None if isnan(each.value) else each.value for each in _figures(way, kind)})
        for title, way in ways(results)
    ]
    labels = list(dict.fromkeys(label for _, values in rows for label in values))
    return [(title, [values.get(label) for label in labels]) for title, values in rows if values], labels
