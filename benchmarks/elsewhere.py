"""Whether a change is slower anywhere: the same work at two commits, in turn, on a machine that does nothing else.

    python benchmarks/elsewhere.py OLD NEW
    python benchmarks/elsewhere.py v1.0 HEAD --repeats 5 --only walk stream

Each commit is checked out beside the other (`git worktree`), and every work is run at one and at the other, which goes
first changing each time: the bundled model as run.sh and run_lwc.sh quantize it, with its layers read one by one, and
nothing but a walk of test windows. Seconds are those of the whole process, in one that begins with nothing kept. The
table has medians, and the median of the ratios of neighbours.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.results import format_table

ROOT = Path(__file__).resolve().parents[1]
DATA = ("--model", "{root}/assets/tiny-llama", "--calib_dataset", "{root}/assets/stories/calibration.txt")
DATA += ("--test_dataset", "{root}/assets/stories/test.txt", "--seqlen", "512", "--eval_ppl")
PAPER = ("--abits", "4", "--smooth", "--alpha", "0.6", "--lac", "0.9")
WORKS = {  # flags of main.py that both commits have
    "run.sh": (*DATA, *PAPER, "--swc", "0.8", "--tasks", "stories_qa"),
    "run_lwc.sh": (*DATA, *PAPER, "--lwc", "--nsamples", "32"),
    "stream": (*DATA, *PAPER, "--swc", "0.8", "--stream"),
    "walk": (*DATA, "--wbits", "16", "--abits", "16"),
}


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit, for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def seconds(root: Path, work: str, threads: int) -> float:
    """Of one run of the work with the code in `root`."""
    flags = [flag.format(root=root) for flag in WORKS[work]]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, str(root / "main.py"), *flags, "--quiet"],
            check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return time.perf_counter() - started


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    rows = []
    with ExitStack() as stack:
        old, new = (stack.enter_context(checked_out(commit)) for commit in args.commits)
        for work in args.only:
            pairs = []
            for number in range(args.repeats):
                taken = {root: seconds(root, work, args.threads) for root in ((old, new), (new, old))[number % 2]}
                pairs.append((taken[old], taken[new]))
                print(f"{work}: {taken[old]:.1f} s, {taken[new]:.1f} s", flush=True)
            medians = [statistics.median(each) for each in zip(*pairs, strict=True)]
            ratio = statistics.median(new / old for old, new in pairs)
            rows.append([work, *(f"{each:.1f}" for each in medians), f"{ratio:.2f}"])
    print(format_table(["work", f"{args.commits[0]} s", f"{args.commits[1]} s", "new / old"], rows))


if __name__ == "__main__":
    main()
