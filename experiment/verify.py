"""`--verify`: what `--export` wrote is run by transformers and compressed-tensors, in a process of its own."""

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from duquant.tensors import widen
from duquant.transform import DualTransform
from evaluation.measured import Measured
from evaluation.perplexity import WindowPerplexity, final_hidden
from experiment.prepare import Prepared
from experiment.setup import Setup
from quantize.observe import head_logits, shell_on_device
from quantize.settings import QuantSettings
from utils.device import DTYPES
from utils.io import write_tensors
from utils.log import RESULT

WINDOWS = 2  # whose logits are compared
LOGITS = 1e-3  # relative; on a CPU there is no difference at all
HALF_LOGITS = 0.2  # in half precision, where the target rounds what was rotated, and the scale, to it first
PERPLEXITY = 1e-3  # relative
ROOT = Path(__file__).resolve().parents[1]

logger = logging.getLogger(__name__)


def verify_export(prepared: Prepared, model: nn.Module, measured: Measured) -> None:
    """Run the exported folder in a process without the suite; what is not as it was joins the failures.

    The logits of a few windows, how many values a token has in front of a linear, and every perplexity are compared.
    """
    setup, folder = prepared.setup, prepared.settings.output.export
    tested = [each for each in prepared.evaluations.members if isinstance(each, WindowPerplexity)]
    expected = [measured.results["perplexity"].get(each.label, math.nan) for each in tested]
    windows = tested[0].tokens[:WINDOWS]
    with rotating_as_exported(model):
        hidden = final_hidden(model, setup.spec, windows, setup.device, "what to verify")
    request = {f"tokens.{index}": each.tokens for index, each in enumerate(tested)}
    request["logits"] = run_head(model, setup, windows, hidden)
    dtype = next(name for name, each in DTYPES.items() if each is model.dtype)
    with tempfile.TemporaryDirectory() as place:
        write_tensors(Path(place) / "request.safetensors", request)
        found = in_another_process(folder, Path(place) / "request.safetensors", str(setup.device), dtype)
    if isinstance(found, str):
        wrong, said = {"loading": found}, found
    else:
        bound = LOGITS if model.dtype.itemsize >= torch.float32.itemsize else HALF_LOGITS
        wrong, said = judged(found, expected, prepared.quant, [each.label for each in tested], bound)
    logger.log(RESULT, "%s, run by transformers and compressed-tensors alone: %s", folder, said)
    for name, reason in wrong.items():
        logger.error("--verify: %s", reason)
        measured.failures[f"--verify ({name})"] = reason


@contextmanager
def rotating_as_exported(model: nn.Module) -> Iterator[None]:
    """Inside the block rotations are multiplied as compressed-tensors does: by √B R, and then by 1/√B.

    That is the same but for the last bits, unless √B is a power of two. They show, since with symmetric codes a
    negative peak lies on the tie between −8 and −7, in every token that has one.
    """
    transforms = [each for each in model.modules() if isinstance(each, DualTransform) and len(each.rotations)]
    for transform in transforms:
        size = transform.rotations.shape[-1]
        transform.forward = partial(rotated, transform.rotations[0].float() * math.sqrt(size))
    try:
        yield
    finally:
        for transform in transforms:
            del transform.forward


def rotated(matrix: Tensor, x: Tensor) -> Tensor:
    """`x` [..., C] times `matrix` [B, B], √B times a rotation, in every block of B channels."""
    size = torch.tensor(len(matrix), dtype=torch.float64)
    blocks = widen(x).unflatten(-1, (-1, len(matrix)))
    return (blocks @ matrix.to(x.device) / size.sqrt()).flatten(-2).to(x.dtype)


def run_head(model: nn.Module, setup: Setup, tokens: Tensor, hidden: Tensor) -> Tensor:
    """The logits [N, T, vocabulary] of windows whose `final_hidden` is known, float32 on the host."""
    with shell_on_device(model, setup.spec, setup.device):
        return head_logits(model, setup.spec, tokens.to(setup.device), hidden.to(setup.device)).float().cpu()


def in_another_process(folder: Path, request: Path, device: str, dtype: str) -> dict | str:
    """What `duquant.verify` finds, or the last line of what it says where it ends otherwise."""
    command = [sys.executable, "-m", "duquant.verify", str(folder), str(request), device, dtype]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def judged(
    found: dict, expected: list[float], quant: QuantSettings, labels: list[str], bound: float
) -> tuple[dict[str, str], str]:
    """What is wrong with what was found, by name, and all of it in a line; `bound` of the logits' difference."""
    wrong: dict[str, str] = {}
    difference, levels = found["difference"], found["levels"]
    if not difference <= bound:
        wrong["logits"] = f"logits differ by {difference:.2%} of their length, which may be {bound:.1%}"
    most = 2**quant.scheme.input.bits
    if quant.scheme.input.quantized and not levels <= most:
        wrong["levels"] = f"a token has {levels} values in front of a linear, and {most} at most are right"
    told = [
        f"logits differ by {difference:.2e} of their length",
        f"at most {levels} values a token in front of a linear",
    ]
    for label, own, other in zip(labels, expected, found["perplexity"], strict=True):
        told.append(f"{label} perplexity {other:.4f} ({own:.4f} in this run)")
        if not abs(other / own - 1) <= PERPLEXITY:
            wrong[f"perplexity {label}"] = f"{label} perplexity is {other:.4f} there and {own:.4f} here"
    return wrong, "; ".join(told)
