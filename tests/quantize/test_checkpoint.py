"""The checkpoint folder: what is restored, what is recomputed, and what is refused."""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_tokens, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from models import decoder_spec
from quantize.bits import BitSettings, ClipSettings
from quantize.checkpoint import Checkpoint
from quantize.observer import Observer
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationSettings, Transform
from quantize.settings import QuantSettings, SmoothSettings, TrainingSettings
from quantize.sizes import checkpoint_bytes
from quantize.state import FinishedLayer
from quantize.statistics import channel_statistics
from utils.errors import InputError
from utils.io import read_tensors

CPU = torch.device("cpu")
LAYERS = 3
GQA, FOLDED = {}, {"num_key_value_heads": 6}  # o_proj's scale online, and folded into v_proj
IDENTITY = {"model config": "abc", "--wbits": 4, "--lac": 0.95, "--group_size": None}


def settings(
    times: int = 1, smooth: bool = True, learned: bool = False, bits: BitSettings | None = None
) -> QuantSettings:
    return QuantSettings(
        bits or BitSettings(4, 4),
        ClipSettings(0.95, None if learned else 0.9),
        SmoothSettings() if smooth else None,
        rotation=RotationSettings(16, 6, times),
        training=TrainingSettings(epochs=1) if learned else None,
    )


@dataclass
class Work:
    """One quantization of the tiny model: the model, its figures, and which layers were computed."""

    model: nn.Module
    figures: list[dict]
    computed: list[int] = field(default_factory=list)


def quantize(config: QuantSettings, checkpoint: Checkpoint | None, shape: dict | None = None) -> Work:
    """Quantize, going on with what is in `checkpoint`."""
    model = tiny_model(num_hidden_layers=LAYERS, **(shape or {}))
    spec, tokens = decoder_spec(model.config), random_tokens(4, 16)
    peaks = channel_statistics(model, spec, tokens, CPU).scales if config.smooth else None
    finished = checkpoint.finished(LAYERS, spec) if checkpoint else {}
    keeping = Keeping(checkpoint)
    figures = quantize_model(model, spec, tokens, peaks, config, CPU, finished, [keeping])
    return Work(model, figures, keeping.computed)


class Keeping(Observer):
    """Keeps every layer that was computed."""

    def __init__(self, checkpoint: Checkpoint | None):
        self.checkpoint, self.computed = checkpoint, []

    def layer_done(self, index: int, finished: FinishedLayer, restored: bool) -> None:
        if not restored:
            self.computed.append(index)
            if self.checkpoint:
                self.checkpoint.layer_done(index, finished, restored)


@contextmanager
def created(folder: Path, identity: dict = IDENTITY, needed: int = 0) -> Iterator[Checkpoint]:
    checkpoint = Checkpoint.create(folder, identity, "tiny", needed)
    yield checkpoint
    os.close(checkpoint._lock)  # as the end of the process does


@contextmanager
def resumed(folder: Path, identity: dict = IDENTITY) -> Iterator[Checkpoint]:
    checkpoint = Checkpoint.resume(folder, identity)
    yield checkpoint
    os.close(checkpoint._lock)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []
    tokens = random_tokens(2, 16, seed=9)
    assert torch.equal(one(tokens).logits, other(tokens).logits)


def figures_of(work: Work) -> list[dict]:
    """Figures as JSON has them, without the clock's."""
    figures = json.loads(json.dumps(work.figures))
    for layer in figures:
        (layer["training"] or {}).pop("seconds", None)
    return figures


CASES = {
    "gqa": (settings(), GQA),
    "folded": (settings(), FOLDED),
    "no smoothing": (settings(smooth=False), GQA),
    "no permutation": (settings(times=0), GQA),
    "two permutations": (settings(times=2), FOLDED),
    "groups": (settings(bits=BitSettings(3, 4, 16, True)), GQA),
    "no transform": (replace(settings(), transform=Transform.NONE), GQA),
    "permutation alone": (replace(settings(), transform=Transform.PERMUTATION), GQA),
    "Hadamard": (replace(settings(), transform=Transform.HADAMARD), FOLDED),
    "lwc": (settings(learned=True), GQA),
    "lwc, folded, groups": (settings(learned=True, bits=BitSettings(3, 4, 16)), FOLDED),
    "lwc, aug_loss": (replace(settings(learned=True), training=TrainingSettings(epochs=1, augmented=True)), GQA),
}


@pytest.mark.parametrize("name", CASES)
def test_any_prefix_of_layers_leads_to_bitwise_the_same_model(name, tmp_path):
    config, shape = CASES[name]
    with created(tmp_path / "whole") as checkpoint:
        whole = quantize(config, checkpoint, shape)
    assert whole.computed == list(range(LAYERS))
    for kept in range(LAYERS + 1):
        folder = tmp_path / str(kept)
        shutil.copytree(tmp_path / "whole", folder)
        for index in range(kept, LAYERS):
            layer_file(folder, index).unlink()
        with resumed(folder) as checkpoint:
            again = quantize(config, checkpoint, shape)
        assert again.computed == list(range(kept, LAYERS))
        assert_same_model(again.model, whole.model)
        assert figures_of(again) == figures_of(whole)


def test_a_run_with_a_checkpoint_gives_the_same_model_as_one_without(tmp_path):
    config = settings(learned=True)
    with created(tmp_path / "run") as checkpoint:
        assert_same_model(quantize(config, checkpoint).model, quantize(config, None).model)


def test_a_gap_in_the_middle_is_filled(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    layer_file(folder, 1).unlink()
    with resumed(folder) as checkpoint:
        again = quantize(settings(), checkpoint)
    assert again.computed == [1]
    assert_same_model(again.model, whole.work.model)
    assert layer_content(folder) == layer_content(whole.folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete checkpoint: `folder`, and the `work` that wrote it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with created(folder) as checkpoint:
        work = quantize(settings(), checkpoint)
    return SimpleNamespace(folder=folder, work=work)


def layer_file(folder: Path, index: int) -> Path:
    return folder / f"layers/layer_{index:03d}.safetensors"


def layer_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "layers").iterdir()}


def layer_content(folder: Path) -> dict[str, tuple]:
    """Every tensor's bytes, and the metadata, of every layer file (safetensors writes metadata in any order)."""
    content = {}
    for path in (folder / "layers").iterdir():
        tensors, metadata = read_tensors(path)
        raw = {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in tensors.items()}
        content[path.name] = (raw, metadata)
    return content


def copy_of(whole, tmp_path: Path) -> Path:
    return shutil.copytree(whole.folder, tmp_path / "copy")


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def header_length(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut inside the header": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit of the data": lambda path: flip(path, header_length(path), 0),
    "last bit of the data": lambda path: flip(path, path.stat().st_size - 1, 7),
    "length of the header": lambda path: flip(path, 0, 3),
    "the run in the header": lambda path: flip(path, path.read_bytes().index(b'"run":"') + 9, 0),
    "the digest in the header": lambda path: flip(path, path.read_bytes().index(b'"digest":"') + 12, 0),
    "another file": lambda path: path.write_text("{}"),
    "renamed": lambda path: path.write_bytes(path.with_name("layer_002.safetensors").read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_computed_again_to_the_same_content(damage, whole, tmp_path, caplog):
    folder = copy_of(whole, tmp_path)
    DAMAGE[damage](layer_file(folder, 1))
    assert layer_bytes(folder) != layer_bytes(whole.folder)
    with resumed(folder) as checkpoint, caplog.at_level(logging.WARNING):
        again = quantize(settings(), checkpoint)
    assert again.computed == [1]
    [warning] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(layer_file(folder, 1)) in warning
    assert layer_content(folder) == layer_content(whole.folder)
    assert_same_model(again.model, whole.work.model)


def test_no_flipped_bit_is_ever_overlooked(whole, tmp_path, caplog):
    folder = copy_of(whole, tmp_path)
    path = layer_file(folder, 0)
    sound, spec = path.read_bytes(), decoder_spec(tiny_config())
    header = range(0, header_length(path), 3)
    data = range(header_length(path), len(sound), (len(sound) - header_length(path)) // 50)
    for index in (1, 2):
        layer_file(folder, index).unlink()
    with resumed(folder) as checkpoint, caplog.at_level(logging.CRITICAL):
        assert set(checkpoint.finished(LAYERS, spec)) == {0}
        for position in (*header, *data):
            path.write_bytes(sound)
            flip(path, position, position % 8)
            assert checkpoint.finished(LAYERS, spec) == {}, f"bit {position % 8} of byte {position}"


def test_a_file_of_another_run_is_refused_and_left_alone(whole, tmp_path):
    with created(tmp_path / "other", {**IDENTITY, "--wbits": 3}) as checkpoint:
        quantize(settings(bits=BitSettings(3, 4)), checkpoint)
    folder = copy_of(whole, tmp_path)
    shutil.copy(layer_file(tmp_path / "other", 1), layer_file(folder, 1))
    before = layer_bytes(folder)
    with resumed(folder) as checkpoint, pytest.raises(InputError, match=r"layer_001.safetensors: is of another run"):
        quantize(settings(), checkpoint)
    assert layer_bytes(folder) == before


def test_leftovers_of_a_killed_writer_are_removed_on_resume(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    for name in (".layer_001.safetensors.4711", ".layer_002.safetensors.12"):
        (folder / "layers" / name).write_bytes(b"half")
    with resumed(folder) as checkpoint:
        assert layer_content(folder) == layer_content(whole.folder)
        assert set(checkpoint.finished(LAYERS, decoder_spec(tiny_config()))) == {0, 1, 2}


RUN_JSON = {
    "missing": (None, "no checkpoint there"),
    "empty": ("", "run.json cannot be read"),
    "half": ('{"format": 1, "mod', "run.json cannot be read"),
    "not text": (b"\xff\xfe\x00", "run.json cannot be read"),
    "a list": ("[]", "run.json cannot be read"),
    "a number": ("3", "run.json cannot be read"),
    "another version": (json.dumps({"format": 99, **IDENTITY}), "another version"),
    "no version": (json.dumps(IDENTITY), "another version"),
    "without a setting": (json.dumps({"format": 1, "--wbits": 4}), "--lac"),
}


@pytest.mark.parametrize("case", RUN_JSON)
def test_a_run_json_that_is_not_sound_is_refused_and_nothing_changes(case, whole, tmp_path):
    content, message = RUN_JSON[case]
    folder = copy_of(whole, tmp_path)
    (folder / "run.json").unlink()
    if content is not None:
        (folder / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = snapshot(folder)
    with pytest.raises(InputError, match=message) as refused:
        Checkpoint.resume(folder, IDENTITY)
    assert str(folder) in str(refused.value)
    assert snapshot(folder) == before


def test_every_difference_is_listed_with_its_flag_and_nothing_changes(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    before = snapshot(folder)
    with pytest.raises(InputError) as refused:
        Checkpoint.resume(folder, {**IDENTITY, "--wbits": 3, "--lac": None})
    assert "--wbits was 4, is 3" in str(refused.value)
    assert "--lac was 0.95, is None" in str(refused.value)
    assert "model config" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert snapshot(folder) == before


def test_run_json_tells_the_version_and_every_setting(whole):
    saved = json.loads((whole.folder / "run.json").read_text())
    assert saved == {"format": 1, "model": "tiny", **IDENTITY}


def test_create_on_an_existing_checkpoint_is_refused_and_says_how_to_go_on(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    before = snapshot(folder)
    with pytest.raises(InputError, match=f"--resume {folder}"):
        Checkpoint.create(folder, IDENTITY, "tiny", 0)
    assert snapshot(folder) == before


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file's content and every folder below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_full_disk_is_noticed_at_the_start_and_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9 - 10, free=10))
    (tmp_path / "mine.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="5 MB are needed, 0 MB are free"):
        Checkpoint.create(tmp_path / "deep/run", IDENTITY, "tiny", 5_000_000)
    with pytest.raises(InputError, match="are needed"):
        Checkpoint.create(tmp_path, IDENTITY, "tiny", 5_000_000)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_place_that_cannot_be_written_is_named(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=f"--save_dir {tmp_path / name}: cannot be written"):
        Checkpoint.create(tmp_path / name, IDENTITY, "tiny", 0)
    with pytest.raises(InputError, match=f"--resume {tmp_path / name}: "):
        Checkpoint.resume(tmp_path / name, IDENTITY)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_folder_is_refused_at_the_start(whole, tmp_path, monkeypatch):
    folder = copy_of(whole, tmp_path)
    before = snapshot(folder)

    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("quantize.checkpoint.os.open", read_only)  # root may write anywhere, so it is pretended
    with pytest.raises(InputError, match=f"--resume {folder}: cannot be written .Read-only file system"):
        Checkpoint.resume(folder, IDENTITY)
    assert snapshot(folder) == before
    with pytest.raises(InputError, match=r"cannot be written .Read-only file system"):
        Checkpoint.create(tmp_path / "new", IDENTITY, "tiny", 0)


HOLDER = """
import sys, time
from pathlib import Path
from quantize.checkpoint import Checkpoint
import json
checkpoint = Checkpoint.resume(Path(sys.argv[1]), json.loads(sys.argv[2]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_ends(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    command = [sys.executable, "-c", HOLDER, str(folder), json.dumps(IDENTITY)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(InputError, match=f"another run is writing there .process {holder.pid} on "):
                Checkpoint.resume(folder, IDENTITY)
            (folder / "run.json").rename(folder / "away")
            with pytest.raises(InputError, match="another run is writing there"):
                Checkpoint.create(folder, IDENTITY, "tiny", 0)
            assert not (folder / "run.json").exists()
            (folder / "away").rename(folder / "run.json")
        finally:
            holder.send_signal(signal.SIGKILL)
    with resumed(folder) as checkpoint:
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        assert set(checkpoint.finished(LAYERS, decoder_spec(tiny_config()))) == {0, 1, 2}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_costs_a_warning_only(number, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", flock_that_fails(number))
    with created(tmp_path / "run") as checkpoint:
        quantize(settings(), checkpoint)
    assert f"{tmp_path / 'run'}: cannot be locked there ({os.strerror(number)})" in caplog.text
    (tmp_path / "run/layers/layer_001.safetensors").unlink()
    with resumed(tmp_path / "run") as checkpoint:
        assert quantize(settings(), checkpoint).computed == [1]


def test_a_lock_that_fails_otherwise_is_refused_with_the_system_s_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", flock_that_fails(errno.EIO))
    with pytest.raises(InputError, match=r"--save_dir .*cannot be written \(Input/output error\)"):
        Checkpoint.create(tmp_path / "run", IDENTITY, "tiny", 0)


def flock_that_fails(number: int) -> Callable[[int, int], None]:
    """What such a file system answers; none can be mounted for a test."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("name", CASES)
def test_the_space_needed_is_known_beforehand(name, tmp_path):
    config, shape = CASES[name]
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(tiny_config(num_hidden_layers=LAYERS, **shape))
    predicted = checkpoint_bytes(skeleton, decoder_spec(skeleton.config), config)
    with created(tmp_path / "run") as checkpoint:
        quantize(config, checkpoint, shape)
    actual = sum(len(content) for content in layer_bytes(tmp_path / "run").values())
    assert actual <= predicted
    assert predicted - actual <= 0.2 * actual + LAYERS * 2**16
