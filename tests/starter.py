"""Running the real scripts many times: each run is a process of its own, but torch is imported once."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Runs scripts again and again without importing torch each time: one forked process per line of JSON.
STARTER = """
import json, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
sys.path.insert(0, sys.argv[1])
import experiment.run
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(job["folder"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job[name], os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.argv = job["argv"]
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
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
    ) -> Ended:
        """Run a script in `folder`; `meanwhile` is called with the process id."""
        out, err = self.scratch / "stdout", self.scratch / "stderr"
        argv = [str(ROOT / script), *map(str, flags)]
        job = {"folder": str(folder), "argv": argv, "stdout": str(out), "stderr": str(err)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if meanwhile is not None:
            meanwhile(pid)
        code = int(self.process.stdout.readline())
        return Ended(code, out.read_text(), err.read_text())


@functools.cache
def shared_starter() -> Starter:
    """The one starter of this test session."""
    scratch = tempfile.TemporaryDirectory(prefix="starter_")
    starter = Starter(Path(scratch.name))
    atexit.register(scratch.cleanup)
    atexit.register(starter.process.stdin.close)
    return starter
