"""Questions, tokenizers and models that the tests of MMLU share, and how one prompt is answered on its own."""

import csv
from pathlib import Path

import torch
from conftest import ROOT, tiny_model
from tokenizers import Tokenizer, processors
from tokenizers.models import BPE
from torch import nn
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from evaluation.mmlu.answers import ENDINGS
from evaluation.mmlu.data import Question, Subject

CPU = torch.device("cpu")
TINY_LLAMA = ROOT / "assets/tiny-llama"
CHARACTERS = sorted(set("\n .:(),ABCDEFGHIJTabcdefghijklmnopqrstuvwxyz0123456789?"))
NAMES = ("anatomy", "astronomy", "econometrics")


def make_questions(name: str, count: int) -> tuple[Question, ...]:
    """Questions of different lengths, with every letter right now and then."""
    texts = (f"What is {name} {i}{' so far' * (i % 4)}?" for i in range(count))
    choices = (tuple(f"{name[i % 5 :]} {c}" for c in ("efgh" if i % 3 else "efgq")) for i in range(count))
    return tuple(Question(*each, "BDACA"[i % 5]) for i, each in enumerate(zip(texts, choices, strict=True)))


def make_subject(name: str = "anatomy", questions: int = 7) -> Subject:
    return Subject(name, make_questions(f"dev {name}", 5), make_questions(name, questions))


def write_folder(folder: Path, subjects: tuple[Subject, ...]) -> Path:
    for subject in subjects:
        for split, questions in (("dev", subject.examples), ("test", subject.questions)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            with open(folder / split / f"{subject.name}_{split}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([each.text, *each.choices, each.answer] for each in questions)
    return folder


def character_tokenizer(merges: tuple[str, ...] = (), bos: bool = False) -> PreTrainedTokenizerFast:
    """Every character is a token, but for pairs like " A" that are merged."""
    pieces = ["<unk>", "<s>", "</s>", *CHARACTERS, *merges]
    model = BPE({piece: i for i, piece in enumerate(pieces)}, [tuple(merge) for merge in merges], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts an end of text behind every text."""
    tokenizer = character_tokenizer((" A", " B", " C", " D"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


# Each pair is merged only where its first character is still free, so a last choice that ends with q moves the border
# between all the tokens behind it: "q\n" "An" "sw" "er" ": " "A", otherwise "\nA" "ns" "we" "r:" " A".
DOMINOES = ("q\n", "\nA", "An", "ns", "sw", "we", "er", "r:", ": ", " A", " B", " C", " D")

TOKENIZERS = {
    "letters with their space": lambda: character_tokenizer((" A", " B", " C", " D"), bos=True),
    "characters": character_tokenizer,
    "one letter with its space": lambda: character_tokenizer((" A",)),
    "letters and colon": lambda: character_tokenizer((" A", ": ", " B")),
    "borders that depend on the text": lambda: character_tokenizer(DOMINOES),
    "an end behind every text": closing_tokenizer,
    "byte-level BPE": lambda: AutoTokenizer.from_pretrained(TINY_LLAMA),
}


def sliding_mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, sliding_window=40, initializer_range=0.2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval().requires_grad_(False)


def wide_model(**changes) -> nn.Module:
    return tiny_model(**{"max_position_embeddings": 2048, **changes})


@torch.no_grad()
def alone(model: nn.Module, tokenizer, text: str) -> list[float]:
    """Log-probabilities of the four letters: each a forward pass of its own over prompt and letter, read in full."""
    encoded = [tokenizer(text + ending).input_ids for ending in ENDINGS]
    encoded = [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]
    start = next(i for i in range(len(encoded[0])) if len({ids[i] for ids in encoded}) > 1)
    found = []
    for ids in encoded:
        log_probabilities = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        found.append(sum(log_probabilities[i - 1, ids[i]].item() for i in range(start, len(ids))))
    return found
