"""Prompts and the letters after them, for tokenizers of every kind."""

import pytest
import torch
from mmlu_cases import CPU, TOKENIZERS, alone, make_subject, wide_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from evaluation.mmlu.answers import ENDINGS
from evaluation.mmlu.choices import common_prefix, encode_prompts, ending_log_probabilities
from evaluation.mmlu.data import prompt
from utils.errors import InputError


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_stem_and_ending_are_the_encoding_of_prompt_and_letter(make):
    tokenizer, subject = make(), make_subject()
    texts = [prompt(subject, question, 2) for question in subject.questions]
    for text, found in zip(texts, encode_prompts(tokenizer, texts, ENDINGS), strict=True):
        for ending, tokens in zip(ENDINGS, found.endings, strict=True):
            ids = tokenizer(text + ending).input_ids
            assert list(found.stem + tokens) == (ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids)
        assert len({tokens[0] for tokens in found.endings}) > 1


def test_a_letter_is_one_token_wherever_the_tokenizer_has_one_or_splits_off_the_space():
    for name in ("letters with their space", "characters", "byte-level BPE", "an end behind every text"):
        (found,) = encode_prompts(TOKENIZERS[name](), ["Answer:"], ENDINGS)
        assert [len(tokens) for tokens in found.endings] == [1, 1, 1, 1], name
    (found,) = encode_prompts(TOKENIZERS["one letter with its space"](), ["Answer:"], ENDINGS)
    assert [len(tokens) for tokens in found.endings] == [1, 2, 2, 2]


@pytest.mark.parametrize("letters", ["", "A", "AB"])
def test_a_tokenizer_without_some_letters_is_refused(letters):
    words = Tokenizer(WordLevel({"<unk>": 0, "Answer": 1} | {c: i for i, c in enumerate(letters, 2)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(InputError, match=r"cannot tell the answers ' A', ' B', ' C', ' D' apart"):
        encode_prompts(tokenizer, ["Answer:"], ENDINGS)


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [([(1, 2, 3), (1, 2, 4, 5)], (1, 2)), ([(1, 2), (1, 2, 3)], (1, 2)), ([(1,), (2,)], ()), ([(1, 2)], (1, 2)),
     ([(9, 5), (9, 1), (9, 5, 3)], (9,))],
)  # fmt: skip
def test_the_common_prefix_is_shared_by_all(sequences, expected):
    assert common_prefix(sequences) == expected


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_log_probabilities_are_those_of_one_prompt_at_a_time(make, shots):
    tokenizer, subject = make(), make_subject()
    model = wide_model(vocab_size=len(tokenizer))
    texts = [prompt(subject, question, shots) for question in subject.questions]
    expected = torch.tensor([alone(model, tokenizer, text) for text in texts])
    prompts = encode_prompts(tokenizer, texts, ENDINGS)
    for batch_size in (1, 3, None):
        found = ending_log_probabilities(model, prompts, CPU, batch_size)
        assert torch.allclose(found, expected.float(), atol=1e-4)


def test_the_same_question_twice_has_the_same_answer():
    model, tokenizer, subject = wide_model(), TOKENIZERS["characters"](), make_subject()
    text = prompt(subject, subject.questions[0], 2)
    found = ending_log_probabilities(model, encode_prompts(tokenizer, [text, text], ENDINGS), CPU)
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], torch.tensor(alone(model, tokenizer, text)), atol=1e-4)


def test_endings_of_one_prompt_can_differ_from_another_s():
    tokenizer, subject = TOKENIZERS["borders that depend on the text"](), make_subject()
    prompts = encode_prompts(tokenizer, [prompt(subject, each, 0) for each in subject.questions], ENDINGS)
    assert [tokenizer.decode(each.endings[0]) for each in prompts[:3]] == ["A", " A", " A"]


@pytest.mark.parametrize("name", ["characters", "one letter with its space", "byte-level BPE"])
def test_a_prompt_is_run_once_for_all_letters_that_allow_it(name):
    tokenizer, subject = TOKENIZERS[name](), make_subject()
    model, rows = wide_model(vocab_size=len(tokenizer)), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    prompts = encode_prompts(tokenizer, [prompt(subject, each, 1) for each in subject.questions], ENDINGS)
    ending_log_probabilities(model, prompts, CPU)
    assert sum(rows) == 1 + len(prompts)
