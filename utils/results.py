"""What a run leaves for machines, and the table it leaves for people."""

import enum
import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "lm_eval", "accelerate")


def versions() -> dict[str, str]:
    """Version of Python and of the libraries that figures can depend on; those that are not installed are left out."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def plain(value: object) -> object:
    """`value` as JSON has it: enums and paths as text, and None where a number is not finite."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flatten(value: dict, prefix: str = "") -> dict[str, object]:
    """A dict of dicts as one, its keys joined by dots."""
    flat: dict[str, object] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat |= flatten(item, f"{name}.") if isinstance(item, dict) and item else {name: item}
    return flat


def differences(saved: dict, now: dict) -> list[str]:
    """What differs between two flat dicts, in words."""
    keys = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    return [f"{key} was {saved.get(key)}, is {now.get(key)}" for key in keys]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join([cells[0].ljust(widths[0]), *numbers])} |"

    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *(line(row) for row in rows)])
