"""`--doctor`: what is here, without a model; what is missing or broken is said and does not end it."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

from experiment import doctor
from utils.packages import extras, package, requirements


@pytest.fixture
def examined(capsys, monkeypatch):
    """What it says here, by line, and its exit code."""

    def examine(**environment: str) -> tuple[int, dict[str, str], str]:
        for name, value in {"HF_HUB_OFFLINE": "1", **environment}.items():
            monkeypatch.setenv(name, value)
        code, text = doctor.examine(), capsys.readouterr().out
        return code, {line[:10].strip(): line[12:] for line in text.splitlines()}, text

    return examine


def test_it_says_what_a_bug_report_needs(tmp_path):
    done = run_script("main.py", "--doctor", folder=tmp_path)
    lines = {line[:10].strip(): line[12:] for line in done.stdout.splitlines()}
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"suite", "python", "packages", "cpu", "memory", "disk", "gpu", "kernels", "hub"} <= set(lines)
    assert all(f"{package(each)} " in lines["packages"] for each in requirements())
    assert "offline by HF_HUB_OFFLINE=1" in lines["hub"]
    assert done.stdout.splitlines()[-1] == "everything that is needed is here"
    assert os.listdir(tmp_path) == []


def test_every_extra_is_told_with_what_it_is_for(examined):
    code, lines, _ = examined()
    assert code == 0
    assert doctor.EXTRAS.keys() == extras().keys()
    assert all(lines[f"[{name}]"].startswith(f"{doctor.EXTRAS[name]}: ") for name in extras())


def test_what_is_missing_is_told_with_what_installs_it(examined, monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: ["torch", "no-such-package==3"])
    monkeypatch.setattr(doctor, "extras", lambda: {"track": ["no-such-tracker==2"]})
    code, lines, text = examined()
    assert code == 1
    assert "no-such-package missing (no-such-package==3)" in lines["packages"]
    assert lines["[track]"].endswith('missing, python -m pip install "no-such-tracker==2"')
    assert text.splitlines()[-1] == "missing: no-such-package==3; python -m pip install -r requirements.txt"


def test_what_fails_is_told_and_the_rest_too(examined, monkeypatch):
    def broken() -> str:
        raise RuntimeError("the driver\nis too old")

    monkeypatch.setattr(doctor, "gpus", broken)
    code, lines, text = examined()
    assert code == 1
    assert lines["gpu"] == "failed: RuntimeError: the driver is too old"
    assert lines["hub"]
    assert "everything" not in text


def test_a_hub_that_does_not_answer_is_no_failure(examined, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    code, lines, _ = examined(HF_HUB_OFFLINE="")
    assert code == 0
    assert "http://127.0.0.1:9 is not reached" in lines["hub"]


def test_it_begins_where_nothing_is_installed(tmp_path):
    command = [sys.executable, "-S", str(ROOT / "main.py"), "--doctor"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "missing: torch==" in done.stdout.splitlines()[-1]


def test_a_run_without_its_packages_says_so_in_one_line(tmp_path):
    command = [sys.executable, "-S", str(ROOT / "main.py"), "--model", "any"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the package torch is not installed: python -m pip install -r requirements.txt\n"


def test_a_folder_that_is_no_checkout_says_so(tmp_path):
    assert doctor.checkout(tmp_path) == "no git checkout"


def test_every_gpu_is_told_with_its_memory(monkeypatch):
    cuda = {"is_available": True, "device_count": 2, "mem_get_info": (70e9, 80e9)}
    cuda |= {"get_device_name": "Some GPU", "get_device_capability": (9, 0)}
    for name, answer in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *which, answer=answer: answer)
    told = "Some GPU, capability 9.0, 70.0 GB of 80.0 GB free"
    assert doctor.gpus() == f"cuda:0 {told}; cuda:1 {told}"


def test_what_kernels_compute_on_a_gpu_is_told_one_by_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("duquant.ops.kernel_for", lambda device: None)
    for place, works in (("fused.works", True), ("fused.turns", False)):
        monkeypatch.setattr(f"duquant.ops.{place}", lambda *which, works=works: works)
    monkeypatch.setattr("quantize.greedy_kernel.works", lambda *which: True)
    monkeypatch.setattr("quantize.gptq_kernel.works", lambda *which: False)
    told = "fake quantization on cuda fused; rotations on cuda by torch; greedy steps on cuda fused; "
    before = logging.getLogger("duquant").level
    assert told + "GPTQ on cuda by torch; " in doctor.kernels()
    assert logging.getLogger("duquant").level == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_kernels_of_a_gpu_are_told():
    assert "cuda " in doctor.kernels()
    assert "fake quantization on cuda " in doctor.kernels()
    assert "by torch" not in doctor.kernels()
