"""The list of packages: read from its two files, compared with what is installed, and installed by a script."""

import builtins
import subprocess
import sys

import pytest
from conftest import ROOT

from utils import packages
from utils.packages import advice, extras, installed, package, requirements, unmet


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("torch==2.13.0", "torch"),
        ("triton>=3.7,<4; platform_system == 'Linux'", "triton"),
        ("lm_eval[math]~=0.4", "lm_eval"),
        ("compressed-tensors !=1", "compressed-tensors"),
        ("tqdm", "tqdm"),
    ],
)
def test_a_requirement_names_a_package(requirement, name):
    assert package(requirement) == name


def test_every_package_is_listed_once_and_pinned():
    every = [*requirements(), *(each for listed in extras().values() for each in listed)]
    names = [package(each) for each in every]
    assert len(set(names)) == len(names) > 15
    loose = {package(each) for each in every if "==" not in each.partition(";")[0]}
    assert loose == {"triton"}, "torch's CUDA build names the exact one"
    assert {"torch", "transformers"} <= {package(each) for each in requirements()}
    assert {"pytest", "ruff"} <= {package(each) for each in extras()["dev"]}


def test_no_script_repeats_the_list():
    names = {package(each) for each in (*requirements(), *(one for listed in extras().values() for one in listed))}
    for script in ("tools/environment.sh", "tools/requirements.py", "tests/run.sh", "experiment/doctor.py"):
        words = set((ROOT / script).read_text(encoding="utf-8").replace('"', " ").replace(",", " ").split())
        allowed = {"torch", "transformers", "safetensors", "ruff", "pytest", "triton", "tensorboard", "wandb"}
        assert not (names - allowed) & words, script


def test_what_is_missing_and_what_is_there_in_another_version():
    there = f"packaging=={installed('packaging')}"
    elsewhere = "no-such-package==1; platform_system == 'Nowhere'"
    listed = [there, "no-such-package==1", "packaging<0", elsewhere]
    assert unmet(listed) == ["no-such-package==1"]
    assert unmet(listed, exact=True) == ["no-such-package==1", "packaging<0"]
    assert installed("no-such-package==1") is None


def test_a_local_version_is_the_one_that_is_pinned(monkeypatch):
    monkeypatch.setattr(packages, "version", lambda name: "2.13.0+cpu")
    assert unmet(["torch==2.13.0"], exact=True) == []
    assert unmet(["torch==2.12.0"], exact=True) == ["torch==2.12.0"]


def test_where_nothing_reads_requirements_all_are_to_be_installed(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("packaging"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert unmet(requirements()) == requirements()


def test_the_advice_has_the_pin():
    [pin] = [each for each in extras()["track"] if package(each) == "wandb"]
    assert advice("wandb") == f'python -m pip install "{pin}"'
    assert advice("no-such-package") == 'python -m pip install "no-such-package"'


def test_the_script_prints_a_line_each_and_nothing_where_all_is_there(tmp_path):
    command = [sys.executable, "-S", str(ROOT / "tools/requirements.py"), "track"]  # -S: nothing is installed
    bare = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert bare.stdout.split("\n")[:-1] == [*requirements(), *extras()["track"]]
    full = subprocess.run([sys.executable, *command[2:3], "dev"], capture_output=True, text=True, check=True)
    assert not {package(line) for line in full.stdout.splitlines()} & {"torch", "transformers", "pytest"}
