"""What a run finds: the figures while it goes on, results.json, and the table at its end."""

import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from evaluation.perplexity import Perplexity
from options import BASELINES
from quantize.config import QuantConfig, Transform
from session import Run
from utils import data
from utils.device import describe, peak_memory
from utils.io import write_json
from utils.results import format_table, plain, versions


@dataclass
class Measured:
    """Figures of one way to run the model: perplexity by dataset label, wall seconds by stage, figures per layer."""

    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)

    @contextmanager
    def timing(self, stage: str):
        """Add the wall time of the block to `seconds[stage]`."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


@dataclass
class Outcome:
    """What a run has found so far."""

    measured: Measured = field(default_factory=Measured)
    baselines: dict[str, Measured] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    error: str | None = None


def write_results(run: Run, outcome: Outcome) -> None:
    """Write results.json into the run's folder."""
    tokens = run.setup.tokens
    samples = {} if tokens is None else {"nsamples": len(tokens)}
    resolved = {**samples, "seqlen": run.setup.seqlen, "net": run.setup.net}
    results = {
        "settings": {**vars(run.args), **resolved},
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "device": describe(run.setup.device),
        "dtype": str(run.setup.dtype).removeprefix("torch."),
        "data": {} if tokens is None else {"calibration": data.data_fingerprint(tokens)},
        **_figures(outcome.measured),
        **peak_memory(run.setup.device),
        "layers": outcome.measured.layers,
        "baselines": {name: _figures(baseline) for name, baseline in outcome.baselines.items()},
        "error": outcome.error,
    }
    results["seconds"]["total"] = time.perf_counter() - outcome.started
    write_json(run.folder / "results.json", plain(results))


def _figures(measured: Measured) -> dict:
    return {
        "perplexity": {label: result.perplexity for label, result in measured.perplexity.items()},
        "perplexity_details": {label: asdict(result) for label, result in measured.perplexity.items()},
        "seconds": dict(measured.seconds),
    }


def summary_table(run: Run, measured: Measured, baselines: dict[str, Measured]) -> str:
    """Perplexity and seconds of the baselines and of the run itself, as a Markdown table."""
    bits = run.quant.label.upper()
    rows = [
        (BASELINES[name], "–" if name == "full" else bits, baselines[name]) for name in BASELINES if name in baselines
    ]
    rows.append((method_name(run.quant), bits, measured))
    header = ["", "bits", *(f"{label} ppl" for label in run.tests), "quantize s", "evaluate s"]
    return format_table(header, [_table_row(title, bits, figures, run.tests) for title, bits, figures in rows])


def method_name(quant: QuantConfig) -> str:
    """What these settings are called in a table."""
    if quant.bits.untouched:
        return BASELINES["full"]
    if quant.transform is Transform.DUAL:
        return "DuQuant" if quant.smooth else "DuQuant without smoothing"
    return BASELINES["smooth" if quant.smooth else "rtn"]


def _table_row(title: str, bits: str, measured: Measured, labels: Iterable[str]) -> list[str]:
    quantized = f"{measured.seconds['quantize']:.1f}" if "quantize" in measured.seconds else "–"
    values = [f"{measured.perplexity[label].perplexity:.3f}" for label in labels]
    return [title, bits, *values, quantized, f"{measured.seconds['perplexity']:.1f}"]
