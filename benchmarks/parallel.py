"""Training the clipping in one process and in two that share every batch.

    python benchmarks/parallel.py [--model DIR] [flags of main.py]

Runs main.py alone and under torchrun in turn, every process with one thread, and prints the median ratio of the
seconds that quantization took. As many cores as processes are needed for it to mean anything.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def quantize_seconds(flags: list[str], processes: int) -> float:
    """Seconds of quantization, LWC included, in that many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "main.py"), *flags]
        command += ["--output_dir", folder, "--lwc", "--no_eval_ppl"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        return json.loads(next(Path(folder).glob("*/results.json")).read_text(encoding="utf-8"))["seconds"]["quantize"]


def main() -> None:
    """Measure pairs and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "assets/tiny-llama"))
    parser.add_argument("--calib_dataset", default=str(ROOT / "assets/stories/calibration.txt"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    args, flags = parser.parse_known_args()
    flags = [
        *("--model", args.model, "--calib_dataset", args.calib_dataset, "--seqlen", "512", "--nsamples", "16"),
        *flags,
    ]
    flags = [*("--abits", "4", "--smooth", "--epochs", "3", "--batch_size", "4", "--max_rotation_step", "16"), *flags]
    pairs = [(quantize_seconds(flags, 1), quantize_seconds(flags, args.processes)) for _ in range(args.repeats)]
    for alone, shared in pairs:
        print(f"1 process {alone:.1f} s, {args.processes} processes {shared:.1f} s, ratio {alone / shared:.2f}")
    print(f"median ratio {statistics.median(alone / shared for alone, shared in pairs):.2f}")


if __name__ == "__main__":
    main()
