"""Experiment tracking (`--track`): what a run finds, in TensorBoard or Weights & Biases while it goes on.

Tracking looks on: it changes no figure, and a library that fails on the way costs the tracking, not the run. Neither is
imported unless it is asked for.
"""

import importlib
import logging
import math
from collections.abc import Callable
from pathlib import Path

from evaluation.base import Kind
from evaluation.figures import figures_of
from quantize.observer import Observer
from quantize.state import FinishedLayer
from utils.distributed import is_main
from utils.errors import InputError
from utils.packages import advice
from utils.tracking import Sink, TensorBoard, WandB, require_login

LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # package → what of it is imported
logger = logging.getLogger(__name__)


def layer_scalars(figures: dict) -> dict[str, float]:
    """The figures of a layer (`FinishedLayer.figures`) by tag, such as `layers/down/peak/rotation 1`.

    Peaks are of the probe at every stage, spreads of the peaks over blocks, SQNRs in dB. Only numbers that are finite;
    nothing for a layer of the paper's own checkpoint, which has no figures.
    """
    scalars: dict[str, object] = {"output_error": figures.get("output_error")}
    for group in figures.get("groups") or ():
        steps = iter(group["steps"])
        for stage in group["stages"]:
            scalars[f"{group['name']}/peak/{stage['name']}"] = stage["peak"]
            scalars[f"{group['name']}/spread/{stage['name']}"] = stage["spread"]
            if stage["name"].startswith("rotation"):
                scalars[f"{group['name']}/steps/{stage['name']}"] = next(steps)
    training = figures.get("training") or {}
    scalars |= {f"training/{name}": training.get(name) for name in ("loss_before", "loss_after", "restored")}
    scalars |= _recorded(figures.get("recorded") or {})
    return _finite({f"layers/{tag}": value for tag, value in scalars.items()})


def _recorded(recorded: dict) -> dict[str, object]:
    """What a report adds to a layer's figures: signal-to-noise ratios in dB."""
    ratios = {"sqnr_db/output": recorded.get("output_sqnr_db")}
    for part in recorded.get("unrounded") or ():
        ratios[f"sqnr_db/output, {part['part']} unrounded"] = part["output_sqnr_db"]
    for group in recorded.get("groups") or ():
        for name, noise in group["activation_noise"].items():
            ratios[f"{group['name']}/sqnr_db/activation, {name}"] = noise["sqnr_db"]
        ratios[f"{group['name']}/sqnr_db/weight"] = group["weight_sqnr_db"]
    return ratios


def final_scalars(figures: dict, part: str) -> dict[str, float]:
    """What was measured of a model (`Measured.figures()`) by tag, such as `<part>/test ppl`; and seconds by stage."""
    scalars = {name: each.value for name, each in figures_of(figures).items() if each.kind is not Kind.SECONDS}
    scalars |= {f"seconds/{stage}": spent for stage, spent in (figures.get("seconds") or {}).items()}
    return _finite({f"{part}/{name}": value for name, value in scalars.items()})


def _finite(values: dict[str, object]) -> dict[str, float]:
    """Those of `values` that are finite numbers."""
    return {
        tag: float(value) for tag, value in values.items() if isinstance(value, int | float) and math.isfinite(value)
    }


class Tracker(Observer):
    """What a run tells the library behind `sink`; without one, nothing. The run is what happens inside `with`.

    A run that ends in an exception counts as failed, and so does one whose `failed` was set.
    """

    def __init__(self, sink: Sink | None = None):
        self.sink, self.failed, self.broken = sink, False, False

    def layer_done(self, index: int, finished: FinishedLayer, restored: bool) -> None:
        """Track its figures."""
        self.layer(index, finished.figures)

    def layer(self, index: int, figures: dict) -> None:
        """Track the figures of layer `index`, and the loss of its training by epoch."""
        losses = (figures.get("training") or {}).get("losses") or ()
        curve = [_finite({f"lwc/layer_{index:03d}/loss": loss}) for loss in losses]
        self._tell(lambda sink: sink.scalars(layer_scalars(figures), "layer", index))
        for epoch, values in enumerate(curve):
            if values:
                self._tell(lambda sink, values=values, epoch=epoch: sink.scalars(values, "epoch", epoch))

    def figures(self, own: dict, full: dict | None = None) -> None:
        """Track the final figures (`Measured.figures()`): the model's own, and the full-precision one's."""
        values = final_scalars(own, "final") | final_scalars(full or {}, "full")
        self._tell(lambda sink: sink.final(values))

    def _tell(self, say: Callable[[Sink], None]) -> None:
        """Say something, unless that failed before."""
        if self.sink is None or self.broken:
            return
        try:
            say(self.sink)
        except Exception as error:
            self.broken = True
            logger.warning("tracking stopped, the run goes on: %s", _one_line(error))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.sink is None:
            return
        try:
            self.sink.close(self.failed or kind is not None)
        except Exception as error:
            if not self.broken:
                logger.warning("tracking: %s", _one_line(error))


def check_tracking(kind: str) -> None:
    """Raise InputError if what `--track kind` needs is not installed, or its server not to be reached."""
    if kind == "none" or not is_main():
        return
    try:
        importlib.import_module(LIBRARIES[kind])
    except ImportError:
        raise InputError(f"--track {kind} needs the package {kind}: {advice(kind)}") from None
    if kind == "wandb":
        require_login()


def open_tracker(
    kind: str, folder: Path, name: str, settings: dict, group: str | None = None, required: bool = True
) -> Tracker:
    """What tracks the run `name` with the library `kind`, or `none`; its files go into `folder`, which exists.

    `settings`: plain JSON values. A run in a `group` is one of several that share `folder`. Raises InputError if
    tracking cannot begin; unless it is `required`, that is a warning and nothing is tracked. Only the main process
    tracks.
    """
    if kind == "none" or not is_main():
        return Tracker()
    try:
        if kind == "tensorboard":
            return Tracker(TensorBoard(folder / "tensorboard", name if group else "", settings))
        return Tracker(WandB(folder, name, settings, group))
    except Exception as error:
        if required:
            raise
        logger.warning("%s is not tracked: %s", name, _one_line(error))
        return Tracker()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
