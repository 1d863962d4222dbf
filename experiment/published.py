"""Published figures beside those that were measured here: `assets/published.json`, and `compare.py RUN --published`.

An entry of the file says of which model, preset and settings its figures are, and in which table they stand. A run is
laid beside an entry where the model has the same name and the settings, but for the seed, decide the same layers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.base import FULL, Kind
from evaluation.figures import TableRow, show
from experiment.presets import PRESETS
from experiment.rows import ROWS, Row, SharedQuantSettings, full_title, plan_rows
from experiment.tables import Finished, read_results, show_spread, table_rows
from quantize.rotation_settings import Transform
from quantize.settings import QuantSettings
from utils.errors import InputError
from utils.results import format_table
from utils.setting_flags import from_flat
from utils.settings import Changes, defaults, flat

PUBLISHED = Path(__file__).resolve().parents[1] / "assets/published.json"
UNTOUCHED = {"wbits": 16, "abits": 16}
LWC = "_lwc"  # behind the name of a comparison's row whose clipping was trained
USUAL = {"nsamples": 128, "seqlen": 2048}  # what a run takes that is not told


@dataclass(frozen=True)
class Entry:
    """Figures of one model and method by the headings of our tables; accuracies in per cent, as papers print them.

    `method`: what decides the layers, as `method_of` gives it. `where`: the table. `protocol`: setting → value, on
    which text the source calibrates and measures.
    """

    model: str
    method: Mapping[str, Any]
    where: str
    figures: Mapping[str, float]
    protocol: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """A model that was measured here: its names, what decided its layers, its figures, and the settings of its run."""

    names: tuple[str, ...]
    method: Mapping[str, Any]
    title: str
    figures: TableRow
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """The file: its entries, and model → the names (small letters) that its folders have."""

    entries: tuple[Entry, ...]
    names: Mapping[str, Sequence[str]]

    def model(self, names: Sequence[str]) -> str | None:
        """The model that is known by one of `names`; None if the file has none."""
        said = {name.lower().replace("_", "-") for name in names}
        return next((model for model, known in self.names.items() if said & {model, *known}), None)


def method_of(quant: QuantSettings) -> dict[str, Any]:
    """What these settings decide for the model: equal where the models are, but for the seed."""
    if quant.bits.untouched:
        return dict(UNTOUCHED)
    idle = {"seed"}
    if not quant.transform.searches(quant.rotation.permutation_times):  # settings of the search do nothing then
        idle |= {*flat(quant.rotation), "probe", "probe_tokens"} - {"block_size"}
    if quant.transform is Transform.NONE:
        idle |= {"block_size"}
    return {name: value for name, value in flat(quant, Changes.MODEL).items() if name not in idle}


def read_published(path: Path = PUBLISHED) -> Published:
    """The file. Raises KeyError for a model, source or preset that is not known, ValueError for unknown settings."""
    content = json.loads(path.read_text(encoding="utf-8"))
    entries = []
    for each in content["entries"]:
        source = content["sources"][each["source"]]
        if each["preset"] == FULL:
            said = UNTOUCHED
        else:
            said = PRESETS[each["preset"]] | {name: each[name] for name in UNTOUCHED} | each.get("changes", {})
        method, where = method_of(from_flat(QuantSettings, said)), f"{each['table']}, {source['short']}"
        entries.append(Entry(each["model"], method, where, each["figures"], source["protocol"]))
    return Published(tuple(entries), content["names"])


def published_text(folders: Sequence[Path]) -> str:
    """What the runs and comparisons in `folders` measured beside what is published of the same, as Markdown.

    Raises InputError for a folder that holds neither.
    """
    published, rows, notes = read_published(), [], []
    for measured in (each for folder in folders for each in measured_in(folder)):
        model, name = published.model(measured.names), f"{measured.names[0]}, {measured.title}"
        same = [each for each in published.entries if (each.model, each.method) == (model, measured.method)]
        found = {entry.where: lines for entry in same if (lines := list(_beside(measured, entry)))}
        rows += [[name, *line] for lines in found.values() for line in lines]
        if model is None:
            notes.append(f"there are no published figures of a model called {measured.names[0]}; --net names a model")
        elif not found:
            notes.append(f"{name}: no published figures of this method and what was measured")
        notes += [f"{name}: {note}" for entry in same if entry.where in found for note in _deviations(measured, entry)]
    table = format_table(["", "figure", "here", "published", "difference", "where"], rows)
    notes = [f"Note: {note}." for note in dict.fromkeys(notes)]
    return "\n\n".join([*([table] if rows else ["Nothing to put beside."]), *notes]) + "\n"


def measured_in(folder: Path) -> list[Measured]:
    """The models that the run or comparison in `folder` measured. Raises InputError for a folder that holds neither."""
    results = read_results(folder)
    if "settings" not in results:
        raise InputError(f"{folder}: {results['error']}")
    settings = results["settings"]
    names = tuple(dict.fromkeys(filter(None, (settings.get("net"), Path(settings["model"]).name))))
    found = []
    try:
        for row, figures in _rows(results):
            title = row.full_title if row.name in ROWS else full_title(row.quant)
            [line] = table_rows([Finished(row, each) for each in figures])
            found.append(Measured(names, method_of(row.quant), title, line, settings))
    except (ValueError, KeyError) as error:
        raise InputError(f"{folder}: its settings are not those of this version ({error})") from None
    return found


def _rows(results: dict) -> Iterator[tuple[Row, list[dict]]]:
    """Every model of a results.json: what it is, and its figures, one for each seed."""
    said = results["settings"]
    if "rows" in results:
        shared = _quant(SharedQuantSettings, said)
        for name in dict.fromkeys(row["row"] for row in results["rows"]):
            base = name if name in ROWS else name.removesuffix(LWC)
            planned = plan_rows([base], shared.untrained, shared.training, [said["seed"]])
            [row] = [each for each in planned if each.name == name]
            yield row, [each for each in results["rows"] if each["row"] == name]
        return
    full = results.get("full_precision") or {}
    if any(full.get(part) for part in ("perplexity", "zero_shot", "mmlu")):
        yield Row(FULL, from_flat(QuantSettings, UNTOUCHED), None), [full]
    yield Row("run", _quant(QuantSettings, said), None), [results]


def _quant(cls: type, said: Mapping[str, Any]) -> Any:
    """The settings of the method among those of a run; what there was no setting for then has its default."""
    return from_flat(cls, {name: said[name] for name in defaults(cls) if name in said})


def _beside(measured: Measured, entry: Entry) -> Iterator[list[str]]:
    """Heading, ours, theirs, difference and table of every figure that both have."""
    for heading, spread in measured.figures.values.items():
        if heading in entry.figures:
            figure = spread.figure
            there = entry.figures[heading] / (1 if figure.kind is Kind.PERPLEXITY else 100)
            difference = f"{figure.value - there:+.{figure.decimals}f}"
            yield [heading, show_spread(spread), show(replace(figure, value=there)), difference, entry.where]


def _deviations(measured: Measured, entry: Entry) -> Iterator[str]:
    """How the texts differ that it was measured on here and there."""
    matters = ("seqlen", "limit") if measured.method == UNTOUCHED else tuple(entry.protocol)
    for name in matters:
        here, there = measured.settings.get(name), entry.protocol[name]
        here = USUAL.get(name) if here is None else here
        if str(here).partition("=")[0] != str(there):
            shown = (f"--{name} {value if value is not None else 'all'}" for value in (here, there))
            yield "{} here, {} in {}".format(*shown, entry.where)
