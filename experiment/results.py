"""What a run finds: the figures while it goes on, results.json, and the table at its end."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from evaluation.base import Kind
from evaluation.figures import figures_of, headings, show
from evaluation.measured import Measured
from experiment.prepare import Prepared
from experiment.rows import FULL_TITLE, full_title, method_name
from experiment.setup import Setup
from models.card import export_card, model_card, write_card
from quantize.settings import QuantSettings
from quantize.sizes import memory_footprint
from utils import data
from utils.device import describe, peak_memory
from utils.distributed import is_main, world_size
from utils.io import write_json
from utils.results import format_table, plain, versions
from utils.settings import defaults, flat


@dataclass
class Outcome:
    """What a run has found so far: of its own model, and what it needed of the full-precision one."""

    measured: Measured = field(default_factory=Measured)
    full: Measured = field(default_factory=Measured)
    started: float = field(default_factory=time.perf_counter)
    error: str | None = None

    def rows(self, quant: QuantSettings) -> list[tuple[str, Measured]]:
        """(title, figures) of both models."""
        return [(FULL_TITLE, self.full), (method_name(quant), self.measured)]

    def stages(self) -> list[str]:
        """The stages that took time, in order."""
        return list(dict.fromkeys([*self.measured.seconds, *self.full.seconds]))

    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def failures(self, quant: QuantSettings) -> list[str]:
        """Every evaluation that failed, as `title: evaluation`."""
        return [f"{title}: {name}" for title, measured in self.rows(quant) for name in measured.failures]


def write_results(prepared: Prepared, outcome: Outcome) -> None:
    """Write results.json into the run's folder."""
    if not is_main():
        return
    tokens = prepared.setup.tokens
    results = {
        "method": method_name(prepared.quant),
        "settings": run_settings(prepared),
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "device": describe(prepared.setup.device),
        "dtype": str(prepared.setup.dtype).removeprefix("torch."),
        "processes": world_size(),
        "streamed": prepared.shards is not None,
        "data": {} if tokens is None else {"calibration": data.data_fingerprint(tokens)},
        **outcome.measured.figures(),
        **peak_memory(prepared.setup.device),
        "model_layers": prepared.setup.layers,
        "memory": memory_footprint(prepared.setup.skeleton, prepared.setup.spec, prepared.quant),
        "layers": outcome.measured.layers,
        "full_precision": outcome.full.figures(),
        "error": outcome.error,
    }
    results["seconds"]["total"] = outcome.spent()
    write_json(prepared.folder / "results.json", plain(results))


def write_model_card(prepared: Prepared, outcome: Outcome) -> None:
    """Write the cards of the models that were saved and exported, if any, with what was measured so far."""
    output, quant = prepared.settings.output, prepared.quant
    if (output.save_model is None and output.export is None) or not is_main():
        return
    full = outcome.full.results["perplexity"]
    perplexities = {name: (full.get(name), own) for name, own in outcome.measured.results["perplexity"].items()}
    made = (shlex.join(["python", *sys.argv]), perplexities)
    what = (prepared.setup.source.name, full_title(quant), quant.label, quant.scheme, *made)
    if output.save_model is not None:
        write_card(output.save_model, model_card(*what))
    if output.export is not None:
        write_card(output.export, export_card(*what, flat(quant)), "--export")


def run_settings(prepared: Prepared) -> dict:
    """Every setting of a run; of a model that is quantized already those it was made with."""
    return settings_dict(replace(prepared.settings, quant=prepared.quant), prepared.setup)


def settings_dict(settings: object, setup: Setup) -> dict:
    """Every setting by name, with what was resolved of those that may be left out; idle ones have their default."""
    samples = {} if setup.tokens is None else {"nsamples": len(setup.tokens)}
    resolved = {**samples, "seqlen": setup.seqlen, "add_bos": setup.adds_bos, "net": setup.net}
    return {**defaults(type(settings)), **flat(settings), **resolved}


def summary_table(prepared: Prepared, outcome: Outcome) -> str:
    """Every figure and the seconds of the run, as Markdown; beside the full-precision model's where it was measured.

    Empty where nothing that was measured is a figure.
    """
    measurements = {FULL_TITLE: outcome.full} | {full_title(prepared.quant): outcome.measured}
    columns = {title: figures_of(measured.figures()) for title, measured in measurements.items()}
    columns = {title: each for title, each in columns.items() if any(f.kind is not Kind.SECONDS for f in each.values())}
    if not columns:
        return ""
    rows = [[each, *(show(column.get(each)) for column in columns.values())] for each in headings(columns.values())]
    return format_table(["", *columns], rows)


def completions_text(prompts: Sequence[str], rows: Sequence[tuple[str, dict[str, str]]]) -> str:
    """Every prompt, and below it what each model (title, completions) wrote behind it."""
    width = max(len(title) for title, _ in rows)
    lines = []
    for prompt in prompts:
        lines.append(f"“{prompt}”")
        written = [(title, texts[prompt].strip().replace("\n", " ⏎ ")) for title, texts in rows if prompt in texts]
        lines += [f"    {title.ljust(width)}  {text}" for title, text in written]
    return "\n".join(lines)
