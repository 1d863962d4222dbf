"""Running the real scripts many times: each run is a process of its own, but torch is imported once."""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Runs scripts again and again without importing torch each time: one or more forked processes per line of JSON.
STARTER = """
import json, os, resource, runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
sys.path.insert(0, sys.argv[1])
import experiment.run

def start(job, variables):
    pid = os.fork()
    if pid:
        return pid
    if variables:
        signal.alarm(300)  # of several, one may wait for another for ever
    os.environ.update(variables)
    os.chdir(job["folder"])
    if job["largest"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"],) * 2)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.argv = job["argv"]
    code = 0
    try:
        exec(job["first"], {})
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def end_of(pids):
    code, patience = 0, None
    while pids:
        pid, status = os.waitpid(-1, 0 if patience is None else os.WNOHANG)
        if pid:
            pids.remove(pid)
            code = code or os.waitstatus_to_exitcode(status)
            patience = time.monotonic() + 10 if code and patience is None else patience
        elif time.monotonic() > patience:  # others may wait for one that failed
            for each in pids:
                os.kill(each, signal.SIGKILL)
        time.sleep(0 if patience is None else 0.05)
    return code

for line in sys.stdin:
    job = json.loads(line)
    pids = [start(job, variables) for variables in job["processes"]]
    print(pids[0], flush=True)
    print(end_of(pids), flush=True)
"""


@dataclass
class Ended:
    """How a run ended."""

    returncode: int
    stdout: str
    stderr: str


class Starter:
    """Runs the scripts in processes of their own, forked from one that has imported what they need."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def run(
        self,
        folder: Path,
        *flags: object,
        script: str = "main.py",
        meanwhile: Callable[[int], None] | None = None,
        processes: int = 1,
        largest: int | None = None,
        first: str = "",
    ) -> Ended:
        """Run a script of the suite, or one at a path, in `folder`, in `processes` that share the run.

        `meanwhile` is called with the id of the first; no file can be made `largest` bytes large, or larger; `first`
        is a program that each process runs before, to replace what should fail.
        """
        out, err = self.scratch / "stdout", self.scratch / "stderr"
        for path in (out, err):
            path.unlink(missing_ok=True)
        argv = [str(ROOT / script), *map(str, flags)]
        job = {"folder": str(folder), "argv": argv, "stdout": str(out), "stderr": str(err)}
        job |= {"largest": largest, "first": first}
        job["processes"] = [{}] if processes == 1 else environments(processes)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if meanwhile is not None:
            meanwhile(pid)
        code = int(self.process.stdout.readline())
        return Ended(code, out.read_text(), err.read_text())


def environments(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each of the processes of a run on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


@functools.cache
def shared_starter() -> Starter:
    """The one starter of this test session."""
    scratch = tempfile.TemporaryDirectory(prefix="starter_")
    starter = Starter(Path(scratch.name))
    atexit.register(scratch.cleanup)
    atexit.register(starter.process.stdin.close)
    return starter
