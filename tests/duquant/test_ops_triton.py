"""The Triton kernels: their cases under Triton's interpreter and on a GPU, and what can be known without either."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

pytest.importorskip("triton")

CASES = tuple(f"tests/triton_{what}cases.py" for what in ("", "fake_", "search_", "gptq_"))
IMPORT_WITHOUT_TRITON = """
import importlib, pkgutil, sys
sys.modules["triton"] = None  # importing it now raises ImportError
import torch
import duquant.ops
for each in pkgutil.walk_packages(duquant.ops.__path__, "duquant.ops."):
    importlib.import_module(each.name)
from duquant.ops.triton import available
print(available(torch.device("cpu")), available(torch.device("cuda")))
"""


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # whether Triton interprets is decided when it is imported: in a process of its own
    left_out = ("TRITON_INTERPRET", "PYTEST_")
    settings = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    settings |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600, check=False)


def run_cases(*options: str, **environment: str) -> None:
    # the cases need nothing of `conftest.py`, and importing it takes seconds
    options = ("-p", "no:cacheprovider", "--noconftest", *options)
    done = run_python("-m", "pytest", *options, *CASES, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_the_kernels_hold_under_tritons_interpreter():
    run_cases("-p", "no:xdist", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_kernels_hold_on_a_gpu():
    run_cases("-n", str(min(8, os.cpu_count())))  # compiling is most of it


def test_without_triton_the_modules_are_imported_and_say_that_no_kernel_is_available():
    done = run_python("-c", IMPORT_WITHOUT_TRITON)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_what_is_known_without_a_gpu_is_printed_and_no_kernel_keeps_sums_outside_registers(tmp_path):
    done = run_script("benchmarks/gpu_kernels.py", "--paper", "--models", "7b", "--rows", 1, 2048, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    tables = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    linears = [row for row in tables if "→" in row[0]]
    assert len(linears) == 8
    one, many = ({row[0]: float(row[-2]) for row in linears if row[1] == rows} for rows in ("1", "2048"))
    assert all(3 < one[name] < 4 and one[name] > many[name] for name in one)  # four bits are a quarter of sixteen
    kernels = {"rotate_halves", "quantize", "fake_quantize", "row_words", "product_few", "product", "product_bytes"}
    kernels.add("round_block")
    built = [row for row in tables if row[0] in kernels]
    assert {row[0] for row in built} == kernels
    # the fastest tile of `product_bytes` takes all registers, and behind its loop a few more
    assert all(int(row[4]) <= (64 if row[0] == "product_bytes" else 0) and int(row[6]) > 0 for row in built)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_the_benchmark_says_in_one_line_that_there_is_no_gpu(tmp_path):
    done = run_script("benchmarks/gpu_kernels.py", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "no GPU here that Triton's kernels run on; --paper needs none"
