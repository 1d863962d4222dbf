"""What main.py is to measure of a model: all of it read and checked before weights are loaded."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from evaluation.conversation import Format, pick_format
from evaluation.endpoint import Endpoint, open_endpoint
from evaluation.mmlu import ENDINGS
from evaluation.mmlu_choices import encode_prompts
from evaluation.mmlu_data import Subject, digest, read_mmlu
from evaluation.mtbench import (
    HUB_QUESTIONS,
    HUB_REFERENCES,
    AnswerSettings,
    Question,
    QuestionId,
    Temperature,
    fetch_from_hub,
    read_questions,
    read_references,
)
from evaluation.task_plan import TaskPlan, check_tasks
from experiment.session import Setup
from models.load import longest_context, model_fingerprint
from utils import data
from utils.distributed import is_main
from utils.errors import InputError
from utils.placement import Memory, parse_memory

FULL, QUANTIZED = "full", "quantized"  # rows: the full-precision model, main.py's own; others are compare.py's
# Flags that say how a model is made; of those that follow from them, the content is compared and not the name.
MAKING = (
    *("dtype", "attn_implementation", "nsamples", "seqlen", "seed", "wbits", "abits", "group_size", "symmetric"),
    *("lac", "swc", "lwc", "epochs", "lwc_lr", "wd", "batch_size", "aug_loss"),
    *("smooth", "alpha", "smooth_weight_peak", "gqa_smooth", "act_scales"),
    *("transform", "block_size", "max_rotation_step", "permutation_times", "rotation_search"),
    *("rotation_order", "probe"),
)


@dataclass(frozen=True)
class Conversations:
    """MT-Bench: the questions, how they are put and answered, and who grades the answers (None: nobody)."""

    questions: tuple[Question, ...]
    form: Format
    settings: AnswerSettings
    references: Mapping[QuestionId, tuple[str, ...]]
    endpoint: Endpoint | None


@dataclass(frozen=True)
class Evaluations:
    """What is to be measured and how it is run; `identity`: what the figures depend on, beside the row.

    `windows` are token ids [N, T] by dataset label. None and empty: not asked for.
    """

    windows: dict[str, Tensor]
    divergence: bool
    compared: bool  # whether a report will show all of it beside the full-precision model's
    tasks: TaskPlan | None
    log_samples: bool
    subjects: tuple[Subject, ...]
    shots: tuple[int, ...]
    conversations: Conversations | None
    prompts: tuple[str, ...]
    max_new_tokens: int
    context: int
    limit: int | None
    batch_size: int | None
    spread: bool
    memory: Memory | None
    identity: dict

    def for_comparison(self) -> "Evaluations":
        """The part that the full-precision model is needed for, whether or not it is in the table.

        A report shows its scores; the divergence and completions need it anyway. Nobody compares conversations.
        """
        if self.compared:
            return replace(self, conversations=None)
        windows = self.windows if self.divergence else {}
        return replace(self, windows=windows, tasks=None, subjects=(), conversations=None)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to measure."""
        return not (self.windows or self.tasks or self.subjects or self.conversations or self.prompts)


def plan_evaluations(args: argparse.Namespace, setup: Setup) -> Evaluations:
    """Read and check the data of every evaluation asked for. Raises InputError for what is wrong with it."""
    tasks = check_tasks(args.tasks, args.task_data_dir, args.num_fewshot) if args.tasks else None
    subjects = read_mmlu(args.mmlu_data_dir, max(args.mmlu_shots)) if args.eval_mmlu else ()
    if subjects:
        encode_prompts(setup.tokenizer, ["Answer:"], ENDINGS)  # that its letters can be told apart
    identity = {"model": model_identity(args, setup), "limit": args.limit, "lm-eval": tasks and tasks.identity}
    return Evaluations(
        windows=test_windows(args, setup) if args.eval_ppl else {},
        divergence=args.eval_kl,
        compared=args.report,
        tasks=tasks,
        log_samples=args.log_samples,
        subjects=subjects,
        shots=tuple(dict.fromkeys(args.mmlu_shots)),
        conversations=plan_conversations(args, setup) if args.eval_mtbench else None,
        prompts=tuple(args.prompt),
        max_new_tokens=args.max_new_tokens or 64,
        context=longest_context(setup.config),
        limit=args.limit,
        batch_size=args.eval_batch_size,
        spread=args.multigpu,
        memory=parse_memory(args.max_memory) or None,
        identity=identity | {"MMLU": digest(subjects)},
    )


def plan_conversations(args: argparse.Namespace, setup: Setup) -> Conversations:
    """Read MT-Bench's questions and references, and ask the judge, if there is one, whether it would answer."""
    endpoint = None
    if args.judge_base_url is not None:
        endpoint = open_endpoint(args.judge_base_url, args.judge_model, args.judge_api_key_env)
        if is_main():
            endpoint.check()
    questions = args.mtbench_questions or fetch_from_hub(HUB_QUESTIONS, "--mtbench_questions")
    references = args.mtbench_references
    if references is None and endpoint is not None and args.mtbench_questions is None:
        references = fetch_from_hub(HUB_REFERENCES, "--mtbench_references")
    return Conversations(
        questions=read_questions(questions)[: args.limit],
        form=pick_format(setup.tokenizer, args.model, args.chat_format),
        settings=AnswerSettings(
            longest_context(setup.config), args.max_new_tokens or 1024, Temperature(args.mtbench_temperature), args.seed
        ),
        references=read_references(references) if references is not None else {},
        endpoint=endpoint,
    )


def test_windows(args: argparse.Namespace, setup: Setup) -> dict[str, Tensor]:
    """Token windows [N, T] of every test dataset, by label, cut to `--limit`."""
    windows: dict[str, Tensor] = {}
    for dataset in args.test_dataset:
        label = data.dataset_label(dataset)
        if label in windows:
            raise InputError(f"--test_dataset: two of them would be called {label}; rename a file or drop one")
        seqlen = args.seqlen if data.is_token_file(dataset) else setup.seqlen
        tokens = data.test_tokens(
            dataset, setup.tokenizer, seqlen=seqlen, cache_dir=args.cache_dir, vocab_size=setup.config.vocab_size
        )
        windows[label] = tokens[: args.limit]
    return windows


def model_identity(args: argparse.Namespace, setup: Setup) -> dict:
    """What decides every figure of a model that these flags make."""
    calibration = None if setup.tokens is None else data.data_fingerprint(setup.tokens)
    flags = {name: str(getattr(args, name)) for name in MAKING}
    return {"model": model_fingerprint(setup.source, setup.config), "calibration": calibration, **flags}
