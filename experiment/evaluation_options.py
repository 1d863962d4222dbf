"""The flags of evaluation: what is measured, on what."""

import argparse
from pathlib import Path

from utils.errors import InputError

# A flag that does nothing without the other one.
NEEDED_FLAGS = {
    "max_memory": "multigpu",
    "num_fewshot": "tasks",
    "task_data_dir": "tasks",
    "log_samples": "tasks",
    "mmlu_data_dir": "eval_mmlu",
    "mtbench_questions": "eval_mtbench",
    "mtbench_references": "eval_mtbench",
    "chat_format": "eval_mtbench",
    "judge_base_url": "eval_mtbench",
    "judge_model": "judge_base_url",
    "judge_api_key_env": "judge_base_url",
    "report_layers": "report",
}


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """What is measured, on what."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--limit", type=int, help="only this many windows, items of a task, questions of a subject")
    group.add_argument(
        "--eval_batch_size", type=_batch_size, help="sequences at a time, or auto: what fits (default: auto)"
    )
    group.add_argument(
        "--multigpu", action="store_true", help="spread the model over all GPUs for tasks, MMLU, MT-Bench and prompts"
    )
    group.add_argument(
        "--max_memory",
        nargs="+",
        default=[],
        metavar="DEVICE=SIZE",
        help="with --multigpu: as 0=20GiB 1=20GiB cpu=60GiB",
    )

    group = parser.add_argument_group("perplexity")
    group.add_argument("--eval_ppl", action="store_true", help="measure perplexity")
    group.add_argument(
        "--test_dataset",
        type=_names,
        nargs="+",
        action=_Flatten,
        default=["wikitext2"],
        help="one or more, separated by spaces or commas: wikitext2, ptb, c4, c4-new, or as for --calib_dataset "
        "(a token file's tensor is `test`) (default: wikitext2)",
    )
    group.add_argument(
        "--eval_kl", action="store_true", help="also the KL divergence from the full-precision model, per token"
    )

    add_task_options(parser)
    add_conversation_options(parser)


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Questions with known answers."""
    group = parser.add_argument_group("lm-eval tasks")
    group.add_argument(
        "--tasks",
        type=_names,
        nargs="+",
        action=_Flatten,
        default=[],
        help="lm-eval tasks, groups or tags: arc_easy,arc_challenge,hellaswag,winogrande,boolq,piqa are the paper's; "
        "stories_qa is about the bundled model's stories",
    )
    group.add_argument("--num_fewshot", type=int, help="examples in the prompt (default: what the task says, mostly 0)")
    group.add_argument(
        "--task_data_dir",
        type=Path,
        help="read DIR/<task>/<split>.jsonl, with the hub's field names, instead of the hub's datasets",
    )
    group.add_argument(
        "--log_samples", action="store_true", help="keep every item's prompt, answers and score in samples/"
    )

    group = parser.add_argument_group("MMLU")
    group.add_argument("--eval_mmlu", action="store_true", help="answer MMLU's questions")
    group.add_argument(
        "--mmlu_data_dir", type=Path, help="folder with dev/<subject>_dev.csv and test/<subject>_test.csv"
    )
    group.add_argument(
        "--mmlu_shots", type=int, nargs="+", default=[0, 5], help="examples before each question (default: 0 5)"
    )


def add_conversation_options(parser: argparse.ArgumentParser) -> None:
    """Text that the model writes."""
    group = parser.add_argument_group("prompts and MT-Bench")
    group.add_argument("--prompt", nargs="+", default=[], help="let both models complete these, and show it")
    group.add_argument(
        "--max_new_tokens", type=int, help="most tokens of a completion (default: 64) or an answer (default: 1024)"
    )
    group.add_argument("--eval_mtbench", action="store_true", help="answer MT-Bench's questions")
    group.add_argument("--mtbench_questions", type=Path, help="a file like question.jsonl (default: the hub's)")
    group.add_argument(
        "--mtbench_references",
        type=Path,
        help="reference answers for the judge (default: the hub's for its questions)",
    )
    group.add_argument(
        "--mtbench_temperature",
        choices=["greedy", "category"],
        default="greedy",
        help="the likeliest token, or drawn at the benchmark's temperature of the category",
    )
    group.add_argument(
        "--chat_format",
        choices=["template", "vicuna", "llama-2", "mistral", "plain"],
        help="how turns are written (default: the tokenizer's chat template, else by the model's name)",
    )
    group.add_argument("--judge_base_url", help="OpenAI-compatible endpoint that grades, like https://host/v1")
    group.add_argument("--judge_model", help="the model to ask there")
    group.add_argument("--judge_api_key_env", help="environment variable with the key (default: none is sent)")


def check_evaluation(args: argparse.Namespace) -> None:
    """Raise InputError for flags of evaluation that cannot be, alone or together."""
    for flag in ("limit", "max_new_tokens"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if args.eval_kl and not args.eval_ppl:
        raise InputError("--eval_kl is measured with perplexity: add --eval_ppl")
    if args.eval_mmlu and args.mmlu_data_dir is None:
        raise InputError("--eval_mmlu: say where its files are, with --mmlu_data_dir DIR")
    if min(args.mmlu_shots) < 0:
        raise InputError(f"--mmlu_shots {min(args.mmlu_shots)}: must be at least 0")
    for flag, needed in NEEDED_FLAGS.items():
        if getattr(args, flag) and not getattr(args, needed):
            raise InputError(f"--{flag} is for --{needed}: add it, or leave this out")


class _Flatten(argparse.Action):
    """Stores a list of lists as one list."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, [name for names in values for name in names])


def _names(text: str) -> list[str]:
    """The parts of a comma-separated list; a path that exists is not split."""
    return [text] if Path(text).exists() else [name for name in text.split(",") if name]


def _batch_size(text: str) -> int | None:
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 nor auto")
    return None if text == "auto" else int(text)
