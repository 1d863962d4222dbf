"""The words and rows of the page, all from results.json."""

from collections.abc import Iterable, Iterator

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
    return _rows(results, lambda found: dict(found.get("perplexity") or {}))


def accuracies(results: dict) -> tuple[Rows, list[str]]:
    """Accuracy by way and task, MMLU included; of a task with acc_norm, that."""
    return _rows(results, accuracies_of)


def accuracies_of(found: dict) -> dict[str, float]:
    """Accuracy by task of one way to run the model."""
    scores = {task: metrics[name] for task, metrics, name in _metrics(found)}
    for shots, mmlu in (found.get("mmlu") or {}).items():
        scores[f"MMLU {shots.replace('_', '-')}"] = mmlu["accuracy"]
    return scores


def standard_errors(results: dict) -> dict[str, dict[str, float]]:
    """Standard errors of the accuracies, by title and task, of all `ways`; tasks that have none are left out."""
    return {
        title: {
            task: metrics[f"{name}_stderr"] for task, metrics, name in _metrics(found) if f"{name}_stderr" in metrics
        }
        for title, found in ways(results)
    }


def _metrics(found: dict) -> Iterator[tuple[str, dict[str, float], str]]:
    """Of every task its metrics, and the name of the one that is shown."""
    for score in (found.get("zero_shot") or {}).get("scores", []):
        shown = next((name for name in ("acc_norm", "acc", "exact_match") if name in score["metrics"]), None)
        if shown is not None:
            yield score["task"], score["metrics"], shown


def scores(results: dict) -> list[tuple[str, str, float, float | None]]:
    """(kind, dataset or task, the run's value, full precision's) of everything that was measured."""
    found = []
    for kind, look in (("perplexity", perplexities), ("accuracy", accuracies)):
        rows, labels = look(results)
        own, full = rows[-1][1] if labels else [], dict(rows).get("full precision")
        found += [
            (kind, label, own[number], full[number] if full else None)
            for number, label in enumerate(labels)
            if own[number] is not None
        ]
    return found


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


def _rows(results: dict, look) -> tuple[Rows, list[str]]:
    found = [(title, look(figures)) for title, figures in ways(results)]
    labels = list(dict.fromkeys(label for _, values in found for label in values))
    return [(title, [values.get(label) for label in labels]) for title, values in found if values], labels
