"""How much sharing the few-shot prefix saves: MMLU as it is evaluated here, and one prompt at a time.

    python benchmarks/mmlu.py
    python benchmarks/mmlu.py --shape 512 8 2048
    python benchmarks/mmlu.py --model MODEL_DIR --mmlu_data_dir DIR --subjects anatomy virology --limit 50

One at a time means: encode a prompt, run the model on it, read the letters at its last position and nowhere else.
Without --mmlu_data_dir the questions are made of words of the bundled stories, about as long as MMLU's. Prints medians
over turns, the median ratio, and whether the answers are the same.
"""

import argparse
import csv
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.mmlu.answers import ENDINGS, SubjectScore, answer_subject
from evaluation.mmlu.choices import Prompt, cut_left, encode_prompts, ending_log_probabilities
from evaluation.mmlu.data import LETTERS, Subject, prompt, read_mmlu
from models.load import ModelSource, load_config, load_model, load_tokenizer
from utils.results import format_table

ROOT = Path(__file__).resolve().parents[1]


def write_questions(folder: Path, subjects: int, questions: int) -> None:
    """Write made-up subjects in MMLU's layout: 25 words of question and 4 × 6 of choices, always the same."""
    generator = random.Random(0)
    words = (ROOT / "assets/stories/test.txt").read_text(encoding="utf-8").split()
    for split, count in (("dev", 5), ("test", questions)):
        (folder / split).mkdir()
        for subject in range(subjects):
            rows = [
                [*(" ".join(generator.choices(words, k=k)) for k in (25, 6, 6, 6, 6)), generator.choice(LETTERS)]
                for _ in range(count)
            ]
            with open(folder / split / f"made_up_{subject}_{split}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(rows)


def answer_one_at_a_time(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, subject: Subject, shots: int, device, context: int
) -> list[str]:
    """The letters given to a subject's questions, each prompt on its own."""
    endings = encode_prompts(tokenizer, [prompt(subject, subject.questions[0], 0)], ENDINGS)[0].endings
    answers = []
    for question in subject.questions:
        for count in range(shots, -1, -1):
            ids = tokenizer(prompt(subject, question, count) + ENDINGS[0]).input_ids
            encoded = Prompt(tuple(ids[: -len(endings[0])]), endings)
            if len(encoded) <= context:
                break
        (scores,) = ending_log_probabilities(model, [cut_left(encoded, context, tokenizer)], device)
        answers.append(LETTERS[scores.argmax().item()])
    return answers


def open_model(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model of --model, or random weights of --shape under its tokenizer."""
    source = ModelSource(args.model)
    config, tokenizer = load_config(source), load_tokenizer(source)
    if args.shape is None:
        return load_model(source, config, torch.float32, "sdpa").to(device), tokenizer
    hidden, layers, context = args.shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=context,
    )
    return LlamaForCausalLM(config).eval().to(device), tokenizer


def timed(work) -> tuple[float, list[str] | SubjectScore]:
    """Seconds of `work()`, and what it returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def compare(model, tokenizer, subjects: list[Subject], shots: int, device, repeats: int, batch_size: int | None):
    """A row of the table: both evaluations in turn, `repeats` times for every subject."""
    turns, same, used = [], True, []
    for subject in subjects * repeats:
        common = (model, tokenizer, subject, shots, device, model.config.max_position_embeddings)
        alone, expected = timed(lambda common=common: answer_one_at_a_time(*common))
        here, score = timed(lambda common=common: answer_subject(*common, batch_size))
        turns.append((alone / score.questions, here / score.questions))
        same = same and expected == [answer.predicted for answer in score.answers]
        used.append(score.average_shots)
    seconds = [f"{1000 * statistics.median(side):.1f}" for side in zip(*turns, strict=True)]
    ratio = statistics.median(alone / here for alone, here in turns)
    return [f"{shots}-shot", f"{statistics.mean(used):.2f}", *seconds, f"{ratio:.1f}", "yes" if same else "NO"]


def main() -> None:
    """Time both in turn, subject by subject, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "assets/tiny-llama"))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("HIDDEN", "LAYERS", "CONTEXT"))
    parser.add_argument("--mmlu_data_dir", type=Path)
    parser.add_argument("--subjects", nargs="+", help="names of subjects; default the first three")
    parser.add_argument("--limit", type=int, default=40, help="questions of a subject")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 5])
    parser.add_argument("--eval_batch_size", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    model, tokenizer = open_model(args, device)
    with tempfile.TemporaryDirectory() as made_up:
        if args.mmlu_data_dir is None:
            write_questions(Path(made_up), 3, args.limit)
        subjects = read_mmlu(args.mmlu_data_dir or Path(made_up))
    chosen = [each for each in subjects if each.name in args.subjects] if args.subjects else subjects[:3]
    chosen = [Subject(each.name, each.examples, each.questions[: args.limit]) for each in chosen]
    compare(model, tokenizer, chosen[:1], 0, device, 1, args.eval_batch_size)  # warm up
    rows = [
        compare(model, tokenizer, chosen, shots, device, args.repeats, args.eval_batch_size) for shots in args.shots
    ]
    context, shape = model.config.max_position_embeddings, " × ".join(map(str, args.shape or ()))
    print(f"{args.model} {shape} context {context}, {args.limit} questions of {', '.join(s.name for s in chosen)}")
    print(format_table(["per question", "shots used", "alone ms", "here ms", "ratio", "same answers"], rows))


if __name__ == "__main__":
    main()
