"""What tests of the real scripts share: how a refusal looks, killing a run, and what it left."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from starter import Ended
from transformers import PreTrainedModel

from experiment.options import RunSettings
from utils.io import read_tensors
from utils.parser import Parser
from utils.setting_flags import add_flags, from_flags


def common(model: Path, tokens: Path) -> tuple:
    """Flags of a run on `tokens`, a file of them."""
    return ("--model", model, "--calib_dataset", tokens, "--test_dataset", tokens)


def settings_of(*flags: object, cls: type = RunSettings) -> RunSettings:
    """The settings that a script's flags say."""
    parser = Parser("A script.")
    add_flags(parser, cls)
    return from_flags(cls, parser.parse_args([str(flag) for flag in flags]))


def assert_refused(done: Ended, message: str) -> None:
    """It ended with code 2 and one line on stderr that holds `message`."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Path, size and modification time of every file below `folder`."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def the_run(folder: Path, name: str = "*") -> Path:
    """The one run's folder in `folder` that has such a name."""
    [found] = folder.glob(name)
    return found


def results_of(folder: Path, name: str = "*", output: str = "output") -> dict:
    """What the one run of such a name found that was started in `folder`."""
    return json.loads((the_run(folder / output, name) / "results.json").read_text(encoding="utf-8"))


def save_sharded(model: PreTrainedModel, folder: Path, tokenizer_from: Path) -> Path:
    """Save `model` in several files, with the tokenizer of another folder; return `folder`."""
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    for path in tokenizer_from.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def kill_at(path: Path, delay: float = 0, sent: int = signal.SIGKILL) -> Callable[[int], None]:
    """Sends a signal to a process `delay` seconds after something that `path`, a pattern, matches has appeared."""
    pattern = str(path.relative_to(path.anchor))

    def wait_and_kill(pid: int) -> None:
        end = time.monotonic() + 60
        while not any(Path(path.anchor).glob(pattern)) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(pid, sent)

    return wait_and_kill


def layer_content(checkpoint: Path) -> dict[str, tuple]:
    """Every tensor's bytes, and figures (without the clock's), of every layer file."""
    content = {}
    for path in checkpoint.glob("layers/layer_*.safetensors"):
        tensors, metadata = read_tensors(path)
        figures = json.loads(metadata["figures"])
        (figures["training"] or {}).pop("seconds", None)
        raw = {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in tensors.items()}
        content[path.name] = (raw, metadata["run"], figures)
    return content


# What a script runs first: the perplexity of five windows fails, once in the folder where it runs.
FAIL_ONCE = """
import pathlib
import evaluation.perplexity as module
score = module.score
def fail(model, spec, tokens, *rest):
    if len(tokens) == 5 and not pathlib.Path("failed").exists():
        pathlib.Path("failed").touch()
        raise RuntimeError("no luck today")
    return score(model, spec, tokens, *rest)
module.score = fail
"""
