"""The bundled questions are what the generator makes, balanced, and about stories that nobody has trained on."""

import json
from collections import Counter

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from tools import make_tiny_llama as make
from tools.stories import CHOICES, generate_stories

PATH = ROOT / "assets/stories/questions.jsonl"


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def test_bundled_questions_are_what_the_generator_makes(tmp_path):
    make.write_questions(tmp_path, seed=0)
    assert (tmp_path / "questions.jsonl").read_bytes() == PATH.read_bytes()
    assert PATH.stat().st_size < 400_000


def test_every_kind_has_its_right_answer_at_every_position_equally_often(questions):
    cells = Counter((question["kind"], question["answer_index"]) for question in questions)
    assert cells.keys() == {(kind, position) for kind in make.QUESTION_KINDS for position in range(CHOICES)}
    assert set(cells.values()) == {make.QUESTIONS_PER_CELL}


def test_the_kind_says_what_is_asked(questions):
    begins = {
        "who": "Who has the ",
        "where_thing": "Where is the ",
        "where_person": "Where is ",
        "colour": "What colour is the ",
        "number": "How many ",
    }
    for question in questions:
        asked = question["prompt"].rpartition("Question: ")[2]
        assert asked.startswith(begins[question["kind"]])
        assert (question["kind"] == "where_person") == (asked[: len("Where is X")][-1].isupper() and "Where" in asked)


def test_stories_are_asked_about_once_and_are_in_no_other_text(questions):
    stories = [question["prompt"].rpartition("\n")[0] for question in questions]
    assert len(set(stories)) == len(stories)
    texts = "".join(
        (ROOT / f"assets/stories/{name}.txt").read_text(encoding="utf-8") for name in ("calibration", "test")
    )
    training = {story.text.partition("\n")[0] for story in generate_stories(1500, 0)}
    assert not any(story in texts or story in training for story in stories)


def test_prompt_and_longest_choice_fit_the_context_of_the_bundled_model(questions):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-llama", local_files_only=True)
    prompts = [f"{question['prompt']} {max(question['choices'], key=len)}" for question in questions]
    assert max(map(len, tokenizer(prompts)["input_ids"])) < 512
