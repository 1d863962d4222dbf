"""Which lm-eval tasks are to be evaluated, on whose items: found out from names and files alone, before any weights."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.tasks.data import load_dataset, read_items
from utils.errors import InputError, Missing
from utils.io import file_digest

if TYPE_CHECKING:
    from datasets import DatasetDict
    from lm_eval.tasks import TaskManager

ROOT = Path(__file__).resolve().parents[2]
OWN_TASKS = Path(__file__).parent
BUNDLED = {"stories_qa": ROOT / "assets/stories/questions.jsonl"}
PAPER_TASKS = ("arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq", "piqa")
PAPER_FOLDERS = ("arc", "hellaswag", "winogrande", "super_glue/boolq", "piqa")  # where lm-eval describes them


@dataclass(frozen=True)
class TaskPlan:
    """What is evaluated. A unit is a task or a group; tags have been replaced by their tasks.

    `members` has the tasks of every unit. `files` has, by task and split, the local file that is read; a task that is
    not there comes from the hub. `digests` are the sha256 of those files by "task/split".
    """

    units: tuple[str, ...]
    members: dict[str, tuple[str, ...]]
    num_fewshot: int | None
    files: dict[str, dict[str, str]]
    digests: dict[str, str]

    @property
    def identity(self) -> dict:
        """What the figures depend on, for the journal; where a file lies is not part of it."""
        return {
            "units": self.units,
            "num_fewshot": self.num_fewshot,
            "items": self.digests,
            "lm_eval": version("lm_eval"),
        }

    def from_hub(self, unit: str) -> bool:
        """Whether any items of the unit must come from the hub."""
        return any(task not in self.files for task in self.members[unit])


def check_tasks(names: Sequence[str], data_dir: Path | None = None, num_fewshot: int | None = None) -> TaskPlan:
    """Find the tasks and check every line of the local files they need. Takes seconds: lm-eval has 14,000 tasks.

    Raises InputError for an unknown task (naming close matches), a task that would run code a model wrote, and a
    missing or malformed data file (naming its line).
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"--num_fewshot: {num_fewshot} is negative")
    if not names:
        raise InputError("--tasks: no task is named")
    if data_dir is not None and not data_dir.is_dir():
        raise Missing(f"--task_data_dir: {data_dir} is not a folder")
    index = task_index(all(name in (*PAPER_TASKS, *BUNDLED) for name in names))
    for name in names:
        if name not in index:
            close = get_close_matches(name, index, n=5, cutoff=0.7)
            hint = f"close matches: {', '.join(close)}" if close else "`lm-eval ls tasks` lists all"
            raise InputError(f"--tasks: lm-eval has no task or group '{name}'; {hint}")
    units = tuple(dict.fromkeys(unit for name in names for unit in _units(name, index)))
    members = {unit: tuple(dict.fromkeys(_members(unit, index))) for unit in units}
    files = {}
    for task in dict.fromkeys(task for tasks in members.values() for task in tasks):
        if _settings(task, index).get("unsafe_code"):
            raise InputError(f"--tasks: {task} would run code that the model wrote, which is not supported")
        if data_dir is not None or task in BUNDLED:
            files[task] = _files(task, index, data_dir, num_fewshot)
    for task, paths in files.items():
        for path in paths.values():
            read_items(task, Path(path))
    digests = {f"{task}/{split}": file_digest(path) for task in files for split, path in files[task].items()}
    return TaskPlan(units, members, num_fewshot, files, digests)


@functools.cache
def task_index(paper_only: bool) -> Mapping:
    """lm-eval's index of tasks, groups and tags (name → entry), and ours; `paper_only` spares it 14,000 files."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    paths = [folder / name for name in PAPER_FOLDERS] if paper_only else [folder]
    with quiet_logger("lm_eval"):
        return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[*paths, OWN_TASKS]).task_index


def task_manager(plan: TaskPlan) -> "TaskManager":
    """lm-eval's manager of the plan's tasks, which loads those with local files from them.

    Nothing else of a task is changed: prompts, filters and metrics are lm-eval's.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    index = task_index(all(unit in (*PAPER_TASKS, *BUNDLED) for unit in plan.units))
    manager = TaskManager(include_defaults=False)
    manager.task_index.update(index)
    for task, files in plan.files.items():
        settings = load_yaml(index[task].yaml_path, resolve_func=True)
        dataset = functools.partial(_dataset, task, files, _splits(settings))
        settings = {**settings, "custom_dataset": dataset, "dataset_kwargs": None}
        manager.task_index[task] = dataclasses.replace(index[task], yaml_path=None, cfg=settings)
    return manager


def _dataset(task: str, files: Mapping[str, str], splits: tuple[str, ...], /, **metadata: object) -> "DatasetDict":
    """Load the items; lm-eval calls this with the task's metadata, of which they do not depend."""
    return load_dataset(task, files, splits)


@contextlib.contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Let only errors of a library through."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _units(name: str, index: Mapping) -> Sequence[str]:
    """A tag's tasks, or the task or group itself."""
    entry = index[name]
    return sorted(entry.tags) if entry.kind.name == "TAG" else [name]


def _members(spec: str | dict, index: Mapping) -> Iterator[str]:
    """The tasks of a task, group or tag, or of an entry of a group's list."""
    name = spec if isinstance(spec, str) else spec.get("group", spec.get("task"))
    entry = index.get(name)
    inside = spec if entry is None else entry.cfg  # what is not in the index is described where it is listed
    if entry is not None and entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    elif isinstance(inside, dict) and isinstance(inside.get("task"), list):
        for child in inside["task"]:
            yield from _members(child, index)
    else:
        yield name


def _settings(task: str, index: Mapping) -> dict:
    entry = index.get(task)
    return entry.cfg or {} if entry is not None else {}


def _splits(settings: Mapping) -> tuple[str, ...]:
    """Every split that a task's description names."""
    example = settings.get("fewshot_config")
    named = [settings.get(f"{kind}_split") for kind in ("test", "validation", "training", "fewshot")]
    named.append(example.get("split") if isinstance(example, dict) else None)
    return tuple(dict.fromkeys(split for split in named if split))


def needed_splits(settings: Mapping, num_fewshot: int | None) -> tuple[str, ...]:
    """The split that is evaluated and, if there are examples in the prompt, the one they are drawn from."""
    evaluated = settings.get("test_split") or settings.get("validation_split")
    shots = settings.get("num_fewshot")
    if num_fewshot is not None and shots != 0:  # lm-eval lets a task insist on no examples
        shots = num_fewshot
    example = settings.get("fewshot_config")
    example = example if isinstance(example, dict) else {}
    if not shots or example.get("samples") is not None:
        return (evaluated,)
    sources = (example.get("split"), *(settings.get(f"{kind}_split") for kind in ("fewshot", "training", "validation")))
    return tuple(dict.fromkeys((evaluated, next(filter(None, sources), evaluated))))


def _files(task: str, index: Mapping, data_dir: Path | None, num_fewshot: int | None) -> dict[str, str]:
    """The local file of every split the task needs. Raises InputError if one is missing."""
    settings = _settings(task, index)
    if "class" in settings or not _splits(settings):
        raise InputError(f"--task_data_dir: {task} is a task of lm-eval that loads its items itself; leave it out")
    splits = needed_splits(settings, num_fewshot)
    if task in BUNDLED and (data_dir is None or not (data_dir / task).is_dir()):
        if num_fewshot:
            raise InputError(f"--num_fewshot: {task} has no items to draw examples from")
        return {splits[0]: str(BUNDLED[task])}
    paths = {split: data_dir / task / f"{split}.jsonl" for split in splits}
    for path in paths.values():
        if not path.is_file():
            raise Missing(f"--task_data_dir: {path} is missing; {task} needs it")
    return {split: str(path) for split, path in paths.items()}
