"""The report: drawn from the run's data, whole in one file, in a real browser, and honest about what is missing."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import run_script
from script_cases import the_run

from reporting import tables
from reporting.run_data import read_run
from utils.errors import InputError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SHOWN = 1  # the layer that is drawn


def common(model_folder, token_file) -> tuple:
    data = ("--calib_dataset", token_file, "--test_dataset", token_file, "--net", "tiny")
    tiny = ("--block_size", 16, "--max_rotation_step", 20, "--wbits", 4, "--abits", 4, "--eval_ppl")
    return "--model", model_folder, *data, *tiny


@pytest.fixture(scope="module")
def reported(model_folder, token_file, tmp_path_factory):
    """The folder of a run with everything that has a figure."""
    folder = tmp_path_factory.mktemp("run")
    flags = ("--smooth", "--lwc", "--epochs", 2, "--report", "--report_layers", SHOWN)
    done = run_script("main.py", *common(model_folder, token_file), *flags, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "report: " in done.stdout
    return the_run(folder / "output")


@pytest.fixture(scope="module")
def results(reported):
    return json.loads((reported / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(reported):
    return (reported / "report/index.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element's name and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_but_itself(page):
    for tag, attributes in Elements(page).found:
        for name in ("src", "href", "action", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value[:60])
    assert "@import" not in page
    assert "url(" not in page.partition("</style>")[0]


def test_every_picture_of_the_page_is_a_file_beside_it_as_png_and_svg(page, reported):
    names = re.findall(r"figures/([\w]+)\.png", page)
    images = [attributes for tag, attributes in Elements(page).found if tag == "img"]
    assert len(names) == len(images) == len(set(names))
    files = {path.name for path in (reported / "report/figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    contents = {path.read_bytes() for path in (reported / "report/figures").iterdir()}
    for image in images:
        assert base64.b64decode(image["src"].partition("base64,")[2]) in contents
        assert len(image["alt"]) > 40


def test_every_figure_that_was_asked_for_is_there(page):
    for name in ("landscape", "blocks", "search", "error", "weight"):
        for group in ("qkv", "o", "gate_up", "down"):
            assert f"figures/layer_{SHOWN}_{group}_{name}.png" in page
    for name in ("output_error", "activation_noise", "weight_noise", "peak", "peak_to_median", "clipping"):
        assert f"figures/layers_{name}.png" in page
    assert "figures/layers_clipping_loss.png" in page
    assert "figures/perplexity.png" in page
    assert "figures/layer_0_" not in page


def flat(value) -> set[float]:
    """Every number in a structure of JSON."""
    if isinstance(value, dict):
        return set().union(*(flat(item) for item in value.values())) if value else set()
    if isinstance(value, list):
        return set().union(*(flat(item) for item in value)) if value else set()
    return {float(value)} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()


def test_every_number_of_the_page_is_in_results_json(page, results):
    shown = [float(attributes["value"]) for tag, attributes in Elements(page).found if tag == "data"]
    assert len(shown) > 100
    assert set(shown) <= flat(results)


def test_the_page_opens_with_what_a_reader_wants_first(page, results):
    opening = page.partition('id="worst"')[0]
    for value in (
        results["perplexity"]["tokens"],
        results["full_precision"]["perplexity"]["tokens"],
        results["memory"]["quantized_bytes"],
        results["memory"]["float16_bytes"],
        results["seconds"]["total"],
        results["peak_memory_bytes"],
    ):
        assert f'<data value="{value!r}">' in opening
    assert "tiny, DuQuant + LWC W4A4" in opening
    assert results["command"] in opening


def test_the_worst_layers_come_first_and_name_the_part_that_costs_most(results, reported):
    worst = read_run(reported).worst()
    errors = [layer["recorded"]["output_error"] for layer in worst]
    assert errors == sorted(errors, reverse=True)
    reason = tables.reason(worst[0])
    parts = worst[0]["recorded"]["unrounded"][:-1]
    assert reason["part"]["output_sqnr_db"] == max(part["output_sqnr_db"] for part in parts)


def test_the_runs_outlier_channel_is_in_its_own_landscape(reported, results):
    run = read_run(reported)
    layer = run.layers[SHOWN]
    landscape = run.arrays(layer)["qkv/input/input"]
    assert landscape.max(axis=0).argmax() == 3  # tests/conftest.py enlarges channel 3 of every norm
    assert layer["recorded"]["groups"][0]["stages"][0]["channel"] == 3


def copy_of(run, tmp_path, change=None):
    """A copy of a run's folder, its results.json changed by `change`."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if change is not None:
        change(results)
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def test_a_half_finished_run_is_reported_as_such(reported, tmp_path):
    def cut(results):
        results["error"] = "KeyboardInterrupt"
        del results["layers"][1:]
        results["perplexity"] = {}

    folder = copy_of(reported, tmp_path, cut)
    done = run_script("report.py", folder, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (folder / "report/index.html").read_text(encoding="utf-8")
    opening = html.unescape(page.partition("<nav")[0])
    assert "ended early or in part: KeyboardInterrupt" in opening
    assert "1 of the model's 2 layers" in opening
    assert "figures/layer_0_qkv_landscape.png" in page
    assert f"layer_{SHOWN}_" not in page
    assert not list((folder / "report/figures").glob(f"layer_{SHOWN}_*"))


def test_an_altered_file_is_left_out_and_named(reported, tmp_path):
    folder = copy_of(reported, tmp_path)
    with open(folder / "report/data/layer_000.safetensors", "ab") as file:
        file.write(b"x")
    run = read_run(folder)
    assert [layer["layer"] for layer in run.recorded] == [1]
    assert any("layers 0" in warning and "missing or of another run" in warning for warning in run.warnings)
    with pytest.raises(InputError, match="--report_layers 0"):
        run.chosen([0])


def test_layers_of_a_run_without_report_are_named(reported, tmp_path):
    folder = copy_of(reported, tmp_path, lambda results: results["layers"][0].update(recorded=None))
    assert any("layers 0" in warning and "without --report" in warning for warning in read_run(folder).warnings)


def no_figures(results):
    results["settings"]["report"] = False
    for layer in results["layers"]:
        layer["recorded"] = None


def all_resumed(results):
    no_figures(results)
    results["settings"]["report"] = True


def nothing_done(results):
    results.update(layers=[], error="RuntimeError: out of memory")


CHANGES = (no_figures, all_resumed, nothing_done)  # of results.json; the others are of the folder


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "results.json").unlink(), "the run was stopped before it could write it"),
        (lambda folder: (folder / "results.json").write_text("{"), "not a results.json of main.py"),
        (lambda folder: shutil.rmtree(folder / "report/data"), "run it again with --report"),
        (no_figures, "main.py --report collects it"),
        (all_resumed, "a checkpoint that was made without --report"),
        (nothing_done, "ended early (RuntimeError: out of memory)"),
    ],
    ids=["no folder", "killed", "broken", "no data", "no report", "resumed", "nothing done"],
)
def test_a_folder_that_cannot_be_drawn_gets_one_line_that_says_what_to_do(prepare, message, reported, tmp_path):
    folder = copy_of(reported, tmp_path, prepare if prepare in CHANGES else None)
    if prepare not in CHANGES:
        prepare(folder)
    done = run_script("report.py", folder, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--report_layers", "1"), "--report_layers is for --report"),
        (("--report", "--report_layers", "0,2"), "--report_layers 2: the model has layers 0 to 1"),
        (("--report", "--report_layers", "first"), "--report_layers"),
        (("--report", "--wbits", 16, "--abits", 16), "--report: 16-bit"),
    ],
)
def test_flags_that_cannot_be_get_one_line_before_anything_is_computed(
    flags, message, model_folder, token_file, tmp_path
):
    done = run_script("main.py", *common(model_folder, token_file), *flags, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "output").exists()


@pytest.fixture(scope="module")
def browser():
    """A Chromium or Chrome to open pages with; skips where none is installed."""
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip(f"no browser to open the page with: none of {', '.join(BROWSERS)} is installed")
    return found


QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=20000"),
)


@pytest.mark.parametrize("width", [1400, 800])
def test_a_real_browser_shows_every_picture_and_logs_no_error(browser, width, page, reported, tmp_path):
    address = (reported / "report/index.html").resolve().as_uri()
    flags = (f"--window-size={width},1000", f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--v=0")
    done = subprocess.run(
        [browser, *QUIET, *flags, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=False
    )
    images = page.count("<img ")
    assert images > 20
    assert f'data-images="{images} of {images}"' in done.stdout
    assert 'data-overflow="0"' in done.stdout  # nothing is wider than the window
    assert done.stdout.count("<button>") == done.stdout.count("<th") - done.stdout.count("<thead") - unsortable(page)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def unsortable(page: str) -> int:
    """How many column headings stand in tables that are not sorted."""
    parts = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    return sum(len(re.findall(r"<th[ >]", part)) for part in parts)


def test_a_later_run_without_a_report_says_that_the_page_is_not_its_own(reported, model_folder, token_file, tmp_path):
    shutil.copytree(reported, tmp_path / "output" / reported.name)
    page = Path("output") / reported.name / "report/index.html"
    before = (tmp_path / page).read_bytes()
    done = run_script("main.py", *common(model_folder, token_file), "--smooth", "--lwc", "--epochs", 2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == f"{page} is of an earlier run, not of this one: --report would draw it anew"
    assert (tmp_path / page).read_bytes() == before


def test_the_help_explains_what_is_read_and_written(tmp_path):
    done = run_script("report.py", "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "RUN_DIR" in done.stdout
    assert "--report_layers" in done.stdout


def test_a_run_that_rounds_only_weights_blames_no_activation(model_folder, token_file, tmp_path):
    flags = ("--abits", 16, "--report", "--report_layers", 0)
    done = run_script("main.py", *common(model_folder, token_file), *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (the_run(tmp_path / "output") / "report/index.html").read_text(encoding="utf-8")
    assert "no activation is rounded" in page
    assert "cost most" not in page
    assert "figures/layers_activation_noise.png" not in page
    assert "_error.png" not in page.replace("layers_output_error.png", "")
