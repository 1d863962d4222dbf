"""What tests of the pages share: their fenced blocks, the commands in them, and a copy of the scripts to change."""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the words behind it (`run`, `file=models/new.py`), its text, its page's name."""

    language: str
    words: tuple[str, ...]
    text: str
    page: str

    @property
    def file(self) -> str | None:
        """The file that it is to be written to, or to be applied to."""
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), None)

    @property
    def commands(self) -> list[str]:
        """The commands of a bash block, continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [Block(language, tuple(words.split()), text, page.name) for language, words, text in found]


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """The settings before a command (`MODEL=…`), and its words; a comment behind it is left out."""
    words = shlex.split(command, comments=True)
    settings = {}
    while words and re.match(r"^[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    return settings, words


def copy_house(folder: Path, packages: set[str]) -> Path:
    """The scripts and packages in `folder`; those named are copies, which may be changed, the others links."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for path in ROOT.iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            if path.name in packages:
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (folder / path.name).symlink_to(path)
    return folder


def apply(block: Block, house: Path) -> None:
    """Write a block's file, or make its changes in it: a diff without line numbers, whose old lines are there once."""
    path = house / block.file
    if block.language != "diff":
        assert not path.exists(), f"{path} is there already"
        path.write_text(block.text, encoding="utf-8")
        return
    lines = block.text.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{block.page}: {block.file} has these lines {text.count(old)} times:\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")
