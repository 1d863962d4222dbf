"""The stories are reproducible, and a reader who sees nothing but the sentences answers every question alike."""

import re
from random import Random

import pytest

from tools import story_words as sw
from tools.stories import CHOICES, generate_stories, join_stories, tell_story

NAME = r"[A-Z]\w+"
GROUPS = {
    "A": rf"(?P<A>{NAME}|[Hh]e|[Ss]he)",
    **{key: rf"(?P<{key}>{NAME})" for key in "abc"},
    **{key: rf"(?:an?|the)(?: \w+)? (?P<{key}>{'|'.join(sw.THINGS)})" for key in "xy"},
    **{key: rf"(?:in|on|by|at|under|behind) the (?P<{key}>\w+)" for key in "pq"},
    "n": rf"(?P<n>{'|'.join(sw.NUMBERS)}) (?P<items>\w+)",
    "k": rf"(?P<k>{'|'.join(sw.NUMBERS)})",
    "more": rf"(?P<k>{'|'.join(sw.NUMBERS)}) more \w+",
    "to": r"(?P<to>\w+)",
}
LINK = re.compile(rf"(?:{'|'.join(sw.LINKS)}),? ")
EVENTS = {
    name: getattr(sw, name)
    for name in sw.words(
        """BEGIN_TOGETHER BEGIN_APART BEGIN_FOURTH SEE FIND GIVE_HERE GIVE_THERE SWAP PUT TAKE_THERE TAKE_HERE
        WALK_TOGETHER WALK_ALONE COUNT_FIRST COUNT_MORE COUNT_LESS"""
    )
}


def pattern(template: str) -> re.Pattern[str]:
    """A regular expression for the sentences a template can make; a word named twice must be the same twice."""
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        key = match[1]
        if key in seen:
            return rf"(?P={key})"
        seen.add(key)
        return GROUPS.get(key, r"\w+")

    text = re.sub(r"\\\{(\w+)\\\}", group, re.escape(template))
    return re.compile(text + rf"(?: Now {NAME} had .*)?")


PATTERNS = [(event, pattern(template)) for event, templates in EVENTS.items() for template in templates]


class Reader:
    """Reads sentences one by one and keeps what they say, independently of the generator's own bookkeeping."""

    def __init__(self) -> None:
        self.where: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.lies: dict[str, str] = {}
        self.count: dict[str, int] = {}
        self.last: list[str] = []

    def read(self, sentence: str) -> None:
        """Recognise the sentence and apply what it tells; sentences that change nothing are passed over."""
        named = [word for word in re.findall(r"\w+", sentence) if word in (*sw.GIRLS, *sw.BOYS)]
        named = list(dict.fromkeys(named))
        plain = LINK.sub("", sentence, count=1) if LINK.match(sentence) else sentence
        small, capital = plain[0].lower() + plain[1:], plain[0].upper() + plain[1:]
        for event, regex in PATTERNS:
            if match := regex.fullmatch(capital) or regex.fullmatch(small):
                found = match.groupdict()
                if found.get("A", "").lower() in ("he", "she"):
                    assert len(self.last) == 1, sentence
                    found["A"] = self.last[0]
                self.apply(event, found)
                break
        self.last = named or (self.last if re.search(r"\b([Hh]e|[Ss]he)\b", sentence) else [])

    def apply(self, event: str, found: dict[str, str]) -> None:
        """Change what is known by one event."""
        a, b, x = found.get("a") or found.get("A"), found.get("b"), found.get("x")
        if event == "BEGIN_TOGETHER":
            self.where |= {found[key]: found["p"] for key in "abc"}
        elif event == "BEGIN_APART":
            self.where |= {a: found["p"], b: found["q"], found["c"]: found["q"]}
        elif event == "BEGIN_FOURTH":
            self.where[a] = found["p"]
        elif event.startswith("WALK"):
            self.where |= {name: found["to"] for name in (a, b) if name}
        elif event.startswith("COUNT"):
            number = sw.NUMBERS.index(found.get("n") or found.get("k"))
            before = self.count.get(a, 0)
            self.count[a] = {"FIRST": number, "MORE": before + number, "LESS": before - number}[event.split("_")[1]]
        elif event in ("SEE", "PUT"):
            self.holder.pop(x, None)
            self.lies[x] = found["p"]
        else:
            self.lies.pop(x, None)
            self.holder[x] = b if event in ("GIVE_HERE", "GIVE_THERE", "SWAP") else a
            if event == "SWAP":
                self.holder[found["y"]] = a
            if found.get("to"):
                self.where[a] = found["to"]

    def answer(self, question: str) -> str:
        """Answer from what was read."""
        if match := re.fullmatch(r"Who has the (\w+)\?", question):
            return self.holder[match[1]]
        if match := re.fullmatch(r"Where is the (\w+)\?", question):
            return f"the {self.lies[match[1]]}"
        if match := re.fullmatch(r"Where is (\w+)\?", question):
            return f"the {self.where[match[1]]}"
        match = re.fullmatch(r"How many \w+ has (\w+)\?", question)
        return sw.NUMBERS[self.count[match[1]]]


def test_a_seed_gives_the_same_stories_whatever_the_count():
    assert list(generate_stories(30, 7)) == list(generate_stories(60, 7))[:30]


def test_other_seeds_give_other_stories():
    texts = [{story.text for story in generate_stories(500, seed)} for seed in range(4)]
    assert len(set.union(*texts)) == 4 * 500


def test_choices_are_distinct_and_occur_in_the_story():
    for story in generate_stories(300, 1):
        for question in story.questions:
            body, _, asked = question.prompt.rpartition("\n")
            assert story.text.startswith(body)
            assert re.fullmatch(r"Question: .*\? Answer:", asked)
            assert len(set(question.choices)) == CHOICES
            wrong = set(question.choices) - {question.answer}
            assert all(re.search(rf"\b{choice}\b", body) for choice in wrong)


def test_a_reader_of_the_sentences_answers_as_the_story_does():
    checked = 0
    for index in range(400):
        world, story = tell_story(Random(index))
        reader = Reader()
        for sentence in world.sentences:
            reader.read(sentence)
        for question in story.questions:
            text = question.prompt.rpartition("Question: ")[2].removesuffix(" Answer:")
            if match := re.fullmatch(r"What colour is the (\w+)\?", text):
                assert f"{question.answer} {match[1]}" in question.prompt
            else:
                assert reader.answer(text) == question.answer, question.prompt
                checked += 1
    assert checked > 800


def test_right_answers_stand_at_every_position_alike():
    positions = [question.answer_index for story in generate_stories(400, 2) for question in story.questions]
    for position in range(CHOICES):
        assert positions.count(position) / len(positions) == pytest.approx(1 / CHOICES, abs=0.05)


def test_vocabulary_is_small_and_stories_are_short():
    text = join_stories(generate_stories(1000, 0))
    assert 500 < len(set(re.findall(r"[A-Za-z]+", text))) < 900
    assert 60 < len(text.split()) / 1000 < 140
