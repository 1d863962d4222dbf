"""The page: report/index.html, one file with everything in it, and its figures as PNG and SVG beside it."""

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path

import jinja2
import PIL.Image
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from reporting import drawing, tables
from reporting.run_data import read_run
from reporting.style import map_palette, styled
from utils.io import write_atomically
from utils.log import progress

PNG_DPI, WIDE_DPI = 110, 95
TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Image:
    """A drawn figure: its file name without ending, title and caption, and its content as a data URI."""

    name: str
    title: str
    caption: str
    source: str
    wide: bool


def write_report(folder: Path, layers: list[int] | None = None) -> Path:
    """Draw the run in `folder`, `layers` one by one (default: those with the largest error); return the page's path.

    Raises InputError if the run kept nothing to draw.
    """
    run = read_run(folder)
    shown = run.chosen(layers)
    figures_folder = folder / "report/figures"
    remove_old(figures_folder)
    with styled():
        scores = [save(each, figures_folder) for each in drawing.scores(run.results)]
        scores += [save(each, figures_folder) for each in drawing.sensitivity(run.results)]
        overview = [save(each, figures_folder) for each in drawing.overview(run.recorded)]
        details = []
        for layer in progress(shown, "drawing", unit="layer"):
            arrays = run.arrays(layer)
            groups = [
                (group, [save(each, figures_folder) for each in drawing.group(layer["layer"], group, arrays)])
                for group in layer["recorded"]["groups"]
            ]
            details.append((layer, groups))
    page = (
        environment()
        .get_template(TEMPLATE)
        .render(
            results=run.results,
            warnings=run.warnings,
            scores=scores,
            score_rows=tables.scores(run.results),
            worst=[(layer, tables.reason(layer)) for layer in run.worst()],
            overview=overview,
            details=details,
            recorded=run.recorded,
            tables=tables,
        )
    )
    path = folder / "report/index.html"
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def environment() -> jinja2.Environment:
    """Jinja, escaping everything, with the filters that write numbers."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    made.lstrip_blocks = True
    made.filters |= {"number": number, "percent": percent, "size": size, "duration": duration}
    return made


def number(value: float | None, form: str = ".3f") -> Markup:
    """A number of results.json as people read it, the exact one in the element's `value`; – where there is none."""
    return as_data(value, "–" if value is None else format(value, form))


def percent(value: float | None, form: str = ".1f") -> Markup:
    """A fraction, in per cent."""
    return as_data(value, "–" if value is None else f"{100 * value:{form}} %")


def size(value: float) -> Markup:
    """Bytes, in the unit that fits."""
    power = min(4, int(math.log2(value) // 10)) if value else 0
    return as_data(value, f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}")


def duration(value: float | None) -> Markup:
    """Seconds, or hours, minutes and seconds."""
    if value is None or value < 100:
        return as_data(value, "–" if value is None else f"{value:.1f} s")
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return as_data(value, f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s")


def as_data(value: float | None, text: str) -> Markup:
    """An HTML element that says `text` and means `value`."""
    return Markup(f"<span>{escape(text)}</span>" if value is None else f'<data value="{value!r}">{escape(text)}</data>')


def save(drawn: drawing.Drawing, folder: Path) -> Image:
    """Write a figure as PNG and SVG into `folder`; in the page, what is pixels anyway is a PNG."""
    dpi = WIDE_DPI if drawn.wide else PNG_DPI
    png = encoded(drawn.figure, "png", dpi)
    png = in_map_colours(png) if drawn.raster else png
    svg = encoded(drawn.figure, "svg", dpi)
    write_atomically(folder / f"{drawn.name}.png", lambda temporary: temporary.write_bytes(png))
    write_atomically(folder / f"{drawn.name}.svg", lambda temporary: temporary.write_bytes(svg))
    content, kind = (png, "image/png") if drawn.raster else (svg, "image/svg+xml")
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return Image(drawn.name, drawn.title, drawn.caption, source, drawn.wide)


def encoded(figure: Figure, kind: str, dpi: int) -> bytes:
    """The figure as a file's content; without a date, so that the same data gives the same file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def in_map_colours(png: bytes) -> bytes:
    """The same picture in the colours of the map and greys, which is all that a heat map has: a third of the size."""
    palette = PIL.Image.new("P", (1, 1))
    palette.putpalette(map_palette())
    picture = PIL.Image.open(io.BytesIO(png)).convert("RGB")
    smaller = io.BytesIO()
    picture.quantize(palette=palette, dither=PIL.Image.Dither.NONE).save(smaller, "png", optimize=True)
    return smaller.getvalue()


def remove_old(folder: Path) -> None:
    """Remove the figures of an earlier report of this run, which may be of other layers."""
    for ending in ("png", "svg"):
        for path in folder.glob(f"*.{ending}"):
            path.unlink()
