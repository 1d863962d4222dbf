"""Which packages the suite is meant to run with, read from requirements.txt and the extras of pyproject.toml.

Those two files are the one list. This module needs nothing but Python, so that it can say what is to be installed.
"""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements() -> list[str]:
    """What every run may need, a pin each, as `torch==2.13.0`."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines())
    return [line for line in lines if line]


def extras() -> dict[str, list[str]]:
    """Extra → what it needs beside, pinned in the same way."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["optional-dependencies"]


def installed(requirement: str) -> str | None:
    """The version that is installed of what a requirement names; None without one."""
    try:
        return version(package(requirement))
    except PackageNotFoundError:
        return None


def package(requirement: str) -> str:
    """The name of the package in `lm_eval==0.4.13`, or in `triton>=3.7,<4; platform_system == "Linux"`."""
    end = next((at for at, sign in enumerate(requirement) if sign in "=<>!~;[ "), len(requirement))
    return requirement[:end]


def unmet(listed: list[str], exact: bool = False) -> list[str]:
    """Those of the `listed` requirements that are not installed; `exact`: or in another version than they name.

    One whose marker is about other machines than this is met. All of them are unmet where nothing can read them, as in
    a new environment.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return list(listed)
    found = []
    for line in listed:
        requirement, there = Requirement(line), installed(line)
        wrong = there is None or (exact and not requirement.specifier.contains(there, prereleases=True))
        if wrong and (requirement.marker is None or requirement.marker.evaluate()):
            found.append(line)
    return found


def advice(name: str) -> str:
    """The command that installs the package `name` as it is pinned."""
    every = [*requirements(), *(each for extra in extras().values() for each in extra)]
    return f'python -m pip install "{next((each for each in every if package(each) == name), name)}"'
