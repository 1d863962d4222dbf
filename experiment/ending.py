"""The last lines of a run: what it cost, where it is, and what can be done next."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

FIRST = ("load", "read", "statistics", "quantize")  # then what was measured
WITHIN = ("search", "placing")  # stages that are parts of others


def cost(seconds: Mapping[str, float], total: float, peaks: Mapping[str, int]) -> str:
    """`took 27 s (load 0.5, quantize 5, evaluate 21), at most 1.2 GB of memory`.

    Seconds by stage in order; `peaks`: bytes, as `utils.device.peak_memory` has them.
    """
    order = sorted(seconds, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    stages = [f"{name} {_short(seconds[name])}" for name in order if name not in WITHIN and seconds[name] >= 0.05]
    device, host = peaks["peak_memory_bytes"], peaks["peak_host_memory_bytes"]
    of_gpu = f"{device / 1e9:.1f} GB of the GPU and " if device != host else ""
    detail = f" ({', '.join(stages)})" if stages else ""
    return f"took {_short(total)} s{detail}, at most {of_gpu}{host / 1e9:.1f} GB of the host's memory"


def place(folder: Path, names: Sequence[str]) -> str:
    """The folder, and those of the files called `names` that are in it."""
    there = [name for name in names if (folder / name).exists()]
    return f"results: {folder} ({', '.join(there)})"


def next_steps(folder: Path, saved: Path | None, can_save: bool, reported: bool, can_report: bool) -> str:
    """What is worth doing behind a run in `folder`; `saved`: the quantized model that it wrote or was given."""
    steps = []
    if saved is not None:
        steps.append(f"let the model write: python -m duquant {shlex.quote(str(saved))} --prompt TEXT")
    elif can_save:
        steps.append("keep the model: add --save_model DIR")
    if reported:
        steps.append(f"look at {folder / 'report/index.html'}")
    elif can_report:
        steps.append("look into the layers: add --report")
    steps.append(f"put it beside another: python compare.py {shlex.quote(str(folder))} OTHER_RUN")
    return f"next: {'; '.join(steps)}"


def _short(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"
