"""lm-eval tasks and MMLU on a model in full precision and quantized, and the same tasks by lm-eval alone.

    python benchmarks/tasks.py --model MODEL_DIR --calib_dataset TEXT --task_data_dir DIR --mmlu_data_dir DIR \\
        [flags of main.py]

Runs main.py on both models, then lm-eval's own evaluation of the full-precision model on the same items. Prints a table
per task and the largest difference between our full-precision figures and lm-eval's.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evaluation.tasks.plan import PAPER_TASKS, TaskPlan, check_tasks, task_index  # noqa: E402
from utils.results import format_table  # noqa: E402


def run_main(args: argparse.Namespace, flags: list[str], bits: int, folder: Path) -> dict:
    """results.json of one run of main.py."""
    command = [sys.executable, str(ROOT / "main.py"), "--model", args.model, "--output_dir", str(folder)]
    command += ["--tasks", ",".join(PAPER_TASKS), "--task_data_dir", str(args.task_data_dir)]
    command += ["--wbits", str(bits), "--abits", str(bits), *flags]
    if args.mmlu_data_dir is not None:
        command += ["--eval_mmlu", "--mmlu_data_dir", str(args.mmlu_data_dir)]
    subprocess.run(command, check=True)
    return json.loads(next(folder.glob(f"*_w{bits}a{bits}/results.json")).read_text(encoding="utf-8"))


def stock_results(model: str, plan: TaskPlan, limit: int | None) -> dict:
    """lm-eval's figures by task: its own adapter, loading and loop, on the same files."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    index = task_index(True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for task, files in plan.files.items():
            evaluated = next(iter(files.values()))  # splits that are not evaluated must exist all the same
            local = {split: files.get(split, evaluated) for split in ("train", "validation", "test")}
            settings = {"include": str(index[task].yaml_path), "task": task, "dataset_path": "json"}
            settings |= {"dataset_name": None, "dataset_kwargs": {"data_files": local, "cache_dir": f"{folder}/cache"}}
            Path(folder, f"{task}.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        manager, results = TaskManager(include_defaults=False, include_path=folder), {}
        lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=16)
        for task in plan.files:
            # it stops at an answer that is longer than the model's context
            with contextlib.suppress(AssertionError):
                results |= lm_eval.simple_evaluate(lm, tasks=[task], limit=limit, task_manager=manager)["results"]
        return results


def task_rows(full: dict, quantized: dict, stock: dict) -> list[list[str]]:
    """A row per task: accuracies of all three."""
    rows = []
    for one, other in zip(full["zero_shot"]["scores"], quantized["zero_shot"]["scores"], strict=True):
        for metric in ("acc", "acc_norm"):
            if metric in one["metrics"]:
                theirs = stock.get(one["task"], {}).get(f"{metric},none")
                values = (one["metrics"][metric], theirs, other["metrics"][metric], one["metrics"][f"{metric}_stderr"])
                cells = ["stops" if value is None else f"{value:.4f}" for value in values]
                rows.append([f"{one['task']} {metric}", str(one["items"]), *cells])
    return rows


def mmlu_rows(full: dict, quantized: dict) -> list[list[str]]:
    """A row per number of shots."""
    return [
        [
            f"MMLU {name.replace('_', '-')}",
            str(full["mmlu"][name]["questions"]),
            *(f"{full['mmlu'][name]['accuracy']:.4f}", "–", f"{quantized['mmlu'][name]['accuracy']:.4f}"),
            f"{full['mmlu'][name]['standard_error']:.4f}",
        ]
        for name in full["mmlu"]
    ]


def largest_difference(full: dict, stock: dict) -> float:
    """Between our figures and lm-eval's, over all tasks and metrics."""
    return max(
        abs(value - stock[score["task"]][f"{name},none"])
        for score in full["zero_shot"]["scores"]
        if score["task"] in stock
        for name, value in score["metrics"].items()
    )


def main() -> None:
    """Run all three and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task_data_dir", type=Path, required=True)
    parser.add_argument("--mmlu_data_dir", type=Path)
    parser.add_argument("--limit", type=int)
    args, flags = parser.parse_known_args()
    if args.limit is not None:
        flags += ["--limit", str(args.limit)]
    with tempfile.TemporaryDirectory() as folder:
        full, quantized = (run_main(args, flags, bits, Path(folder)) for bits in (16, 4))
    plan = check_tasks(PAPER_TASKS, args.task_data_dir)
    stock = stock_results(args.model, plan, args.limit)
    rows = [*task_rows(full, quantized, stock), *mmlu_rows(full, quantized)]
    print(format_table([Path(args.model).name, "items", "full precision", "lm-eval alone", "W4A4", "±"], rows))
    print(f"largest difference from lm-eval alone: {largest_difference(full, stock):.2e}")


if __name__ == "__main__":
    main()
