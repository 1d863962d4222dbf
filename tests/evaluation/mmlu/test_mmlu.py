"""MMLU: answers that do not depend on what runs together, prompts that fit, averages, resuming, files."""

import csv
import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_program
from mmlu_cases import (
    CPU,
    NAMES,
    TINY_LLAMA,
    TOKENIZERS,
    alone,
    character_tokenizer,
    make_subject,
    sliding_mistral,
    wide_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from duquant.attention import install
from evaluation.journal import Journal
from evaluation.mmlu.answers import (
    ENDINGS,
    MMLU,
    answer_subject,
    evaluate_mmlu,
    fitting_prompts,
    mmlu_table,
    summarize,
    write_mmlu,
)
from evaluation.mmlu.choices import encode_prompts, ending_log_probabilities
from evaluation.mmlu.data import Subject, prompt
from models import decoder_spec
from quantize.bits import BitSettings
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationSettings
from quantize.settings import QuantSettings
from utils.errors import InputError
from utils.io import write_json

MODELS = {
    "sdpa": wide_model,
    "eager": lambda: with_attention(wide_model(), "eager"),
    "wrapped attention": lambda: with_wrapper(wide_model()),
    "tied": lambda: wide_model(tie_word_embeddings=True),
    "Mistral with a sliding window": sliding_mistral,
}


def with_attention(model: nn.Module, name: str) -> nn.Module:
    model.set_attn_implementation(name)
    return model


def with_wrapper(model: nn.Module) -> nn.Module:
    install(model)
    return model


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_family_and_attention_answers_as_one_prompt_at_a_time(make):
    model, tokenizer, subject = make(), character_tokenizer(bos=True), make_subject()
    found = answer_subject(model, tokenizer, subject, 3, CPU, 2048, batch_size=4)
    for question, answer in zip(subject.questions, found.answers, strict=True):
        expected = torch.tensor(alone(model, tokenizer, prompt(subject, question, 3)))
        assert answer.predicted == "ABCD"[expected.argmax()]
        assert torch.allclose(torch.tensor(answer.probabilities), expected.softmax(0).float(), atol=1e-4)


@pytest.mark.parametrize("shots", [0, 5])
def test_the_bundled_model_answers_as_one_prompt_at_a_time(shots):
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    tokenizer, subject = AutoTokenizer.from_pretrained(TINY_LLAMA), make_subject(questions=6)
    found = answer_subject(model, tokenizer, subject, shots, CPU, 1024)
    texts = [prompt(subject, question, shots) for question in subject.questions]
    expected = torch.tensor([alone(model, tokenizer, text) for text in texts])
    assert [answer.predicted for answer in found.answers] == ["ABCD"[i] for i in expected.argmax(-1)]
    log_probabilities = ending_log_probabilities(model, encode_prompts(tokenizer, texts, ENDINGS), CPU)
    assert torch.allclose(log_probabilities, expected.float(), atol=1e-4)


def test_a_quantized_model_s_keys_and_values_are_cached_as_it_computes_them():
    model, tokenizer, subject = wide_model(), character_tokenizer(), make_subject()
    tokens = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(0))
    config = QuantSettings(bits=BitSettings(4, 4), rotation=RotationSettings(block_size=16, steps=24))
    quantize_model(model, decoder_spec(model.config), tokens, None, config, CPU)
    texts = [prompt(subject, question, 3) for question in subject.questions]
    expected = torch.tensor([alone(model, tokenizer, text) for text in texts])
    found = ending_log_probabilities(model, encode_prompts(tokenizer, texts, ENDINGS), CPU, 4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (found - expected).abs().median() < 1e-4  # a sum in another order may round another way now and then


def test_the_shared_prefix_is_run_once_and_logits_only_where_they_are_read():
    model, tokenizer, subject = wide_model(), character_tokenizer(), make_subject(questions=12)
    fed, read = [], []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: fed.append(args[0].numel()))
    model.lm_head.register_forward_hook(lambda module, args, output: read.append(args[0].shape[:2].numel()))
    answer_subject(model, tokenizer, subject, 5, CPU, 2048)
    one_by_one = sum(len(tokenizer(prompt(subject, each, 5)).input_ids) for each in subject.questions)
    assert sum(fed) < one_by_one / 3
    assert sum(read) <= len(subject.questions) + 1


def test_a_batch_that_does_not_fit_is_halved_and_changes_nothing():
    model, tokenizer, subject = wide_model(), character_tokenizer(), make_subject()
    expected = answer_subject(model, tokenizer, subject, 2, CPU, 2048)

    def refuse(module, args, kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    found = answer_subject(model, tokenizer, subject, 2, CPU, 2048)
    for one, other in zip(expected.answers, found.answers, strict=True):
        assert one.predicted == other.predicted
        assert other.probabilities == pytest.approx(one.probabilities, abs=1e-4)
    with pytest.raises(InputError, match="--eval_batch_size 4: does not fit"):
        answer_subject(model, tokenizer, subject, 2, CPU, 2048, batch_size=4)


def test_a_model_whose_logits_are_not_numbers_answers_nothing(caplog):
    model = wide_model()
    model.lm_head.weight.fill_(torch.nan)
    with caplog.at_level(logging.WARNING):
        found = evaluate_mmlu(model, character_tokenizer(), [make_subject()], 0, device=CPU, context=2048)
    assert (found.accuracy, {answer.predicted for answer in found.subjects[0].answers}) == (0.0, {""})
    assert "no answer to 7 questions" in caplog.text


# --- the context


def lengths(tokenizer, subject: Subject, shots: int) -> list[int]:
    return [len(tokenizer(prompt(subject, question, shots)).input_ids) for question in subject.questions]


def test_the_last_examples_are_dropped_until_a_prompt_fits():
    tokenizer, subject = AutoTokenizer.from_pretrained(TINY_LLAMA), make_subject()
    with_four = lengths(tokenizer, subject, 4)
    context = sorted(with_four)[3]  # some prompts fit with four examples, the others need to lose another
    expected = [4 if length <= context else 3 for length in with_four]
    assert set(expected) == {3, 4}
    groups = fitting_prompts(tokenizer, subject, len(subject.questions), 5, context)
    seen = {}
    for group in groups:
        assert not group.truncated
        for number, each in group.prompts.items():
            text = prompt(subject, subject.questions[number], group.shots)
            assert list(each.stem) == tokenizer(text).input_ids
            assert len(each) <= context < lengths(tokenizer, subject, group.shots + 1)[number]
            seen[number] = group.shots
    assert [seen[number] for number in range(7)] == expected
    score = answer_subject(wide_model(vocab_size=len(tokenizer)), tokenizer, subject, 5, CPU, context)
    assert (score.cut, score.truncated, score.average_shots) == (7, 0, pytest.approx(sum(expected) / 7))


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_prompt_that_just_fits_is_not_cut(make):
    tokenizer, subject = make(), make_subject(questions=1)
    (whole,) = encode_prompts(tokenizer, [prompt(subject, subject.questions[0], 2)], ENDINGS)
    for context, shots in ((len(whole), 2), (len(whole) - 1, 1)):
        (group,) = fitting_prompts(tokenizer, subject, 1, 2, context)
        assert group.shots == shots


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("bos", [False, True])
def test_a_question_that_does_not_fit_alone_loses_its_beginning(bos, shots):
    tokenizer, subject = character_tokenizer((" A", " B", " C", " D"), bos), make_subject()
    context = 40
    (group,) = fitting_prompts(tokenizer, subject, 7, shots, context)
    assert (group.shots, group.truncated) == (0, True)
    for number, each in group.prompts.items():
        whole = tokenizer(prompt(subject, subject.questions[number], 0)).input_ids
        assert list(each.stem) == whole[:bos] + whole[-(context - bos) :]
    score = answer_subject(wide_model(max_position_embeddings=40), tokenizer, subject, shots, CPU, context)
    assert (score.cut, score.truncated, score.average_shots) == (7, 7, 0)


def test_nothing_longer_than_the_context_is_run():
    model, tokenizer = wide_model(), character_tokenizer((" A",))  # endings of one and two tokens
    longest = []

    def note(module, args, kwargs):
        cache = kwargs["past_key_values"]
        longest.append(kwargs["input_ids"].shape[1] + (cache.get_seq_length() if cache is not None else 0))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    for context in (30, 150, 333):
        longest.clear()
        answer_subject(model, tokenizer, make_subject(), 5, CPU, context)
        assert 0.5 * context < max(longest) <= context


# --- averages


def evaluate(subjects, shots: int = 1, **changes) -> MMLU:
    return evaluate_mmlu(wide_model(), character_tokenizer(), subjects, shots, device=CPU, context=2048, **changes)


def test_averages_weight_questions_and_a_stranger_counts_only_overall(caplog):
    sizes = {"anatomy": 4, "virology": 9, "astronomy": 5, "cooking": 3}
    subjects = [make_subject(name, size) for name, size in sizes.items()]
    with caplog.at_level(logging.INFO):
        found = evaluate(subjects)
    correct = []
    for score, subject in zip(found.subjects, subjects, strict=True):
        assert [answer.right for answer in score.answers] == [question.answer for question in subject.questions]
        correct.append(sum(answer.predicted == answer.right for answer in score.answers))
    assert 0 < sum(correct) < 21
    assert [score.correct for score in found.subjects] == correct
    assert found.categories == {
        "STEM": correct[2] / 5,
        "other (business, health, misc.)": (correct[0] + correct[1]) / 13,
    }
    accuracy = sum(correct) / 21
    assert found.accuracy == pytest.approx(accuracy)
    mean = sum(c / n for c, n in zip(correct, sizes.values(), strict=True)) / 4
    assert found.subject_mean == pytest.approx(mean) != pytest.approx(accuracy)
    assert found.standard_error == pytest.approx((accuracy * (1 - accuracy) / 20) ** 0.5)
    assert (found.questions, found.average_shots, found.cut) == (21, 1, 0)
    assert "not of the 57 subjects, so only in the average: cooking" in caplog.text


def test_a_limit_takes_the_first_questions_of_every_subject():
    subjects = [make_subject(name) for name in NAMES]
    whole, part = evaluate(subjects), evaluate(subjects, limit=3)
    assert part.questions == 9
    for long, short in zip(whole.subjects, part.subjects, strict=True):
        assert [a.predicted for a in short.answers] == [a.predicted for a in long.answers[:3]]
        assert [a.right for a in short.answers] == ["B", "D", "A"]


def test_one_question_has_no_standard_error():
    assert evaluate([make_subject(questions=1)]).standard_error is None


# --- resuming, several processes


def test_an_evaluation_that_was_interrupted_goes_on_behind_what_it_kept(tmp_path):
    subjects = [make_subject(name) for name in NAMES]
    expected = evaluate(subjects)
    model, path = wide_model(), tmp_path / "journal"
    answered = []

    def stop(module, args):
        answered.append(len(answered))
        if Journal(path, "run").parts == 2:
            raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_pre_hook(stop)
    settings = {"device": CPU, "context": 2048}
    with pytest.raises(KeyboardInterrupt):
        evaluate_mmlu(model, character_tokenizer(), subjects, 1, journal=Journal(path, "run"), **settings)
    hook.remove()
    kept = Journal(path, "run")
    assert [f"mmlu:1:{name}" in kept for name in NAMES] == [True, True, False]
    asked = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: asked.append(len(args[0])))
    assert evaluate_mmlu(model, character_tokenizer(), subjects, 1, journal=kept, **settings) == expected
    assert sum(asked) == 1 + 7  # the prefix and the questions of the last subject
    asked.clear()
    again = evaluate_mmlu(model, character_tokenizer(), subjects, 1, journal=Journal(path, "run"), **settings)
    assert (again, asked) == (expected, [])
    assert Journal(path, "run").get("mmlu:5:anatomy") is None


WORKER = """
import json, sys, torch
sys.path[:0] = sys.argv[1:]
from pathlib import Path
import test_mmlu as t
from evaluation.journal import Journal
from utils.distributed import join_group, leave_group, rank
join_group()
model, own = t.wide_model(), []
model.model.embed_tokens.register_forward_hook(lambda module, args, output: own.append(len(args[0])))
result = t.evaluate_mmlu(model, t.character_tokenizer(), [t.make_subject(name) for name in t.NAMES], 1,
                         device=t.CPU, context=2048, journal=Journal(Path("journal"), "run"))
Path(f"{rank()}.json").write_text(json.dumps([result.figures(), sum(own)]))
leave_group()
"""


def test_several_processes_share_the_subjects_and_agree(tmp_path):
    done = run_program(WORKER, tmp_path, ROOT, ROOT / "tests", Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    results, own = zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)), strict=True)
    expected = json.loads(json.dumps(evaluate([make_subject(name) for name in NAMES]).figures()))
    assert results[0] == results[1] == expected
    assert own == (16, 8)  # two subjects and one, with a prefix each
    assert Journal(tmp_path / "journal", "run").parts == 3


# --- what is left for people and machines


@pytest.fixture
def two_results() -> list[MMLU]:
    subjects = [make_subject("anatomy", 4), make_subject("astronomy", 5), make_subject("cooking", 3)]
    return [evaluate(subjects, shots) for shots in (0, 2)]


def read_csv(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_the_files_hold_subjects_averages_and_every_answer(two_results, tmp_path):
    write_mmlu(two_results, tmp_path)
    header, *rows = read_csv(tmp_path / "mmlu.csv")
    assert header == ["subject", "category", "questions", "accuracy_0shot", "accuracy_2shot"]
    other = "other (business, health, misc.)"
    assert [row[:3] for row in rows] == [
        ["anatomy", other, "4"], ["astronomy", "STEM", "5"], ["cooking", "", "3"],
        ["average", "STEM", "5"], ["average", other, "4"], ["average", "all", "12"],
    ]  # fmt: skip
    for column, result in enumerate(two_results, start=3):
        found = [float(row[column]) for row in rows]
        assert found[:3] == [score.accuracy for score in result.subjects]
        assert found[3:] == [*(result.categories[name] for name in ("STEM", other)), result.accuracy]
        header, *answers = read_csv(tmp_path / f"mmlu_answers_{result.shots}shot.csv")
        assert header == ["subject", "index", "predicted", "right", "p(A)", "p(B)", "p(C)", "p(D)"]
        assert [row[:2] for row in answers[3:6]] == [["anatomy", "3"], ["astronomy", "0"], ["astronomy", "1"]]
        assert sum(row[2] == row[3] for row in answers) == round(12 * result.accuracy)
        for row in answers:
            probabilities = [float(value) for value in row[4:]]
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
            assert "ABCD"[probabilities.index(max(probabilities))] == row[2]


def test_the_figures_are_json_without_the_single_answers(two_results, tmp_path):
    write_json(tmp_path / "figures.json", two_results[1].figures())
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["shots"] == 2
    assert figures["accuracy"] == two_results[1].accuracy
    assert [subject["subject"] for subject in figures["subjects"]] == ["anatomy", "astronomy", "cooking"]
    assert "answers" not in figures["subjects"][0]


def test_the_table_has_categories_and_their_average_in_per_cent(two_results):
    zero, two = (summarize(result.shots, result.subjects) for result in two_results)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in mmlu_table([zero, two]).splitlines()]
    assert lines[0] == ["MMLU", "0-shot", "2-shot"]
    assert [line[0] for line in lines[2:]] == ["STEM", "other (business, health, misc.)", "average"]
    assert lines[2][1:] == [f"{100 * result.subjects[1].accuracy:.1f}" for result in (zero, two)]
    assert lines[-1][1:] == [f"{100 * result.accuracy:.1f}" for result in (zero, two)]
