"""Where tracked figures go: TensorBoard's event files, or Weights & Biases. Opening one imports its library."""

import json
import logging
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from utils.errors import InputError

OPENING = 30  # seconds that Weights & Biases' server gets to answer before the run ends
CLOSING = 60  # seconds that the last figures get to be uploaded
WITHOUT_SERVER = ("offline", "dryrun", "disabled")  # of WANDB_MODE
logger = logging.getLogger(__name__)


class Sink(Protocol):
    """What a tracking library must do. Its methods may raise whatever the library raises."""

    def scalars(self, values: dict[str, float], axis: str, step: int) -> None:
        """Add a point to the curve of every tag, at `step` of `axis` (layer, epoch)."""

    def final(self, values: dict[str, float]) -> None:
        """Note figures of the run as a whole."""

    def close(self, failed: bool) -> None:
        """Write or send what is left, and whether the run failed."""


class TensorBoard:
    """Event files in a new folder `logdir/[part/]<time>`. TensorBoard cannot mark a run as failed."""

    def __init__(self, logdir: Path, part: str, settings: dict):
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.writer = SummaryWriter(str(new_folder(logdir / part)))
            self.writer.add_text("settings", as_code(settings))
            self.writer.flush()
        except OSError as error:
            raise InputError(f"--track tensorboard: {logdir} cannot be written ({error.strerror or error})") from None
        logger.info("tracking: tensorboard --logdir %s", shlex.quote(str(logdir)))

    def scalars(self, values: dict[str, float], axis: str, step: int) -> None:
        """Write points; the axis is not named, every tag has one of its own."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()  # who looks on sees every layer when it is done

    def final(self, values: dict[str, float]) -> None:
        """Write each figure as a curve of one point."""
        self.scalars(values, "run", 0)

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self.writer.close()


@contextmanager
def _wandb_errors() -> Iterator[None]:
    """What a user can mend of Weights & Biases' errors, as InputError."""
    import wandb

    try:
        yield
    except (wandb.Error, OSError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")  # what follows is for programmers
        advice = "log in with `wandb login`, or set WANDB_MODE=offline and upload the run later"
        raise InputError(f"--track wandb cannot begin ({reason}): {advice}") from None
    except ValueError as error:
        reason = " ".join(str(error).split()).split(" [type=")[0]
        raise InputError(f"--track wandb: {reason}; correct it among the WANDB_ variables") from None


def require_login() -> None:
    """Raise InputError unless Weights & Biases' server knows this user, or WANDB_MODE needs none. Asks for no key."""
    import wandb

    with _wandb_errors():
        # Silent before anything else: neither lines between those of the run, nor a question where nobody may be.
        mode = wandb.setup(settings=wandb.Settings(silent=True)).settings.mode
        if mode not in WITHOUT_SERVER and not wandb.login(prompt=False):
            raise wandb.Error("not logged in")


class WandB:
    """A run of Weights & Biases, in `folder/wandb`; where WANDB_MODE is offline it stays there until it is synced.

    `require_login` comes first.
    """

    def __init__(self, folder: Path, name: str, settings: dict, group: str | None):
        import wandb

        with _wandb_errors():
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "duquant"),
                dir=str(folder),
                name=name,
                group=group,
                config=settings,
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=OPENING,
                    finish_timeout=CLOSING,
                    finish_timeout_raises=True,
                    # Figures and settings are what was asked to be sent; nothing of the machine or of the code beside.
                    host="",
                    disable_code=True,
                    save_code=False,
                    disable_git=True,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_disable_machine_info=True,
                    x_save_requirements=False,
                ),
            )
        for axis, tags in (("layer", "layers/*"), ("epoch", "lwc/*")):
            self.run.define_metric(axis, hidden=True, summary="none")
            self.run.define_metric(tags, step_metric=axis, summary="none")  # the summary is for the final figures
        self.sync = ""
        if self.run.disabled:
            logger.info("tracking: Weights & Biases is disabled by WANDB_MODE")
            return
        self.sync = f"wandb sync {shlex.quote(str(self.run.settings.sync_dir))}"
        logger.info("tracking: %s", f"offline; upload with {self.sync}" if self.run.offline else self.run.url)

    def scalars(self, values: dict[str, float], axis: str, step: int) -> None:
        """Log points together with where they are on the axis."""
        self.run.log({**values, axis: step})

    def final(self, values: dict[str, float]) -> None:
        """Put figures into the run's summary."""
        self.run.summary.update(values)

    def close(self, failed: bool) -> None:
        """End the run. Raises TimeoutError, saying what to do, if the network does not take the rest in time."""
        try:
            self.run.finish(exit_code=int(failed))
        except TimeoutError:
            raise TimeoutError(f"not everything could be uploaded; the rest: {self.sync}") from None


def new_folder(parent: Path) -> Path:
    """Make and return a folder in `parent` that is named after the time; one that is taken gets a number."""
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 1
    while True:
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def as_code(settings: dict) -> str:
    """`settings` as a block of JSON in Markdown."""
    lines = json.dumps(settings, indent=2, ensure_ascii=False).splitlines()
    return "\n".join(f"    {line}" for line in lines)
