"""`main.py --doctor`: what is installed and works here, as plain text for a bug report. It asks for no model.

Whatever is missing is said and does not end it: it begins before anything but Python is known to be there.
"""

import logging
import os
import platform
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from utils.packages import ROOT, extras, installed, package, requirements, unmet

HUB_TIMEOUT = 3  # seconds
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
EXTRAS = {  # what each is for
    "track": "--track tensorboard, --track wandb",
    "export": "folders for vLLM and others",
    "dev": "tests/run.sh",
}
RUNTIME = ("torch", "transformers", "safetensors")  # what duquant needs
INSTALL = "python -m pip install -r requirements.txt"


def examine() -> int:
    """Print what is here. The exit code: 1 if something that every run needs is not, or fails."""
    failed = False
    for name, tell in facts():
        try:
            text = tell()
        except Exception as error:  # a driver, a broken library: the rest is worth knowing all the same
            failed, text = True, f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
        print(f"{name:<10}  {text}", flush=True)
    missing = unmet(requirements())
    if missing:
        print(f"missing: {' '.join(missing)}; {INSTALL}")
    elif not failed:
        print("everything that is needed is here")
    return int(failed or bool(missing))


def facts() -> Iterator[tuple[str, Callable[[], str]]]:
    """Of every line what it is about, and what finds it out."""
    yield "suite", partial(checkout, ROOT)
    yield "python", lambda: f"{platform.python_version()}, {platform.platform()}"
    yield "packages", partial(versions, requirements())
    for name, listed in extras().items():
        yield f"[{name}]", partial(extra, name, listed)
    yield "cpu", cpu
    yield "disk", lambda: f"{size(shutil.disk_usage('.').free)} free where this was started"
    if installed("torch") is not None:
        yield "memory", host_memory
        yield "gpu", gpus
        if not unmet([each for each in requirements() if package(each) in RUNTIME]):
            yield "kernels", kernels
    yield "hub", hub


def checkout(folder: Path) -> str:
    """The commit, and whether anything is changed; a folder that is no checkout says so."""
    try:
        commit = git(folder, "log", "-1", "--format=%h of %cs")
        changed = git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "no git checkout"
    return f"commit {commit}{', with changes' if changed else ''}"


def git(folder: Path, *words: str) -> str:
    """What git says."""
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def versions(listed: list[str]) -> str:
    """Every package with its version, beside the pin where that is another; and triton, which comes with torch."""
    others = unmet(listed, exact=True)
    shown = [
        f"{package(each)} {installed(each) or 'missing'}{f' ({each})' if each in others else ''}" for each in listed
    ]
    return ", ".join([*shown, f"triton {installed('triton') or 'missing (kernels for GPUs)'}"])


def extra(name: str, listed: list[str]) -> str:
    """Whether an extra is installed, and what it is for."""
    missing, purpose = unmet(listed), EXTRAS.get(name, "")
    pins = " ".join(f'"{each}"' for each in missing)
    return f"{purpose}: {f'missing, python -m pip install {pins}' if missing else 'installed'}"


def cpu() -> str:
    """Its name, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {allowed} of {os.cpu_count()} cores"


def host_memory() -> str:
    """What the host has free."""
    from utils.memory import available_memory

    return f"{size(available_memory())} free"


def gpus() -> str:
    """Every GPU that torch can use, with its memory."""
    import torch

    if not torch.cuda.is_available():
        return f"none that torch can use; it was built {'for CUDA' if torch.version.cuda else 'without CUDA'}"
    shown = []
    for number in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(number)
        capability = ".".join(map(str, torch.cuda.get_device_capability(number)))
        name = f"cuda:{number} {torch.cuda.get_device_name(number)}, capability {capability}"
        shown.append(f"{name}, {size(free)} of {size(whole)} free")
    return "; ".join(shown)


def kernels() -> str:
    """What multiplies integers on the CPU and on a GPU, and what else on a GPU is computed by kernels."""
    import torch

    from duquant.formats import IntegerFormat
    from duquant.ops import fused, kernel_for
    from quantize import gptq_kernel, greedy_kernel
    from quantize.rotation_settings import USUAL_BLOCK

    with only_warnings("duquant"):  # what works is said here; why something does not, there
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        found = {device: kernel_for(device) for device in devices}
        shown = [f"{device} {kernel.name if kernel else 'none, decoded weights'}" for device, kernel in found.items()]
        if "cuda" in devices:
            usual = IntegerFormat(4)
            others = {
                "fake quantization": fused.works("cuda", usual),
                "rotations": fused.turns("cuda", USUAL_BLOCK),
                "greedy steps": greedy_kernel.works("cuda", USUAL_BLOCK),
                "GPTQ": gptq_kernel.works("cuda", usual),
            }
            shown += [f"{what} on cuda {'fused' if works else 'by torch'}" for what, works in others.items()]
    return "; ".join([*shown, f"{torch.get_num_threads()} threads"])


@contextmanager
def only_warnings(name: str) -> Iterator[None]:
    """Inside the block a logger tells of nothing less."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def hub() -> str:
    """Whether the hub is to be reached, or must not be."""
    said = [f"{name}={os.environ[name]}" for name in OFFLINE if os.environ.get(name)]
    if said:
        return f"offline by {' '.join(said)}"
    address, started = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), time.perf_counter()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
        return f"{address} is not reached ({reason}); give local folders and files of text"
    return f"{address} answers in {time.perf_counter() - started:.1f} s"


def size(number: float) -> str:
    """Bytes for people."""
    return f"{number / 1e9:.1f} GB"
