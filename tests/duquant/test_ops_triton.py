"""The Triton kernels: their cases under Triton's interpreter and on a GPU, and what can be known without either."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

pytest.importorskip("triton")

IMPORT_WITHOUT_TRITON = """
import importlib, pkgutil, sys
sys.modules["triton"] = None  # importing it now raises ImportError
import torch
import duquant
for each in pkgutil.walk_packages(duquant.__path__, "duquant."):
    importlib.import_module(each.name)
from duquant.ops.triton import available
print(available(torch.device("cpu")), available(torch.device("cuda")))
"""


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # whether Triton interprets is decided when it is imported: in a process of its own
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600, check=False)


def run_cases(**environment: str) -> None:
    plugins = ("-p", "no:cacheprovider", "-p", "no:xdist")
    done = run_python("-m", "pytest", *plugins, "tests/triton_cases.py", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_the_kernels_hold_under_tritons_interpreter():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_kernels_hold_on_a_gpu():
    run_cases()


def test_without_triton_the_package_is_imported_and_says_that_its_kernels_are_not_available():
    done = run_python("-c", IMPORT_WITHOUT_TRITON)
    assert done.stdout.split() == ["False", "False"], done.stderr
