"""The vocabulary and the sentences of the stories: about 630 words. Data only; `stories.py` tells with it.

In the sentences {a}, {b}, {c} are people, {A} is {a} or a pronoun, {x} a thing, {p} a place with its preposition and
{to} one without. Order matters: a seed picks by position, so a change here changes every story.
"""


def words(text: str) -> tuple[str, ...]:
    """Split at white space."""
    return tuple(text.split())


def lines(text: str) -> tuple[str, ...]:
    """Split into the non-empty lines."""
    return tuple(line for line in text.splitlines() if line)


def located(text: str) -> tuple[tuple[str, str], ...]:
    """Read lines "preposition: noun noun …" into pairs (preposition, noun)."""
    rows = [line.split(": ") for line in lines(text)]
    return tuple((preposition, noun) for preposition, nouns in rows for noun in nouns.split())


GIRLS = words(
    """Ada Anna Bella Clara Daisy Elsa Emma Fay Greta Hanna Ida Ivy Jane June Kate Lena Lily Lucy Maya Mila Nina Nora
    Olga Petra Rosa Ruth Sara Tess Vera Wilma Zoe"""
)
BOYS = words(
    """Adam Ben Carl Dan Emil Finn Fred Gus Hugo Ivan Jack Jonas Karl Leo Luke Mark Max Ned Nick Oscar Otto Paul Pete
    Ralf Sam Simon Theo Tim Tom Victor Will"""
)
COLOURS = words("red blue green yellow black white brown pink orange purple grey golden silver")
THINGS = words(
    """kite lantern drum basket hat scarf ball book key cup rope bell boat map coat flute whistle umbrella bucket candle
    blanket pot ring mirror spoon feather button ribbon doll puzzle lamp box bag jar brush saddle shovel hammer ladder
    clock flag mask glove boot belt compass violin wagon pillow bottle"""
)
# Where people go.
PLACES = located("""
in: barn garden kitchen forest village library school castle tower cave meadow stable cellar attic bakery church orchard
in: workshop tent valley
by: river lake sea well pond waterfall fire gate fence window
at: market harbour station mill inn farm zoo bridge fountain camp
on: hill beach island roof
""")
# Where only things are.
SPOTS = located("""
under: bed table bench bush stone tree stairs carpet
behind: door curtain stove hedge wall
in: chest drawer cupboard trunk nest
on: shelf chair branch sill
""")
COUNTABLES = {
    **{
        noun: noun + "s"
        for noun in words(
            """shell coin apple plum nut egg pear stamp marble carrot cookie flower
            pebble card bean onion lemon cake walnut potato pumpkin mushroom"""
        )
    },
    "potato": "potatoes",
    "cherry": "cherries",
    "berry": "berries",
    "peach": "peaches",
}
NUMBERS = words("no one two three four five six seven eight nine ten")
FUR = words("black white brown grey")
ANIMALS = words("cat dog goat duck horse rabbit owl fox mouse hen crow turtle donkey lamb frog squirrel")
WEATHER = words("sunny rainy windy cold warm cloudy foggy snowy quiet bright")
TIMES = words("morning afternoon evening day Sunday Monday Friday Saturday")
MOODS = words("happy sad tired hungry proud curious angry excited calm worried sleepy cheerful nervous brave")
LINKS = lines("""
Then
Soon
After that
A little later
Later
At noon
After lunch
Before long
Suddenly
At last
In the meantime
A moment later
When the rain stopped
When the sun came out
Just then
Without a word
After a short rest
""")

BEGIN_TOGETHER = lines("""
one {weather} {time}, {a}, {b} and {c} met {p}.
{a} and {b} were playing {p}. Their friend {c} was there too.
once upon a time there were three friends: {a}, {b} and {c}. They were {p}.
it was a {weather} {time}. {a}, {b} and {c} were {p}.
{a}, {b} and {c} spent the {weather} {time} {p}.
last {time} {a} took {b} and {c} along. They sat {p}.
on a {weather} {time} {c} found {a} and {b} {p}.
""")
BEGIN_APART = lines("""
one {weather} {time}, {a} was {p}. {b} and {c} were {q}.
{a} was all alone {p}, for {b} and {c} were {q}.
it was a {weather} {time}. {a} worked {p}, while {b} and {c} rested {q}.
long ago {a} lived {p}. {b} and {c} lived {q}.
{b} and {c} waited {q}. But {a} was still {p}.
this is a story about {a}, {b} and {c}. {a} was {p} and the others were {q}.
""")
BEGIN_FOURTH = lines("""
{a} was {p}.
{a} had stayed {p}.
at that time {a} was {p}.
""")
SEE = lines("""
there was {x} {p}.
somebody had left {x} {p}.
{x} lay {p}.
{p} lay {x}.
{p} one could see {x}.
""")
FIND = lines("""
{A} found {x} {p}.
{A} had {x}.
{A} carried {x}.
{A} had brought {x} from home.
{A} bought {x} from a trader.
{A} got {x} for {his} birthday.
{A} made {x} with {his} own hands.
{A} got {x} from an old aunt.
{A} was proud of {his} new toy, {x}.
{A} won {x} in a race.
{A} opened {his} bag and took out {x}.
""")
GIVE_HERE = lines("""
{A} gave {x} to {b}.
{A} handed {x} to {b}.
{b} asked {a} for {x} and got it.
{A} lent {x} to {b}.
{A} did not need {x} and gave it to {b}.
"This is for you," said {a} and gave {x} to {b}.
{A} sold {x} to {b}.
{b} took {x} from {a}.
{b} borrowed {x} from {a}.
{A} passed {x} on to {b}.
{A} threw {x} to {b}, who caught it.
""")
GIVE_THERE = lines("""
{A} went to the {to} and gave {x} to {b}.
{A} brought {x} to {b} at the {to}.
{A} met {b} at the {to} and gave {him} {x}.
""")
SWAP = lines("""
{A} traded {x} for {y} with {b}.
{A} and {b} swapped: now {b} had {x} and {a} had {y}.
{b} wanted {x}, so {a} took {y} for it.
{A} gave {x} to {b} and got {y} in return.
""")
PUT = lines("""
{A} put {x} {p}.
{A} hid {x} {p}.
{A} left {x} {p}.
{A} dropped {x} {p}.
{A} laid {x} down {p}.
{A} forgot {x} {p}.
{A} was tired of {x} and left it {p}.
{A} took {x} and hid it {p}, where nobody would look.
""")
TAKE_THERE = lines("""
{A} went to the {to} and took {x}.
{A} walked to the {to} and fetched {x}.
{A} ran to the {to} and picked up {x}.
""")
TAKE_HERE = lines("""
{A} saw {x} {p} and took it.
{A} picked up {x}.
{A} discovered {x} {p} and kept it.
{A} looked {p} and found {x}.
{A} came by and took {x}.
it was {a} who found {x} {p}.
""")
WALK_TOGETHER = lines("""
{a} and {b} walked to the {to}.
{a} took {b} to the {to}.
{a} and {b} went to the {to} together.
{a} and {b} ran all the way to the {to}.
""")
WALK_ALONE = lines("""
{A} walked to the {to}.
{A} went to the {to}.
{A} ran to the {to}.
{A} left for the {to}.
{A} rode to the {to}.
{A} had to go to the {to}.
{A} was called to the {to} and went at once.
{A} followed a {animal} to the {to}.
{A} climbed over a wall and came to the {to}.
""")
COUNT_FIRST = lines("""
{A} had {n}.
{A} picked {n}.
{A} found {n} on the way.
{A} bought {n}.
{A} had {n} in {his} pocket.
""")
COUNT_MORE = lines("""
{A} found {more}.
{A} got {more}.
Somebody gave {more} to {a}.
{A} bought {more}.
{A} picked {more}.
""")
COUNT_LESS = lines("""
{A} lost {k} of the {items}.
{A} dropped {k} of {his} {items}.
{A} gave away {k} of {his} {items}.
A {animal} stole {k} of the {items} from {a}.
{A} had to sell {k} of {his} {items}.
""")
RECALL_PLACE = lines("""
"Where is {x}?" asked {a}. "It is {p}," said {b}.
"I can see {x} {p}," said {a} to {b}.
{a} and {b} knew that {x} was {p}.
{x} was still {p}, but {a} did not tell {b}.
""")
RECALL_HOLDER = lines("""
"Who has {x}?" asked {b}. "I have it," said {a}.
{b} saw that {a} had {x}.
{a} showed {x} to {b}.
{a} still had {x}, and {b} knew it.
"May I see {x}?" asked {b}, but {a} said no.
""")
FILLERS = lines("""
The wind blew through the leaves.
It began to rain.
The sun was shining.
A bird sang in the distance.
Everyone laughed.
Nobody said a word for a while.
The clouds moved slowly over the land.
Somewhere a dog barked.
It smelled of fresh bread.
The air was cool and clean.
Far away thunder rolled.
The church bells rang.
They sang an old song together.
It was time for lunch, and there was hot soup.
Snow started to fall.
A train passed with a long whistle.
The shadows grew longer.
It was getting late.
The grass was still wet.
Two bees danced around a rose.
The path was long and full of mud.
Music came from an open house.
""")
ANIMAL_PASSES = lines("""
A {colour} {animal} came out of the {to}.
They met a {colour} {animal}.
A {colour} {animal} watched them.
{A} had a {colour} {animal} at home.
{A} saw a {colour} {animal} near the {to}.
""")
THOUGHTS = lines("""
{A} was very {mood}.
{A} felt {mood} and smiled.
"I am so {mood}," said {a}.
{A} looked {mood}.
"What a {weather} day!" said {a}.
{A} told a long story about a king and a dragon.
{A} wanted to learn to swim.
{A} drank some water and sat down.
{A} had a strange dream last night.
{A} was not {mood} any more.
"Please wait for me!" called {a}.
{A} looked up at the sky and thought of home.
{A} hummed a little tune.
"Let us play a game," said {a}.
{A} ran as fast as the wind.
{A} could not stop laughing.
{A} helped to cook dinner.
"Do not be {mood}," said {a}. "All will be well."
{A} counted the stars.
{A} waved to the children.
{A} fell over a root but was not hurt.
{A} wrote a letter to a friend.
""")
ENDINGS = lines("""
They all went home before dark.
It had been a good day.
That night everyone slept well.
And they never forgot that day.
From then on they were best friends.
So the {weather} {time} came to an end.
{A} was {mood} and said good night.
They promised to meet again soon.
And that is how it all ended.
"We should do this again," said {a}.
The moon rose, and all was quiet.
{A} went to sleep with a smile.
""")
LAST_WORDS = lines("""
at the end of the day {x}
in the end {x}
so {x}
and that is how {x}
when night fell, {x}
""")
