"""What a run left in its folder, read and checked, and what is missing of it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.io import file_digest, read_tensors

MOST_DRAWN = 5  # layers, unless --report_layers says which
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class RunData:
    """results.json of a run, the folder it is in, and what the page must warn about."""

    folder: Path
    results: dict
    warnings: tuple[str, ...]

    @property
    def layers(self) -> list[dict]:
        """Figures of the layers that were quantized, in order."""
        return self.results["layers"]

    @property
    def recorded(self) -> list[dict]:
        """Those with figures for the report whose file is there and is this run's."""
        return [layer for layer in self.layers if is_recorded(self.folder, layer)]

    def arrays(self, layer: dict) -> Arrays:
        """What was recorded of one layer, by name; see `quantize.record`."""
        tensors, _ = read_tensors(record_path(self.folder, layer))
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}

    def worst(self, count: int = MOST_DRAWN) -> list[dict]:
        """The layers with the largest output error on the calibration sample, worst first."""
        return sorted(self.recorded, key=layer_error, reverse=True)[:count]

    def chosen(self, numbers: list[int] | None) -> list[dict]:
        """The layers to draw. Raises InputError for one that has no figures."""
        if numbers is None:
            return sorted(self.worst(), key=lambda layer: layer["layer"])
        by_number = {layer["layer"]: layer for layer in self.recorded}
        for number in numbers:
            if number not in by_number:
                there = ", ".join(map(str, by_number))
                raise InputError(f"--report_layers {number}: {self.folder} has figures of the layers {there}")
        return [by_number[number] for number in numbers]


def read_run(folder: Path) -> RunData:
    """Read the run in `folder`. Raises InputError, saying what to do, if there is nothing to draw from."""
    path = folder / "results.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that main.py wrote, like output/tiny-llama_w4a4")
    if not path.exists():
        data = folder / "report/data"
        killed = "the run was stopped before it could write it; go on with --resume, or run it again"
        raise InputError(f"{path}: not there; {killed if data.is_dir() else 'is this the folder of a run of main.py?'}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        layers = results["layers"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a results.json of main.py") from None
    if not any(layer.get("recorded") for layer in layers):
        raise InputError(f"{folder}: {why_nothing(results)}")
    run = RunData(folder, results, tuple(warnings_of(folder, results)))
    if not run.recorded:
        raise InputError(
            f"{folder}/report/data: what the run recorded is not there (another --output_dir?) or was written over; "
            "run it again with --report"
        )
    return run


def why_nothing(results: dict) -> str:
    """Why no layer of a run has figures, and what to do."""
    if results.get("error") and not results["layers"]:
        return f"the run ended early ({results['error']}) and finished no layer; run it again, with --report"
    if results.get("settings", {}).get("report"):
        return "all layers are from a checkpoint that was made without --report; run it again without --resume"
    return "this run kept nothing to draw; main.py --report collects it, run it again with that flag"


def warnings_of(folder: Path, results: dict) -> list[str]:
    """In what this run is not whole, or its full-precision model not well, a sentence each."""
    notes, layers = [], results["layers"]
    checks = results.get("full_precision", {}).get("bos_check", {}).values()
    notes += [f"{check['warning']}." for check in checks if check["warning"]]
    if results.get("error"):
        notes.append(f"This run ended early or in part: {results['error']}.")
    if len(layers) < results.get("model_layers", len(layers)):
        notes.append(f"Half-finished: {len(layers)} of the model's {results['model_layers']} layers are quantized.")
    without = [layer["layer"] for layer in layers if not layer.get("recorded")]
    if without:
        notes.append(f"No figures of layers {numbers(without)}: they were computed by a run without --report.")
    lost = [each["layer"] for each in layers if each.get("recorded") and not is_recorded(folder, each)]
    if lost:
        notes.append(f"No figures of layers {numbers(lost)}: their files in report/data are missing or of another run.")
    return notes


def numbers(layers: list[int]) -> str:
    """Layer numbers as text."""
    return ", ".join(map(str, layers))


def layer_error(layer: dict) -> float:
    """The layer's relative output error on the calibration sample; infinite if it is not a number."""
    error = layer["recorded"]["output_error"]
    return float("inf") if error is None else error


def record_path(folder: Path, layer: dict) -> Path:
    """Where the recorded tensors of a layer are."""
    return folder / "report/data" / Path(layer["recorded"]["file"]).name


def is_recorded(folder: Path, layer: dict) -> bool:
    """Whether a layer has figures, and the file they name is there and unaltered."""
    record = layer.get("recorded")
    if not record:
        return False
    path = record_path(folder, layer)
    return path.exists() and file_digest(path) == record["sha256"]
