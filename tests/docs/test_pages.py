"""README and docs: links and anchors lead somewhere, commands are accepted, those that are cheap run for real."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from conftest import ROOT, run_script
from docs_cases import PAGES, Block, blocks, words_of

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "benchmarks/RESULTS.md"]
BASH = [block for page in PAGES for block in blocks(page) if block.language == "bash"]
COMMANDS = [(block, command) for block in BASH for command in block.commands if "in=house" not in block.words]
RUN = [page for page in PAGES if any("run" in block.words for block in blocks(page))]
SLOW = [block for block in BASH if "slow" in block.words]
FAILING = [block for block in blocks(ROOT / "docs/troubleshooting.md") if block.language == "bash"]


def plain(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", plain(page.read_text(encoding="utf-8")), flags=re.MULTILINE):
        text = re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower())
        found.append(text.replace(" ", "-"))
    return set(found)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in LINK.findall(plain(page.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = unquote(target).partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target} leads nowhere"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target} names no heading of {path.name}"


def test_every_page_is_linked_from_the_readme():
    linked = {target.partition("#")[0] for target in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked


def test_the_readme_is_short_and_pictures_are_small():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    assert all(path.stat().st_size < 150_000 for path in (ROOT / "docs/pictures").iterdir())


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_no_page_names_a_path_of_one_machine(page):
    assert not re.search(r"/work/|/tmp/|/root/", page.read_text(encoding="utf-8"))


def test_the_page_of_flags_is_what_the_settings_say(tmp_path):
    done = run_script("tools/flags_page.py", "--check", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_old_page_of_flags_is_told_of(monkeypatch):
    from tools import flags_page

    assert "`--lac`" in flags_page.page()
    monkeypatch.setattr(flags_page, "PAGE", ROOT / "README.md")
    monkeypatch.setattr("sys.argv", ["flags_page.py", "--check"])
    with pytest.raises(ValueError, match="not what the settings say"):
        flags_page.main(flags_page.parse_flags())


def shell_words(command: str) -> list[str]:
    """The arguments of a command for the script that it starts, which is the first of them.

    Raises AssertionError for a command of another kind.
    """
    settings, words = words_of(command)
    if words[0] == "torchrun":
        words = ["python", *words[next(index for index, word in enumerate(words) if word.endswith(".py")) :]]
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        assert set(settings) <= {"MODEL", "MODELS"}
        script = "main.py" if "MODEL" in settings else "compare.py"
        extra = ["--model", settings.get("MODEL", "m")] if words[2:] else ["--model", "m"]
        return [script, *extra, *words[2:]] if words[1] != "tests/run.sh" else []
    assert words[0] == "python", command
    return words[1:]


@pytest.mark.parametrize(("block", "command"), COMMANDS, ids=lambda each: each if isinstance(each, str) else "")
def test_every_command_is_accepted_by_the_real_parser(block: Block, command, monkeypatch):
    words = shell_words(command)
    if not words:
        return
    monkeypatch.setattr("sys.argv", words)
    if words[:2] == ["-m", "duquant"]:
        from duquant.__main__ import bench_parser, text_parser

        parser = bench_parser() if words[2] == "bench" else text_parser()
        parser.parse_args(words[3:] if words[2] == "bench" else words[2:])
        return
    assert (ROOT / words[0]).is_file()
    module = words[0].removesuffix(".py").replace("/", ".")
    if module.startswith("benchmarks"):
        return
    assert vars(importlib.import_module(module).parse_flags())


@pytest.fixture
def desk(tmp_path) -> Path:
    """A folder with links to what lies in the repository, where commands can leave what they write."""
    for path in ROOT.iterdir():
        if path.name not in ("output", "cache", "act_scales", ".git"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run_command(command: str, desk: Path) -> None:
    """Run a command of a page as a reader would, from the repository's root."""
    _, words = words_of(command)
    assert words[0] == "python", f"{command}: only Python's commands are run for real"
    if words[1].endswith(".py"):
        few = ("--max_rotation_step", 4) if "--calib_dataset" in words else ()  # what is quantized is, in less time
        done = run_script(words[1], *words[2:], *few, folder=desk)
        returncode, said = done.returncode, done.stdout + done.stderr
    else:
        returncode, said = run_python(words[1:], desk)
    assert returncode == 0, f"{command}\n{said}"


def run_python(arguments: list[str], desk: Path) -> tuple[int, str]:
    """Start Python with these arguments: exit code, and all that it says."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=desk, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_in_their_order(page, desk):
    for block in (each for each in blocks(page) if "run" in each.words):
        if block.language == "python":
            returncode, said = run_python(["-c", block.text], desk)
            assert returncode == 0, f"{block.text}\n{said}"
        for command in block.commands if block.language == "bash" else ():
            run_command(command, desk)
    if page.name == "checkpoints.md":  # the README loads a folder like the one that was saved
        [lines] = [block.text for block in blocks(ROOT / "README.md") if block.language == "python"]
        returncode, said = run_python(["-c", lines.replace('"quantized"', '"saved"')], desk)
        assert returncode == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("block", SLOW, ids=lambda block: f"{block.page}: {block.commands[0][:60]}")
def test_the_slow_commands_of_the_pages_run(block, desk):
    for command in block.commands:
        if command.startswith("bash "):
            settings = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(words_of(command)[1], cwd=desk, env=settings, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            run_command(command, desk)


def set_up(block: Block, desk: Path) -> None:
    """What a command of troubleshooting.md finds that a reader has and the repository has not."""
    setup = next((word.removeprefix("setup=") for word in block.words if word.startswith("setup=")), None)
    config = (ROOT / "assets/tiny-llama/config.json").read_text(encoding="utf-8")
    if setup in ("pickled", "gpt2"):
        (desk / setup).mkdir()
        (desk / setup / "config.json").write_text(
            config.replace('"llama"', f'"{"llama" if setup == "pickled" else setup}"')
        )
        (desk / setup / "pytorch_model.bin").touch()
    if setup == "kept":
        flags = words_of(block.commands[0])[1][2:]
        changed = {"--resume": "--save_dir", "4": "2"}
        done = run_script("main.py", *(changed.get(word, word) for word in flags), folder=desk)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", FAILING, ids=lambda block: block.commands[0][:70])
def test_every_error_is_the_line_that_the_page_shows(block, desk):
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    shown = page.split(block.text, 1)[1].split("```text\n", 1)[1].split("```", 1)[0].strip()
    set_up(block, desk)
    [command] = block.commands
    done = run_script(words_of(command)[1][1], *words_of(command)[1][2:], folder=desk)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(shown), (line, shown)
    assert "Traceback" not in done.stderr


def test_the_page_of_troubles_has_ten_of_them():
    assert len(FAILING) >= 10
    assert all("fails" in block.words for block in FAILING)


def test_the_citation_names_the_paper_and_its_nine_authors():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format asks for
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("DuQuant: Distributing Outliers via Dual Transformation")
    assert [author["family-names"] for author in paper["authors"]] == [
        "Lin",
        "Xu",
        "Wu",
        "Cui",
        "Zhang",
        "Mou",
        "Song",
        "Sun",
        "Wei",
    ]
    assert "2406.01721" in paper["url"]
