"""The checkpoint folder: one file per finished layer, and what run they belong to.

    D/run.json                        format version, model, data, every setting that matters
    D/layers/layer_012.safetensors    the LayerState; in its metadata the run, a digest of the tensors, the layer's
    figures D/.lock                           held while a run writes here

Every file is written whole or not at all. A layer file is used only if its digest is right and it is of this run.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from pathlib import Path

import torch
from torch import Tensor

from quantize.observer import Observer
from quantize.settings import QuantSettings
from quantize.spec import DecoderSpec
from quantize.state import FinishedLayer, LayerState
from utils.errors import InputError
from utils.io import read_tensors, write_json, write_tensors
from utils.results import differences
from utils.settings import Changes, defaults, options

FORMAT = 1
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # of NFS, FUSE and cluster file systems
logger = logging.getLogger(__name__)


class Checkpoint(Observer):
    """A checkpoint folder that this process holds the lock of. Made by `create` or `resume`."""

    def __init__(self, folder: Path, identity: dict, lock: int):
        self.folder = folder
        self.run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._lock = lock  # the open file keeps it; it ends with the process, however that ends

    @classmethod
    def create(cls, folder: Path, identity: dict, model_name: str, needed: int) -> "Checkpoint":
        """Begin a checkpoint of the run `identity` describes, which will need about `needed` bytes.

        `model_name` is kept for people to read.

        Raises InputError, and changes nothing, if there is one already, if the folder cannot be written or is too
        small, or if another process is writing there.
        """
        require_new(folder)
        try:
            free = shutil.disk_usage(_nearest_existing(folder)).free
            if free < needed:
                raise InputError(f"--save_dir {folder}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
            (folder / "layers").mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
            write_json(folder / "run.json", {"format": FORMAT, "model": model_name, **identity})
        except OSError as error:
            raise InputError(f"--save_dir {folder}: cannot be written ({error.strerror})") from None
        return cls(folder, identity, lock)

    @classmethod
    def resume(cls, folder: Path, identity: dict) -> "Checkpoint":
        """Go on with a checkpoint, which must be of the run `identity` describes.

        Raises InputError that names every difference, or says what is wrong with the folder.
        """
        saved = require_same_run(folder, identity)
        try:
            lock = _lock(folder)
            # of a run that was killed while it wrote
            for leftover in (*folder.glob(".run.json.*"), *(folder / "layers").glob(".*")):
                leftover.unlink()
        except OSError as error:
            raise InputError(f"--resume {folder}: cannot be written ({error.strerror})") from None
        return cls(folder, saved, lock)

    def path(self, index: int) -> Path:
        """The file of one layer."""
        return self.folder / "layers" / f"layer_{index:03d}.safetensors"

    def layer_done(self, index: int, finished: FinishedLayer, restored: bool) -> None:
        """Write a layer that was not restored."""
        if restored:
            return
        tensors, figures_json = finished.state.tensors(), json.dumps(finished.figures)
        metadata = {"run": self.run, "digest": _digest(self.run, index, tensors, figures_json), "figures": figures_json}
        try:
            write_tensors(self.path(index), tensors, metadata)
        except OSError as error:
            raise InputError(
                f"{self.path(index)}: cannot be written ({error.strerror}); mend it and --resume"
            ) from None

    def finished(self, layers: int, spec: DecoderSpec) -> dict[int, FinishedLayer]:
        """The layers that are there and sound, by index; a damaged file is logged, and left out to be computed anew.

        Raises InputError for a file of another run, which is left alone.
        """
        read = {index: self._read(index, spec) for index in range(layers) if self.path(index).exists()}
        return {index: layer for index, layer in read.items() if layer is not None}

    def _read(self, index: int, spec: DecoderSpec) -> FinishedLayer | None:
        path = self.path(index)
        try:
            tensors, metadata = read_tensors(path)
        except InputError as error:
            logger.warning("%s; this layer is computed again", error)
            return None
        run, figures_json = metadata.get("run", ""), metadata.get("figures", "")
        if metadata.get("digest") != _digest(run, index, tensors, figures_json):
            logger.warning("%s: damaged (its digest is wrong); this layer is computed again", path)
            return None
        if run != self.run:
            raise InputError(f"{path}: is of another run; move it away to have the layer computed")
        return FinishedLayer(LayerState.from_tensors(tensors, spec.at(index)), json.loads(figures_json))


def require_new(folder: Path) -> None:
    """Raise InputError if `folder` holds a checkpoint already."""
    if (folder / "run.json").exists():
        raise InputError(f"--save_dir {folder}: holds a checkpoint; go on with --resume {folder}, or choose another")


def require_same_run(folder: Path, identity: dict) -> dict:
    """The identity that the checkpoint in `folder` was begun with: that of this run, `identity`.

    A setting that did not exist then had its default, and one that does not decide layers may differ. Raises
    InputError, naming every difference, if it is another's.
    """
    saved = read_run(folder)
    if saved.pop("format", None) != FORMAT:
        raise InputError(f"--resume {folder}: made by another version of this suite; quantize again")
    saved.pop("model", None)  # where it was then; its digests decide
    usual = {f"--{name}": value for name, value in defaults(QuantSettings).items()}
    idle = {f"--{each.name}" for each in options(QuantSettings) if each.changes < Changes.LAYERS}
    then = {key: value for key, value in saved.items() if key not in idle}
    different = differences({key: usual[key] for key in identity if key in usual} | then, identity)
    if different:
        raise InputError(f"--resume {folder}: is of another run: {'; '.join(different)}")
    return saved


def read_run(folder: Path) -> dict:
    """The content of run.json. Raises InputError if there is none that can be read."""
    try:
        saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--resume {folder}: no checkpoint there (no run.json)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"--resume {folder}: run.json cannot be read ({error})") from None
    if not isinstance(saved, dict):
        raise InputError(f"--resume {folder}: run.json cannot be read (it is no JSON object)")
    return saved


def _nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _lock(folder: Path) -> int:
    """Take the folder's lock. The system frees it when the holder ends, so a lock is never stale.

    Where the file system has no locks, a warning takes its place: a file that marks the folder would stay behind a run
    that is killed.
    """
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        raise InputError(f"{folder}: another run is writing there ({holder or 'unknown process'})") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(handle)
            raise
        logger.warning("%s: cannot be locked there (%s); see that no other run writes to it", folder, error.strerror)
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def _digest(run: str, index: int, tensors: dict[str, Tensor], figures_json: str) -> str:
    digest = hashlib.sha256(f"{run} {index} {figures_json}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
