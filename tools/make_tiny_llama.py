"""Make the bundled model: a small Llama trained on generated stories, then given the outliers of a large one.

    python tools/make_tiny_llama.py                     # everything, about an hour on a CPU
    python tools/make_tiny_llama.py --stage outliers    # put the outliers into the trained model again
    python tools/make_tiny_llama.py --stage texts       # only write the texts and questions again

The training stage keeps the clean model in `--work_dir` (and resumes from its last checkpoint there); the outlier stage
reads it and writes `--output` and the texts and questions beside it. The same seed gives the same text, tokenizer and
procedure everywhere; the last bits of the weights depend on the machine's floating-point kernels.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.outliers import OutlierSettings, add_outliers_, mlp_activations  # noqa: E402
from tools.stories import CHOICES, Question, generate_stories, join_stories  # noqa: E402
from utils.io import read_tensors, write_atomically, write_json, write_tensors  # noqa: E402

VOCABULARY = 512
SEQLEN = 512
# MLP neurons whose down_proj column is held at zero in training, in each layer: what they compute changes nothing.
RESERVED_NEURONS = (77, 211, 402, 588)
# How much more the tokens of an answer count in the training loss.
ANSWER_WEIGHT = 5
# Stories of different seeds are independent draws: training text is `seed`, then these offsets.
VALIDATION, CALIBRATION, TEST, QUESTIONS = 1, 2, 3, 4
CALIBRATION_STORIES = 360
TEST_STORIES = 150
QUESTION_KINDS = ("who", "where_thing", "where_person", "colour", "number")
QUESTIONS_PER_CELL = 20  # of every kind, with the right answer at every position: 300 in all


def stories_text(count: int, seed: int) -> str:
    """Return `count` stories as one text, a blank line between them."""
    return join_stories(generate_stories(count, seed))


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of VOCABULARY entries on `text`; like Llama's it puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=2 * SEQLEN
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Tokenize a long text without <s>, story by story (fast): int16 [tokens]."""
    stories = text.replace("\n\n", "\n\n\0").split("\0")
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(stories, add_special_tokens=False)
    return torch.cat([torch.tensor(encoding.ids, dtype=torch.int16) for encoding in encodings])


def windows(tokens: Tensor) -> Tensor:
    """Cut a token stream [tokens] into windows [n, SEQLEN]; the rest is dropped."""
    count = len(tokens) // SEQLEN
    return tokens[: count * SEQLEN].view(count, SEQLEN).long()


def new_model(seed: int) -> LlamaForCausalLM:
    """Return the untrained model: 2.9 M parameters, grouped-query attention, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2 * SEQLEN,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)
    zero_reserved_(model)
    return model


@torch.no_grad()
def zero_reserved_(model: LlamaForCausalLM) -> None:
    """Set the down_proj columns of the reserved neurons to zero."""
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, list(RESERVED_NEURONS)] = 0


def answer_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Tensor) -> Tensor:
    """Mark the tokens of a stream [tokens] that stand between "Answer:" and the next full stop: bool."""
    answer, colon, stop = tokenizer.convert_tokens_to_ids(["ĠAnswer", ":", "."])
    position = torch.arange(len(tokens))
    begins = (tokens == colon) & (tokens.roll(1) == answer)
    last_begin = torch.where(begins, position, -1).cummax(0).values
    last_stop = torch.where(tokens == stop, position, 0).cummax(0).values
    return (last_begin > last_stop) & ~begins


def token_losses(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Return the next-token losses of windows [n, SEQLEN], in nats: float32 [n, SEQLEN − 1]."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2).float(), batch[:, 1:], reduction="none")


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, data: Tensor) -> float:
    """Return the mean loss over windows [n, SEQLEN], in the model's own precision."""
    return torch.cat([token_losses(model, batch) for batch in data.split(8)]).mean().item()


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers and AdamW for embeddings and norms.

    Here Muon reaches at step 300 the loss that AdamW reaches at step 500, and looking facts up is learned last.
    """
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    inside = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Return the rate at a step: linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write the weights and the optimizers' state in one safetensors file, atomically."""
    tensors = {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        tensors[f"{name}/weight"] = parameter
        for optimizer in optimizers:
            tensors |= {f"{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    write_tensors(path, tensors)


@torch.no_grad()
def load_checkpoint_(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> int:
    """Read the checkpoint, if there is one, into model and optimizers; return the number of steps already made."""
    if not path.exists():
        return 0
    tensors, _ = read_tensors(path)
    parameters = dict(model.named_parameters())
    for optimizer in optimizers:
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in parameters.items():
            if id(parameter) in owned:
                parameter.copy_(tensors[f"{name}/weight"])
                state = {
                    key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")
                }
                del state["weight"]
                optimizer.state[parameter] = state
    return int(tensors["step"])


def train_(model: LlamaForCausalLM, data: Tensor, weight: Tensor, held_out: Tensor, args: argparse.Namespace) -> None:
    """Train on windows [steps · batch, SEQLEN], each seen once, with a weight for each token's loss [the same shape].

    Weights are float32, arithmetic is bfloat16. Every 250 steps the state goes to `--work_dir`, from where an
    interrupted training goes on.
    """
    checkpoint = args.work_dir / "checkpoint.safetensors"
    optimizers = make_optimizers(model, args.lr)
    first = load_checkpoint_(checkpoint, model, optimizers)
    progress = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="training", mininterval=5)
    smooth = None
    for step in progress:
        rows = slice(step * args.batch_size, (step + 1) * args.batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            losses = token_losses(model, data[rows])
        ((losses * weight[rows, 1:]).sum() / weight[rows, 1:].sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr)
            optimizer.step()
            optimizer.zero_grad()
        zero_reserved_(model)
        loss = losses.mean().item()
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        progress.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            tqdm.write(f"step {step + 1}: training loss {smooth:.4f}, held-out loss {evaluate(model, held_out):.4f}")
            save_checkpoint(checkpoint, model, optimizers, step + 1)


def train_stage(args: argparse.Namespace) -> None:
    """Generate the stories, train tokenizer and model, and save the clean model (float16) in `--work_dir`."""
    tokenizer = make_tokenizer(stories_text(5000, args.seed))
    needed = args.steps * args.batch_size * SEQLEN
    per_story = len(encode(tokenizer, stories_text(2000, args.seed))) / 2000
    tokens = encode(tokenizer, stories_text(math.ceil(1.01 * needed / per_story), args.seed))
    data = windows(tokens)
    # The few tokens that must be looked up would otherwise drown in those that only fate decides.
    weight = windows(1 + (ANSWER_WEIGHT - 1) * answer_tokens(tokenizer, tokens))
    # Evaluation windows are cut anywhere, texts start with <s>: the model must know both beginnings.
    data[::2, 0] = tokenizer.bos_token_id
    held_out = windows(encode(tokenizer, stories_text(200, args.seed + VALIDATION)))
    print(f"{needed / 1e6:.1f} M training tokens, {per_story:.0f} a story")
    model = new_model(args.seed)
    train_(model, data, weight, held_out, args)
    model.half().save_pretrained(args.work_dir)
    tokenizer.save_pretrained(args.work_dir)


def write_texts(folder: Path, seed: int) -> None:
    """Write calibration.txt and test.txt: stories that training has not seen."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, offset, count in (("calibration", CALIBRATION, CALIBRATION_STORIES), ("test", TEST, TEST_STORIES)):
        (folder / f"{name}.txt").write_text(stories_text(count, seed + offset) + "\n", encoding="utf-8")


def select_questions(seed: int) -> Iterator[Question]:
    """Yield questions about stories of `seed`, one a story, until every kind and position has QUESTIONS_PER_CELL."""
    missing = dict.fromkeys(product(QUESTION_KINDS, range(CHOICES)), QUESTIONS_PER_CELL)
    for story in generate_stories(sys.maxsize, seed):
        wanted = [question for question in story.questions if missing[question.kind, question.answer_index]]
        if wanted:
            question = max(wanted, key=lambda question: missing[question.kind, question.answer_index])
            missing[question.kind, question.answer_index] -= 1
            yield question
        if not any(missing.values()):
            return


def questions_text(seed: int) -> str:
    """Return the questions as JSON Lines: prompt, choices, answer_index, kind."""
    return "".join(json.dumps(asdict(question)) + "\n" for question in select_questions(seed))


def write_questions(folder: Path, seed: int) -> None:
    """Write questions.jsonl: multiple-choice questions about stories that are in no text."""
    text = questions_text(seed + QUESTIONS)
    write_atomically(folder / "questions.jsonl", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sentence_ends(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids of the tokens that end a sentence."""
    return [token for token in range(VOCABULARY) if any(sign in tokenizer.decode([token]) for sign in ".!?")]


def print_magnitudes(model: LlamaForCausalLM, sample: Tensor) -> None:
    """Print how large the outliers are: largest and median magnitude of what the MLPs and down_proj read."""
    for index, states_and_hidden in enumerate(mlp_activations(model, sample)):
        magnitudes = [(x.abs().max().item(), x.abs().median().item()) for x in states_and_hidden]
        text = ", ".join(
            f"{name} max {high:.4g} median {middle:.3g} ratio {high / middle:.0f}"
            for name, (high, middle) in zip(("MLP input", "down_proj input"), magnitudes, strict=True)
        )
        print(f"layer {index}: {text}")


def texts_stage(args: argparse.Namespace) -> None:
    """Write the texts and the questions, which depend on the seed alone."""
    folder = args.output.parent / "stories"
    write_texts(folder, args.seed)
    write_questions(folder, args.seed)


def outlier_stage(args: argparse.Namespace) -> None:
    """Put the outliers into the clean model of `--work_dir` and write the bundled model and its texts."""
    tokenizer = AutoTokenizer.from_pretrained(args.work_dir)
    model = LlamaForCausalLM.from_pretrained(args.work_dir, dtype=torch.float32).eval()
    sample = windows(encode(tokenizer, stories_text(120, args.seed)))
    sample[::2, 0] = tokenizer.bos_token_id
    held_out = windows(encode(tokenizer, stories_text(TEST_STORIES, args.seed + TEST)))
    settings = OutlierSettings(
        normal_factors=tuple(args.normal_factors),
        massive_ratio=args.massive_ratio,
        pair_layers=tuple(args.pair_layers),
        pair_size=args.pair_size,
        seed=args.seed,
    )
    print(f"perplexity before: {math.exp(evaluate(model, held_out)):.4f}")
    record = add_outliers_(model, sample, sentence_ends(tokenizer), RESERVED_NEURONS, settings)
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    write_json(args.output / "outliers.json", record)
    texts_stage(args)
    print(f"perplexity after:  {math.exp(evaluate(model.float(), held_out)):.4f}")
    print_magnitudes(model, sample)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("train", "outliers", "texts", "all"), default="all", help="default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "assets/tiny-llama", help="folder of the finished model")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "cache/tiny-llama", help="checkpoint and clean model")
    parser.add_argument("--seed", type=int, default=0, help="of the stories and of the initial weights (default: 0)")
    parser.add_argument("--steps", type=int, default=3500, help="training steps (default: 3500)")
    parser.add_argument("--batch_size", type=int, default=8, help=f"windows of {SEQLEN} tokens a step (default: 8)")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate (default: 0.005)")
    default = OutlierSettings()
    outliers = parser.add_argument_group("outliers")
    outliers.add_argument(
        "--normal_factors",
        type=int,
        nargs="*",
        default=default.normal_factors,
        help="powers of two, one channel of each norm for each",
    )
    outliers.add_argument(
        "--massive_ratio", type=float, default=default.massive_ratio, help="in medians of |down_proj input|"
    )
    outliers.add_argument(
        "--pair_layers", type=int, nargs="*", default=default.pair_layers, help="layers with a cancelling pair"
    )
    outliers.add_argument(
        "--pair_size", type=float, default=default.pair_size, help="size of the pair's down_proj columns"
    )
    return parser.parse_args()


def main() -> None:
    """Run the stages asked for."""
    args = parse_arguments()
    if args.stage in ("train", "all"):
        train_stage(args)
    if args.stage in ("outliers", "all"):
        outlier_stage(args)
    if args.stage == "texts":
        texts_stage(args)


if __name__ == "__main__":
    main()
