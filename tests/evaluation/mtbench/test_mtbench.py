"""MT-Bench answers of the bundled model: their format, what they depend on, and going on after an interruption."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_program, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.decoding import Request
from evaluation.generation import end_tokens, fit_prompt, generate_texts
from evaluation.mtbench import answers as answers_module
from evaluation.mtbench.answers import (
    HUB_QUESTIONS,
    AnswerFile,
    AnswerSettings,
    Question,
    answer_batch,
    answer_questions,
    fetch_from_hub,
    read_questions,
    read_references,
)
from evaluation.mtbench.conversation import FORMATS, Format
from evaluation.mtbench.settings import TEMPERATURES, Temperature
from models import decoder_spec
from quantize.bits import BitSettings
from quantize.quantization import quantize_model
from quantize.rotation_settings import Transform
from quantize.settings import QuantSettings
from utils.errors import InputError

CPU = torch.device("cpu")
MODEL = ROOT / "assets/tiny-llama"
PLAIN = FORMATS["plain"]
GREEDY = AnswerSettings(context=1024, max_new_tokens=8)
SAMPLED = replace(GREEDY, temperature=Temperature.CATEGORY)
ROWS = (
    {"question_id": 7, "category": "writing", "turns": ["Mila has the kite.", "Who has it now?"]},
    {"question_id": 3, "category": "math", "turns": ["Tom has two apples. How many?", "And Mila?"]},
    {"question_id": 12, "category": "writing", "turns": ["Once there was a fox.", "Go on."]},
)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


def generate_text(model, tokenizer, prompt: list[int], max_new_tokens: int, stops=()) -> str:
    return generate_texts(model, tokenizer, [Request(prompt, max_new_tokens)], stops, CPU)[0]


def answer_question(model, tokenizer, question: Question, form: Format, settings: AnswerSettings):
    (talk,) = answer_batch(model, tokenizer, [question], form, settings, CPU)
    return talk.answers, talk.cut


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def questions(tmp_path):
    return read_questions(write_lines(tmp_path / "question.jsonl", ROWS))


def turns_of(rows: list[dict]) -> list[list[str]]:
    return [row["choices"][0]["turns"] for row in rows]


@pytest.fixture
def answered(model, tokenizer, questions, tmp_path):
    """Answer the questions into a file; settings and identity can be given."""

    def run(
        settings: AnswerSettings = GREEDY,
        name: str = "answers.jsonl",
        identity: str = "w4a4",
        batch_size: int | None = None,
    ) -> list[dict]:
        file = AnswerFile(tmp_path / name, "tiny", identity)
        return answer_questions(model, tokenizer, questions, PLAIN, settings, file, CPU, batch_size)

    return run


def test_answers_are_lines_as_fastchat_reads_them(answered, tmp_path):
    rows = answered()
    assert [row["question_id"] for row in rows] == [7, 3, 12]
    kept = read_lines(tmp_path / "answers.jsonl")
    assert [row["question_id"] for row in kept] == [3, 7, 12]
    assert sorted(rows, key=lambda row: row["question_id"]) == kept
    for row in kept:
        assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= row.keys()
        assert row["model_id"] == "tiny"
        assert [choice["index"] for choice in row["choices"]] == [0]
        assert [type(turn) for turn in row["choices"][0]["turns"]] == [str, str]
        assert isinstance(row["tstamp"], float)
    assert len({row["answer_id"] for row in kept}) == 3


def greedy_without_a_cache(model, tokenizer, prompt: list[int], steps: int) -> str:
    tokens = torch.tensor([prompt])
    for _ in range(steps):
        with torch.no_grad():
            best = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
        if best.item() == tokenizer.eos_token_id:
            break
    return tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True).strip()


def test_answer_is_what_greedy_search_without_a_cache_finds(model, tokenizer):
    prompt = tokenizer("Mila has the kite. Tom has")["input_ids"]
    expected = greedy_without_a_cache(model, tokenizer, prompt, 8)
    assert generate_text(model, tokenizer, prompt, 8) == expected
    assert expected


def test_quantized_model_answers_with_a_cache_as_without(tokenizer):
    quantized = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True).eval()
    prompt = tokenizer("Mila has the kite. Tom has")["input_ids"]
    bits = QuantSettings(bits=BitSettings(weight=8, activation=8), transform=Transform.NONE)
    tokens = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(0))
    quantize_model(quantized, decoder_spec(quantized.config), tokens, None, bits, CPU)
    expected = greedy_without_a_cache(quantized, tokenizer, prompt, 8)
    assert generate_text(quantized, tokenizer, prompt, 8) == expected


def test_second_prompt_holds_the_first_answer(model, tokenizer, questions):
    prompts = []

    def render(turns):
        prompts.append(PLAIN.render(turns))
        return prompts[-1]

    spy = Format("spy", render, PLAIN.stops)
    answers, _ = answer_question(model, tokenizer, questions[0], spy, GREEDY)
    first, second = ROWS[0]["turns"]
    assert answers[0]
    assert prompts == [
        f"Question: {first}\nAnswer:",
        f"Question: {first}\nAnswer: {answers[0]}\n\nQuestion: {second}\nAnswer:",
    ]


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED])
@pytest.mark.parametrize("damage", ["after a line", "within a line", "without the line's end"])
def test_interrupted_run_goes_on_to_the_same_answers(answered, tmp_path, settings, damage):
    whole = answered(settings, "whole.jsonl")
    first, second, _ = (json.dumps(row).encode() for row in whole)
    left = {
        "after a line": first + b"\n",
        "within a line": first + b"\n" + second[: len(second) // 2],
        "without the line's end": first,
    }
    path = tmp_path / "cut.jsonl"
    path.write_bytes(left[damage])
    resumed = answered(settings, "cut.jsonl")
    assert turns_of(resumed) == turns_of(whole)
    assert resumed[0] == whole[0]
    assert len(read_lines(path)) == 3


def test_run_that_is_interrupted_twice_keeps_both_parts(answered, tmp_path, monkeypatch):
    whole = answered(name="whole.jsonl")
    first, second = (json.dumps(row) for row in whole[:2])
    (tmp_path / "cut.jsonl").write_text(f"{first}\n{second[:-9]}", encoding="utf-8")
    original = answers_module.answer_batch

    def interrupted(*arguments):
        if arguments[2][0].question_id == whole[2]["question_id"]:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "answer_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answered(name="cut.jsonl", batch_size=1)
    assert turns_of(read_lines(tmp_path / "cut.jsonl")) == turns_of(whole[:2])
    assert turns_of(answered(name="cut.jsonl")) == turns_of(whole)


def test_finished_file_is_not_generated_again(answered, monkeypatch):
    before = answered()
    monkeypatch.setattr(answers_module, "generate_texts", lambda *_: pytest.fail("generated"))
    assert answered() == before


@pytest.mark.parametrize(("batch_size", "expected"), [(1, [0, 1, 2]), (2, [0, 2]), (None, [0])])
def test_every_batch_is_on_disk_before_the_next_is_begun(answered, tmp_path, monkeypatch, batch_size, expected):
    lines = []
    original = answers_module.answer_batch

    def spy(*arguments):
        path = tmp_path / "answers.jsonl"
        lines.append([row["question_id"] for row in read_lines(path)] if path.exists() else [])
        return original(*arguments)

    monkeypatch.setattr(answers_module, "answer_batch", spy)
    answered(batch_size=batch_size)
    assert lines == [[7, 3, 12][:count] for count in expected], "in the order of the questions"


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_answers_of_a_batch_are_those_of_one_at_a_time(answered, settings, batch_size):
    alone = answered(settings, "alone.jsonl", batch_size=1)
    assert turns_of(answered(settings, "batch.jsonl", batch_size=batch_size)) == turns_of(alone)


def test_a_batch_that_runs_out_of_memory_is_answered_in_halves_to_the_same(answered, monkeypatch):
    whole = answered(SAMPLED, "whole.jsonl")
    original, tried = answers_module.generate_texts, []

    def short_of_memory(model, tokenizer, requests, *arguments):
        tried.append(len(requests))
        if len(tried) == 2:  # in the second turn, when generators have drawn
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, tokenizer, requests, *arguments)

    monkeypatch.setattr(answers_module, "generate_texts", short_of_memory)
    assert turns_of(answered(SAMPLED, "halves.jsonl")) == turns_of(whole)
    assert tried == [3, 3, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": SAMPLED},
        {"settings": replace(GREEDY, max_new_tokens=9)},
        {"settings": replace(GREEDY, context=512)},
        {"settings": replace(GREEDY, seed=1)},
        {"identity": "w8a8"},
    ],
    ids=str,
)
def test_answers_of_other_settings_are_refused_and_kept(answered, tmp_path, changed):
    answered()
    before = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"answers\.jsonl: .* choose another --output_dir, or delete the file"):
        answered(**changed)
    assert (tmp_path / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": 99, "model_id": "tiny"},
        {"question_id": 7, "model_id": "tiny"},
        {"model_id": "tiny"},
        {"question_id": [7]},
    ],
)
def test_file_that_is_not_ours_is_refused_and_kept(answered, tmp_path, row):
    path = write_lines(tmp_path / "answers.jsonl", [row])
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"answers\.jsonl"):
        answered()
    assert path.read_bytes() == before


def test_damage_before_the_last_line_is_refused_and_kept(answered, tmp_path):
    rows = answered()
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 7, "ans\n' + json.dumps(rows[0]) + "\n", encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(InputError, match="line 1: not JSON"):
        answered()
    assert path.read_bytes() == before


def test_changed_question_is_another_question(answered, questions, model, tokenizer, tmp_path):
    answered()
    other = [replace(questions[0], turns=("Something else.",)), *questions[1:]]
    with pytest.raises(InputError, match="question 7"):
        answer_questions(
            model, tokenizer, other, PLAIN, GREEDY, AnswerFile(tmp_path / "answers.jsonl", "tiny", "w4a4"), CPU
        )


def test_sampling_depends_on_the_question_and_the_seed_only(model, tokenizer, questions):
    def turns(question: Question, settings: AnswerSettings) -> list[str]:
        return answer_question(model, tokenizer, question, PLAIN, settings)[0]

    state = torch.get_rng_state()
    first = turns(questions[0], SAMPLED)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    turns(questions[2], SAMPLED)
    assert turns(questions[0], SAMPLED) == first
    assert turns(questions[0], replace(SAMPLED, seed=1)) != first
    assert turns(replace(questions[0], question_id=8), SAMPLED) != first
    assert turns(questions[0], GREEDY) != first


def test_categories_have_the_benchmarks_temperatures():
    by_temperature = {0.7: "writing roleplay", 0.0: "extraction math coding reasoning", 0.1: "stem humanities"}
    for temperature, names in by_temperature.items():
        for name in names.split():
            assert Temperature.CATEGORY.of(name) == temperature
            assert Temperature.GREEDY.of(name) == 0
    assert len(TEMPERATURES) == 8


def test_cold_categories_are_answered_alike_with_both_settings(answered):
    greedy, sampled = turns_of(answered(GREEDY, "greedy.jsonl")), turns_of(answered(SAMPLED, "sampled.jsonl"))
    assert greedy[1] == sampled[1]  # math
    assert greedy[0] != sampled[0]
    assert greedy[2] != sampled[2]


def test_models_own_sampling_settings_and_penalties_do_not_enter(model, tokenizer, questions):
    before = answer_question(model, tokenizer, questions[2], PLAIN, SAMPLED)
    own = model.generation_config
    changed = type(own)(**{**own.to_dict(), "top_k": 1, "repetition_penalty": 5.0, "max_length": 3, "num_beams": 2})
    model.generation_config = changed
    try:
        assert answer_question(model, tokenizer, questions[2], PLAIN, SAMPLED) == before
        assert model.generation_config is changed
    finally:
        model.generation_config = own


def test_sampling_is_from_the_whole_vocabulary(model, tokenizer):
    request = Request(tokenizer("Mila")["input_ids"], 1, 1e4, torch.Generator().manual_seed(0))
    drawn = set(generate_texts(model, tokenizer, [request] * 120, (), CPU))
    assert len(drawn) > 70  # the library's own default would draw from 50


def test_prompt_is_cut_at_its_old_end_and_keeps_its_bos():
    tokens = list(range(20))
    assert fit_prompt(tokens, 32, 12, bos=0) == tokens
    assert fit_prompt(tokens, 30, 12, bos=0) == [0, *range(3, 20)]
    assert fit_prompt(tokens, 30, 12, bos=None) == list(range(2, 20))
    assert fit_prompt(tokens, 10, 1000, bos=0) == [0, *range(16, 20)]


@pytest.mark.parametrize("max_new_tokens", [1, 5, 64, 1000])
@pytest.mark.parametrize("context", [1, 2, 3, 10, 64])
def test_prompt_and_answer_always_fit_the_context(context, max_new_tokens):
    for length in (1, 2, 10, 100):
        prompt = fit_prompt(list(range(length)), context, max_new_tokens, bos=0)
        assert 1 <= len(prompt) <= length
        assert len(prompt) + min(max_new_tokens, context // 2) <= context


def test_long_prompts_are_cut_counted_and_logged(model, tokenizer, questions, tmp_path, caplog):
    short = AnswerSettings(context=24, max_new_tokens=8)
    file = AnswerFile(tmp_path / "answers.jsonl", "tiny", "")
    rows = answer_questions(model, tokenizer, questions, PLAIN, short, file, CPU)
    assert sum(row["cut_prompts"] for row in rows) >= 3
    assert f"{sum(row['cut_prompts'] for row in rows)} prompts lost their oldest text, to fit 24 tokens" in caplog.text


def test_where_nothing_can_be_generated_the_answer_is_empty(model, tokenizer, questions):
    answers, cut = answer_question(model, tokenizer, questions[0], PLAIN, AnswerSettings(1, 8))
    assert (answers, cut) == (["", ""], 2)


def test_generation_ends_at_a_stop_and_leaves_it_out(model, tokenizer):
    prompt = tokenizer("Mila has the kite. Tom has")["input_ids"]
    whole = generate_text(model, tokenizer, prompt, 24)
    stop = whole[5:8]
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = generate_text(model, tokenizer, prompt, 24, (stop, "never"))
    finally:
        handle.remove()
    assert found == whole.partition(stop)[0].strip()
    assert len(calls) < 24


def test_generation_ends_at_the_models_the_tokenizers_and_the_formats_end_tokens(tokenizer):
    model = tiny_model()
    model.generation_config.eos_token_id = [5, 9]
    assert end_tokens(model, tokenizer, ("<s>", "no token")) == [0, 1, 5, 9]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer, ()) == [1]


def test_model_that_ends_at_once_has_an_empty_answer(model, tokenizer, monkeypatch):
    prompt = tokenizer("Mila has the kite. Tom has")["input_ids"]
    with torch.no_grad():
        first = model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax().item()
    monkeypatch.setattr(model.generation_config, "eos_token_id", [first])
    assert generate_text(model, tokenizer, prompt, 5) == ""


WORKER = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from evaluation.mtbench.conversation import FORMATS
from evaluation.mtbench.answers import AnswerFile, AnswerSettings, answer_questions, read_questions
from evaluation.mtbench.settings import Temperature
from utils.distributed import join_group, leave_group
torch.set_num_threads(1)
folder, model = Path(sys.argv[1]), sys.argv[2]
join_group()
settings = AnswerSettings(context=1024, max_new_tokens=8, temperature=Temperature.CATEGORY)
rows = answer_questions(
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(model),
    read_questions(folder / "question.jsonl"), FORMATS["plain"], settings,
    AnswerFile(folder / "shared.jsonl", "tiny", "w4a4"), torch.device("cpu"),
)
assert [row["question_id"] for row in rows] == [7, 3, 12]
leave_group()
"""


def test_two_processes_give_the_answers_of_one(answered, tmp_path):
    done = run_program(WORKER, tmp_path, tmp_path, MODEL)
    assert done.returncode == 0, done.stderr
    expected = sorted(answered(SAMPLED), key=lambda row: row["question_id"])
    assert turns_of(read_lines(tmp_path / "shared.jsonl")) == turns_of(expected)


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "\n{bad\n", "line 2: not JSON"),
        (GOOD + "\n\n[1]\n", "line 3: one JSON object per line"),
        ('{"category": "math", "turns": ["a"]}\n', "line 1: 'question_id'"),
        ('{"question_id": true, "category": "math", "turns": ["a"]}\n', "line 1: 'question_id'"),
        ('{"question_id": 1, "turns": ["a"]}\n', "line 1: 'category'"),
        ('{"question_id": 1, "category": "math"}\n', "line 1: 'turns'"),
        ('{"question_id": 1, "category": "math", "turns": []}\n', "line 1: 'turns'"),
        ('{"question_id": 1, "category": "math", "turns": "text"}\n', "line 1: 'turns'"),
        ('{"question_id": 1, "category": "math", "turns": ["a", 2]}\n', "line 1: 'turns'"),
        ('{"question_id": 1, "category": "math", "turns": ["a", " "]}\n', "line 1: 'turns'"),
        (GOOD + "\n" + GOOD + "\n", "line 2: question_id 7 is there twice"),
        ("[" * 100_000, "line 1: nested too deeply"),
        ("\n", "holds no question"),
    ],
)
def test_malformed_questions_are_refused_by_line(tmp_path, text, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as raised:
        read_questions(path)
    assert str(raised.value).startswith(f"--mtbench_questions {path}")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_questions_that_are_no_text_or_no_file_are_refused(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"question_id": 1, "turns": ["caf\xe9"]}\n')
    with pytest.raises(InputError, match="line 1: not UTF-8"):
        read_questions(tmp_path / "latin.jsonl")
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_questions(path)


def test_questions_may_have_one_turn_or_many_and_ids_of_text(tmp_path, model, tokenizer):
    rows = [
        {"question_id": "b", "category": "new", "turns": ["One."]},
        {"question_id": "a", "category": "new", "turns": ["One.", "Two.", "Three.\u2028"], "reference": ["x"]},
    ]
    questions = read_questions(write_lines(tmp_path / "q.jsonl", rows))
    assert [question.turns for question in questions] == [("One.",), ("One.", "Two.", "Three.\u2028")]
    file = AnswerFile(tmp_path / "answers.jsonl", "tiny", "")
    answered = answer_questions(model, tokenizer, questions, PLAIN, replace(GREEDY, max_new_tokens=2), file, CPU)
    assert [len(turns) for turns in turns_of(answered)] == [1, 3]
    assert [row["question_id"] for row in read_lines(file.path)] == ["a", "b"]


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": 1, "turns": ["a"]},
        {"question_id": 1, "choices": []},
        {"question_id": 1, "choices": [{"index": 0, "turns": "a"}]},
        {"choices": [{"index": 0, "turns": ["a"]}]},
    ],
)
def test_malformed_references_are_refused_by_line(tmp_path, row):
    path = write_lines(tmp_path / "reference.jsonl", [row])
    with pytest.raises(InputError, match=r"--mtbench_references .*: line 1: "):
        read_references(path)


def test_our_answers_can_be_references(answered, tmp_path):
    rows = answered()
    expected = {row["question_id"]: tuple(row["choices"][0]["turns"]) for row in rows}
    assert read_references(tmp_path / "answers.jsonl") == expected


def test_too_few_new_tokens_are_refused():
    with pytest.raises(InputError, match="--max_new_tokens 0"):
        AnswerSettings(context=10, max_new_tokens=0)


def test_without_a_network_the_flag_for_a_local_copy_is_named(tmp_path):
    code = (
        "from evaluation.mtbench.answers import *\n"
        "try:\n    fetch_from_hub(HUB_QUESTIONS, '--mtbench_questions')\n"
        "except InputError as error:\n    print(error)"
    )
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True).stdout
    assert "give a local copy with --mtbench_questions" in said
    assert said.count("\n") == 1


def test_the_real_benchmark_is_read(shared_data):
    questions = read_questions(shared_data / "mt_bench/question.jsonl")
    references = read_references(shared_data / "mt_bench/reference_answer_gpt-4.jsonl")
    assert len(questions) == 80
    assert {len(question.turns) for question in questions} == {2}
    assert {question.category for question in questions} == TEMPERATURES.keys()
    with_reference = {question.category for question in questions if question.question_id in references}
    assert with_reference == {"math", "reasoning", "coding"}


def test_hub_copy_is_looked_for_in_the_cache_first(monkeypatch, tmp_path):
    asked = []

    def download(space: str, **where: object) -> str:
        asked.append((space, where))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert fetch_from_hub(HUB_QUESTIONS, "--mtbench_questions") == tmp_path
    where = {"filename": "data/mt_bench/question.jsonl", "repo_type": "space", "local_files_only": True}
    assert asked == [("lmsys/mt-bench", where)]
