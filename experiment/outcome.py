"""What a run finds: the figures while it goes on, results.json, and the table at its end."""

import shlex
import sys
import time
from dataclasses import dataclass, field

from evaluation.task_plan import PAPER_TASKS
from experiment.evaluations import Evaluations
from experiment.measured import Measured
from experiment.options import BASELINES
from experiment.plan import Run
from quantize.config import QuantConfig, Transform
from quantize.footprint import memory_footprint
from utils import data
from utils.device import describe, peak_memory
from utils.distributed import is_main, world_size
from utils.io import write_json
from utils.results import format_table, plain, versions

MOST_TASK_COLUMNS = 3  # in the summary; the tasks' own table has all


@dataclass
class Outcome:
    """What a run has found so far: of its own model, of the full-precision one, and of the baselines in the table."""

    measured: Measured = field(default_factory=Measured)
    full: Measured = field(default_factory=Measured)
    baselines: dict[str, Measured] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    error: str | None = None

    def rows(self, quant: QuantConfig) -> list[tuple[str, Measured]]:
        """(title, figures) of everything that was measured, in the order of the table."""
        shown = [(BASELINES[name], self.baselines[name]) for name in BASELINES if name in self.baselines]
        return [*shown, (method_name(quant), self.measured)]

    def all_rows(self, quant: QuantConfig) -> list[tuple[str, Measured]]:
        """Those, and first the full-precision model if something was measured of it that the table does not show."""
        rows = self.rows(quant)
        return rows if "full" in self.baselines else [(BASELINES["full"], self.full), *rows]

    def failures(self, quant: QuantConfig) -> list[str]:
        """Every evaluation that failed, as `title: evaluation`."""
        return [f"{title}: {name}" for title, measured in self.all_rows(quant) for name in measured.failures]


def write_results(run: Run, outcome: Outcome) -> None:
    """Write results.json into the run's folder."""
    if not is_main():
        return
    tokens = run.setup.tokens
    samples = {} if tokens is None else {"nsamples": len(tokens)}
    resolved = {**samples, "seqlen": run.setup.seqlen, "net": run.setup.net}
    results = {
        "method": method_name(run.quant),
        "settings": {**vars(run.args), **resolved},
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "device": describe(run.setup.device),
        "dtype": str(run.setup.dtype).removeprefix("torch."),
        "processes": world_size(),
        "data": {} if tokens is None else {"calibration": data.data_fingerprint(tokens)},
        **outcome.measured.figures(),
        **peak_memory(run.setup.device),
        "model_layers": run.setup.layers,
        "memory": memory_footprint(run.setup.skeleton, run.setup.spec, run.quant),
        "layers": outcome.measured.layers,
        "full_precision": outcome.full.figures(),
        "baselines": {name: baseline.figures() for name, baseline in outcome.baselines.items()},
        "error": outcome.error,
    }
    results["seconds"]["total"] = time.perf_counter() - outcome.started
    write_json(run.folder / "results.json", plain(results))


def summary_table(run: Run, outcome: Outcome) -> str:
    """Figures and seconds of the baselines and of the run itself, as a Markdown table."""
    bits = run.quant.label.upper()
    columns = figure_columns(run, outcome)
    rows = [
        [title, "–" if title == BASELINES["full"] else bits, *(show(measured) for _, show in columns)]
        for title, measured in outcome.rows(run.quant)
    ]
    return format_table(["", "bits", *(name for name, _ in columns)], rows)


def completions_text(run: Run, outcome: Outcome) -> str:
    """Every prompt, and below it what each model wrote behind it."""
    rows = [(title, measured.completions) for title, measured in outcome.all_rows(run.quant)]
    width = max(len(title) for title, _ in rows)
    lines = []
    for prompt in run.evaluations.prompts:
        lines.append(f"“{prompt}”")
        written = [(title, found[prompt].strip().replace("\n", " ⏎ ")) for title, found in rows if prompt in found]
        lines += [f"    {title.ljust(width)}  {text}" for title, text in written]
    return "\n".join(lines)


def figure_columns(run: Run, outcome: Outcome) -> list[tuple]:
    """(heading, Measured → cell) of every column that has figures."""
    columns = []
    for label in run.evaluations.windows:
        columns.append((f"{label} ppl", lambda m, label=label: _number(m.perplexity.get(label), "perplexity")))
        if run.evaluations.divergence:
            columns.append((f"{label} KL", lambda m, label=label: _number(m.perplexity.get(label), "divergence")))
    columns += [(f"{task} acc", lambda m, task=task: _accuracy(m, task)) for task in shown_tasks(run.evaluations)]
    if run.evaluations.tasks is not None and set(PAPER_TASKS) <= set(run.evaluations.tasks.units):
        columns.append(("mean of six acc_norm", lambda m: _number(m.zero_shot and m.zero_shot.average, "acc_norm")))
    for number, shots in enumerate(run.evaluations.shots if run.evaluations.subjects else ()):
        columns.append(
            (f"MMLU {shots}-shot", lambda m, at=number: _number(dict(enumerate(m.mmlu)).get(at), "accuracy"))
        )
    if run.evaluations.conversations is not None and run.evaluations.conversations.endpoint is not None:
        columns.append(("MT-Bench", _score))
    columns.append(("quantize s", lambda m: _seconds(m, "quantize")))
    columns.append(("evaluate s", lambda m: _seconds(m, "perplexity", "zero-shot", "MMLU", "MT-Bench", "prompts")))
    return columns


def shown_tasks(evaluations: Evaluations) -> tuple[str, ...]:
    """The tasks with a column of their own: all, if they are few."""
    units = evaluations.tasks.units if evaluations.tasks is not None else ()
    return units if len(units) <= MOST_TASK_COLUMNS else ()


def _accuracy(measured: Measured, task: str) -> str:
    scores = measured.zero_shot.scores if measured.zero_shot is not None else ()
    found = [score.metrics["acc"] for score in scores if score.task == task and "acc" in score.metrics]
    return f"{found[0]:.3f}" if found else "–"


def _mmlu(measured: Measured, shots: int) -> str:
    return next((f"{result.accuracy:.3f}" for result in measured.mmlu if result.shots == shots), "–")


def _score(measured: Measured) -> str:
    average = (measured.mt_bench or {}).get("scores", {}).get("average")
    return "–" if average is None else f"{average:.2f}"


def _number(figures: object, name: str) -> str:
    value = getattr(figures, name, None)
    return "–" if value is None else f"{value:.3f}"


def _seconds(measured: Measured, *stages: str) -> str:
    spent = [measured.seconds[stage] for stage in stages if stage in measured.seconds]
    return f"{sum(spent):.1f}" if spent else "–"


def method_name(quant: QuantConfig) -> str:
    """What these settings are called in a table."""
    if quant.bits.untouched:
        return BASELINES["full"]
    if quant.transform is Transform.DUAL:
        return "DuQuant" if quant.smooth else "DuQuant without smoothing"
    return BASELINES["smooth" if quant.smooth else "rtn"]
