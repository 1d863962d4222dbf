"""A seeded grammar of small stories whose facts must be remembered over several sentences.

A story follows a small `World`: people walk between places, find, give, swap, hide and fetch coloured things, and
count shells or plums. Every event changes the world and says so in one of several sentences, so a question about the
end of the story has its right answer by construction; wrong choices are taken from the same story. Pure Python, a
pure function of (seed, index): the text for training, calibration and test and the multiple-choice questions all come
from here.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from tools import story_words as sw

CHOICES = 3


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: `prompt` (the story and the question, ending in "Answer:"), then " " and a choice.

    `kind` is who (has a thing), where_thing, where_person, colour or number.
    """

    prompt: str
    choices: tuple[str, ...]
    answer_index: int
    kind: str

    @property
    def answer(self) -> str:
        """The right choice."""
        return self.choices[self.answer_index]


@dataclass(frozen=True)
class Story:
    """One story: its `text` (most end in two to five answered questions) and what can be asked about it."""

    text: str
    questions: tuple[Question, ...]


@dataclass
class World:
    """What is true now, and the sentences told so far. Places are (preposition, noun); things are their nouns."""

    rng: Random
    people: list[str]
    colour: dict[str, str]
    places: list[tuple[str, str]]
    spots: list[tuple[str, str]]
    weather: str
    time: str
    where: dict[str, tuple[str, str]] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    lies: dict[str, tuple[str, str]] = field(default_factory=dict)
    counts: dict[str, tuple[str, int]] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    last_people: tuple[str, ...] = ()
    told_last: str = ""

    def say(self, templates: Sequence[str], *people: str, link: bool = True, **words: str) -> None:
        """Tell one of the templates; `people` fill {a}, {b}, {c}.

        {A} becomes a pronoun now and then, if the sentence before was about nobody else.
        """
        template = self.rng.choice(templates)
        subject = people[0] if people else ""
        alone = self.last_people == (subject,) and self.rng.random() < 0.6
        names = dict(zip("abc", people, strict=False)) | {"A": pronoun(subject, 0) if alone else subject}
        sentence = template.format(**names, his=pronoun(subject, 1), **words)
        if link and not sentence.startswith('"') and self.rng.random() < 0.3:
            if sentence.split()[0] not in self.people:
                sentence = sentence[0].lower() + sentence[1:]
            sentence = f"{self.rng.choice(sw.LINKS)}{self.rng.choice((',', ''))} {sentence}"
        self.sentences.append(sentence[0].upper() + sentence[1:])
        named = [key in template or (key == "{a}" and "{A}" in template) for key in ("{a}", "{b}", "{c}")]
        self.last_people = tuple(name for name, is_named in zip(people, named, strict=False) if is_named)

    def thing(self, noun: str) -> str:
        """Name a thing the reader knows: with its colour or without."""
        return f"the {self.colour[noun]} {noun}" if self.rng.random() < 0.35 else f"the {noun}"

    def new_thing(self) -> str | None:
        """Return a thing that has not appeared yet, or None."""
        fresh = [noun for noun in self.colour if noun not in self.holder and noun not in self.lies]
        return self.rng.choice(fresh) if fresh else None

    def held(self) -> tuple[str, str] | None:
        """Return some (thing, holder), or None."""
        return self.rng.choice(list(self.holder.items())) if self.holder else None

    def other(self, name: str) -> str:
        """Return somebody else."""
        return self.rng.choice([person for person in self.people if person != name])


def pronoun(name: str, case: int) -> str:
    """Return he/his/him or she/her/her for a name, by case 0, 1, 2."""
    return (("he", "his", "him") if name in sw.BOYS else ("she", "her", "her"))[case]


def at(place: tuple[str, str]) -> str:
    """("in", "barn") -> "in the barn"."""
    return f"{place[0]} the {place[1]}"


def a_thing(world: World, noun: str) -> str:
    """Introduce a thing: "a red kite", "an orange kite"."""
    colour = world.colour[noun]
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {noun}"


def items_of(number: int, item: str) -> str:
    """Return the noun after a number: "shell" after one, else "shells"."""
    return item if number == 1 else sw.COUNTABLES[item]


def begin(world: World) -> None:
    """Say who is there and where everybody is."""
    rng = world.rng
    a, b, c, *others = world.people
    p, q = rng.sample(world.places, 2)
    words = {"weather": world.weather, "time": world.time}
    if rng.random() < 0.5:
        world.where |= {a: p, b: p, c: p}
        world.say(sw.BEGIN_TOGETHER, a, b, c, link=False, p=at(p), **words)
    else:
        world.where |= {a: p, b: q, c: q}
        world.say(sw.BEGIN_APART, a, b, c, link=False, p=at(p), q=at(q), **words)
    for name in others:
        world.where[name] = rng.choice(world.places)
        world.say(sw.BEGIN_FOURTH, name, link=False, p=at(world.where[name]))


# The events: each tells one thing that happens and returns True, or returns False if it cannot happen now.


def find(world: World) -> bool:
    """Somebody comes by a new thing, or a new thing is seen lying somewhere."""
    noun = world.new_thing()
    if noun is None:
        return False
    x = a_thing(world, noun)
    if world.rng.random() < 0.3:
        world.lies[noun] = spot = world.rng.choice(world.spots)
        world.say(sw.SEE, x=x, p=at(spot))
    else:
        world.holder[noun] = name = world.rng.choice(world.people)
        world.say(sw.FIND, name, x=x, p=at(world.where[name]))
    return True


def give(world: World) -> bool:
    """A thing passes from one person to another; if they are apart, the giver goes there."""
    held = world.held()
    if held is None:
        return False
    noun, a = held
    b = world.other(a)
    world.holder[noun] = b
    templates = sw.GIVE_HERE if world.where[a] == world.where[b] else sw.GIVE_THERE
    world.where[a] = world.where[b]
    world.say(templates, a, b, x=world.thing(noun), to=world.where[b][1], him=pronoun(b, 2))
    return True


def swap(world: World) -> bool:
    """Two people at one place who each hold something exchange it."""
    pairs = [(x, y) for x, a in world.holder.items() for y, b in world.holder.items() if a != b]
    if not pairs:
        return False
    x, y = world.rng.choice(pairs)
    a, b = world.holder[x], world.holder[y]
    if world.where[a] != world.where[b]:
        return False
    world.holder |= {x: b, y: a}
    world.say(sw.SWAP, a, b, x=world.thing(x), y=world.thing(y))
    return True


def put(world: World) -> bool:
    """Somebody leaves a thing at a spot, or where they are."""
    held = world.held()
    if held is None:
        return False
    noun, name = held
    spot = world.where[name] if world.rng.random() < 0.3 else world.rng.choice(world.spots)
    del world.holder[noun]
    world.lies[noun] = spot
    world.say(sw.PUT, name, x=world.thing(noun), p=at(spot))
    return True


def take(world: World) -> bool:
    """Somebody fetches a thing that lies somewhere, going there if it is a place."""
    if not world.lies:
        return False
    noun, spot = world.rng.choice(list(world.lies.items()))
    name = world.rng.choice(world.people)
    del world.lies[noun]
    world.holder[noun] = name
    if spot in world.places:
        world.where[name] = spot
    templates = sw.TAKE_THERE if spot in world.places else sw.TAKE_HERE
    world.say(templates, name, x=world.thing(noun), p=at(spot), to=spot[1])
    return True


def walk(world: World) -> bool:
    """One person, or two who are together, go to another place."""
    rng = world.rng
    a = rng.choice(world.people)
    place = rng.choice([place for place in world.places if place != world.where[a]])
    mates = [name for name in world.people if name != a and world.where[name] == world.where[a]]
    world.where[a] = place
    if mates and rng.random() < 0.35:
        b = rng.choice(mates)
        world.where[b] = place
        world.say(sw.WALK_TOGETHER, a, b, to=place[1])
    else:
        world.say(sw.WALK_ALONE, a, to=place[1], animal=rng.choice(sw.ANIMALS))
    return True


def count(world: World) -> bool:
    """Somebody gets countable things, or more of them, or loses some."""
    rng = world.rng
    name = rng.choice([*world.people, *world.counts, *world.counts])
    if name not in world.counts:
        items = sorted({item for item, _ in world.counts.values()})
        item = rng.choice(items) if items and rng.random() < 0.5 else rng.choice(list(sw.COUNTABLES))
        number = rng.randint(1, 7)
        world.counts[name] = (item, number)
        world.say(sw.COUNT_FIRST, name, n=f"{sw.NUMBERS[number]} {items_of(number, item)}")
        return True
    item, number = world.counts[name]
    step = rng.randint(1, 3)
    if rng.random() < 0.5 and number + step <= 9:
        number += step
        templates = sw.COUNT_MORE
    elif number > step:
        number -= step
        templates = sw.COUNT_LESS
    else:
        return False
    world.counts[name] = (item, number)
    if rng.random() < 0.4:
        templates = [f"{template} Now {{a}} had {{n}}." for template in templates]
    words = {
        "k": sw.NUMBERS[step],
        "items": sw.COUNTABLES[item],
        "more": f"{sw.NUMBERS[step]} more {items_of(step, item)}",
    }
    words |= {"n": f"{sw.NUMBERS[number]} {items_of(number, item)}", "animal": rng.choice(sw.ANIMALS)}
    world.say(templates, name, **words)
    return True


def recall(world: World) -> bool:
    """People talk about what is true now."""
    rng = world.rng
    a = rng.choice(world.people)
    b = world.other(a)
    if not world.holder and not world.lies:
        return False
    noun = rng.choice([*world.holder, *world.lies])
    if noun in world.lies:
        world.say(sw.RECALL_PLACE, a, b, x=f"the {noun}", p=at(world.lies[noun]))
    else:
        holder = world.holder[noun]
        world.say(sw.RECALL_HOLDER, holder, world.other(holder), x=f"the {noun}")
    return True


def muse(world: World) -> bool:
    """Something that changes nothing."""
    rng = world.rng
    if rng.random() < 0.45:
        world.say([rng.choice(sw.FILLERS)], link=False)
    elif rng.random() < 0.25:
        name, colour, animal = rng.choice(world.people), rng.choice(sw.FUR), rng.choice(sw.ANIMALS)
        world.say(sw.ANIMAL_PASSES, name, colour=colour, animal=animal, to=rng.choice(world.places)[1])
    else:
        thought, name = rng.choice(sw.THOUGHTS), rng.choice(world.people)
        world.say([thought], name, mood=rng.choice(sw.MOODS), weather=world.weather)
    return True


EVENTS: dict[Callable[[World], bool], float] = {
    find: 2.6,
    give: 2.4,
    swap: 0.8,
    put: 1.4,
    take: 1.2,
    walk: 1.8,
    count: 2.4,
    recall: 0.7,
    muse: 1.6,
}


def new_world(rng: Random) -> World:
    """Draw the cast, the things with their colours, the places, the weather."""
    people = rng.sample([*sw.GIRLS, *sw.BOYS], rng.choice((3, 3, 3, 4)))
    things = rng.sample(sw.THINGS, rng.choice((3, 3, 4)))
    colour = dict(zip(things, rng.sample(sw.COLOURS, len(things)), strict=True))
    places, spots = rng.sample(sw.PLACES, 4), rng.sample(sw.SPOTS, 3)
    return World(rng, people, colour, places, spots, rng.choice(sw.WEATHER), rng.choice(sw.TIMES))


def live(world: World) -> None:
    """Tell the beginning and 5 to 9 events; each story likes some kinds of event more than others."""
    rng = world.rng
    weights = [weight * rng.uniform(0.4, 1.6) for weight in EVENTS.values()]
    begin(world)
    find(world)
    remaining = rng.randint(4, 8)
    while remaining:
        event = rng.choices(list(EVENTS), weights)[0]
        remaining -= event(world)


def close(world: World) -> None:
    """End the story: with a feeling, a last fact, or as it is."""
    rng = world.rng
    draw = rng.random()
    if draw < 0.35:
        words = {"mood": rng.choice(sw.MOODS), "weather": world.weather, "time": world.time}
        world.say([rng.choice(sw.ENDINGS)], rng.choice(world.people), link=False, **words)
    elif draw < 0.6:
        world.told_last = noun = rng.choice([*world.holder, *world.lies])
        if noun in world.lies:
            templates = [f"{words} was {{p}}." for words in sw.LAST_WORDS]
            world.say(templates, link=False, x=f"the {noun}", p=at(world.lies[noun]))
        else:
            templates = [f"{words} belonged to {{a}}." for words in sw.LAST_WORDS]
            world.say(templates, world.holder[noun], link=False, x=f"the {noun}")


def facts(world: World) -> list[tuple[str, str, str]]:
    """List what can be asked of the world as (kind, question, answer); what the last sentence tells is left out."""
    held = [(noun, name) for noun, name in world.holder.items() if noun != world.told_last]
    lying = [(noun, spot) for noun, spot in world.lies.items() if noun != world.told_last]
    return [
        *(("who", f"Who has the {noun}?", name) for noun, name in held),
        *(("where", f"Where is the {noun}?", f"the {spot}") for noun, (_, spot) in lying),
        *(("where", f"Where is {name}?", f"the {noun}") for name, (_, noun) in world.where.items()),
        *(("colour", f"What colour is the {noun}?", world.colour[noun]) for noun in (*world.holder, *world.lies)),
        *(
            ("number", f"How many {sw.COUNTABLES[item]} has {name}?", sw.NUMBERS[number])
            for name, (item, number) in world.counts.items()
        ),
    ]


def distractors(world: World, kind: str, answer: str, body: str) -> list[str]:
    """List the wrong answers of that kind that occur in the story."""
    pool = {
        "who": world.people,
        "where": [f"the {noun}" for _, noun in (*world.places, *world.spots)],
        "colour": sw.COLOURS,
        "number": sw.NUMBERS[1:],
    }[kind]
    return [word for word in pool if word != answer and re.search(rf"\b{word}\b", body)]


def make_questions(world: World, body: str) -> list[Question]:
    """Ask at most two facts of each kind that have enough wrong answers, in random order, choices shuffled."""
    questions: list[Question] = []
    asked: Counter[str] = Counter()
    known = facts(world)
    for kind, text, answer in world.rng.sample(known, len(known)):
        wrong = distractors(world, kind, answer, body)
        if len(wrong) < CHOICES - 1 or asked[kind] == 2:
            continue
        asked[kind] += 1
        choices = [answer, *world.rng.sample(wrong, CHOICES - 1)]
        world.rng.shuffle(choices)
        label = kind if kind != "where" else "where_thing" if text.startswith("Where is the ") else "where_person"
        questions.append(Question(f"{body}\nQuestion: {text} Answer:", tuple(choices), choices.index(answer), label))
    return questions


def tell_story(rng: Random) -> tuple[World, Story]:
    """Tell one story; the world at its end is returned as well."""
    world = new_world(rng)
    live(world)
    close(world)
    body = " ".join(world.sentences)
    questions = make_questions(world, body)
    answered = questions[: rng.randint(2, 5)] if rng.random() < 0.9 else []
    lines = [f"{question.prompt.removeprefix(body)} {question.answer}." for question in answered]
    return world, Story(body + "".join(lines), tuple(questions))


def generate_stories(count: int, seed: int) -> Iterator[Story]:
    """Yield `count` stories. Story i is a function of (seed, i) alone, whatever the count."""
    for index in range(count):
        yield tell_story(Random(f"{seed}/{index}"))[1]


def join_stories(stories: Iterable[Story]) -> str:
    """Join stories into one text, a blank line between them."""
    return "\n\n".join(story.text for story in stories)
