"""tools/environment.sh: whatever is missing of the one list is installed, and nothing where nothing is."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from utils.packages import extras, requirements

# An interpreter of an environment: its pip only notes what it is told, and packages are there or not, as it says.
STUB = """#!/usr/bin/env bash
case "$*" in
    "-m pip --version") {pip} ;;
    "-m pip install"*) printf '%s\\n' "$*" >> {log}; cat >> {log} ;;
    tools/requirements.py*) exec {python} {bare} "$@" ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def installed(tmp_path):
    """What a script that sources it with these EXTRAS has installed, a line each."""

    def run(extra: str = "", bare: bool = True, pip: bool = True, path: str = "") -> list[str]:
        stub, log = tmp_path / "python", tmp_path / "log"
        how = {"pip": "true" if pip else "false", "bare": "-S" if bare else "", "python": sys.executable, "log": log}
        stub.write_text(STUB.format(**how))
        stub.chmod(0o755)
        script = f'set -euo pipefail; EXTRAS="{extra}"; source tools/environment.sh; echo "$PYTHON"'
        environment = {"PYTHON": str(stub), "PATH": f"{path}:/usr/bin:/bin"}
        command = ["bash", "-c", script, "script", "--preset", "paper"]  # flags of the script are none of its business
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(stub)
        return log.read_text().splitlines() if log.exists() else []

    return run


def test_a_new_environment_gets_what_every_run_needs(installed):
    told, *packages = installed()
    assert told.startswith("-m pip install ")
    assert packages == requirements()


def test_extras_are_installed_where_they_are_named(installed):
    _, *packages = installed("dev track")
    assert packages == [*requirements(), *extras()["dev"], *extras()["track"]]


def test_an_environment_that_has_everything_is_left_alone(installed):
    assert installed("", bare=False) == []


def test_an_environment_without_pip_is_filled_by_uv(installed, tmp_path):
    uv = tmp_path / "bin/uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "uv $*" >> {tmp_path / "log"}; cat >> {tmp_path / "log"}\n')
    uv.chmod(0o755)
    told, *packages = installed(pip=False, path=str(Path(uv).parent))
    assert told.startswith(f"uv pip install --quiet --python {tmp_path / 'python'} ")
    assert packages == requirements()
