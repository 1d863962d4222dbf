"""The parser of the scripts: either spelling of a flag, what a wrong word was meant to be, and two lengths of help."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import pytest

from utils.flags import BehindWord, did_you_mean
from utils.parser import Parser, set_basic
from utils.setting_flags import add_flags, from_flags
from utils.settings import option, part


class Fruit(StrEnum):
    APPLE = "apple"
    PEAR = "pear"


@dataclass(frozen=True)
class Juice:
    TITLE: ClassVar[str] = "order, juice"

    sugar_share: float = option(0.5, "how sweet it is", basic="sweetness")


@dataclass(frozen=True)
class Order:
    TITLE: ClassVar[str] = "order"

    first_fruit: Fruit = option(Fruit.APPLE, "which of them", basic=True)
    other_fruits: tuple[str, ...] = option((), "more of them", choices=["apple", "pear"], metavar="FRUIT")
    where_to: Path = option(Path("here"), "where to bring it", basic=True)
    gift_wrap: bool = option(False, "with a ribbon")
    juice: Juice | None = part(Juice, switch="press_it", help="as juice", basic=True)


def parser(short: bool = True) -> Parser:
    made = Parser("An order.\n\nAll about it.", "examples:\n  order", "[flags] [TABLE]", short=short)
    set_basic(made.add_argument("table", nargs="?", help="where one sits"), True)
    add_flags(made, Order)
    return made


def parsed(*flags: str) -> Order:
    return from_flags(Order, parser().parse_args(flags))


def refused(*flags: str, caplog) -> str:
    """What the parser says of these flags."""
    with pytest.raises(SystemExit) as ended:
        parsed(*flags)
    assert ended.value.code == 2
    [line] = caplog.messages
    return line


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("--first_fruit pear", "--first-fruit pear"),
        ("--first_fruit=pear", "--first-fruit=pear"),
        ("--gift_wrap", "--gift-wrap"),
        ("--gift_wrap --no_gift_wrap --press_it", "--gift-wrap --no-gift-wrap --press-it"),
        ("--press_it --sugar_share 1", "--press-it --sugar-share 1"),
        ("--gift_wrap", "--gift_wrap --no-press_it"),
    ],
)
def test_either_spelling_is_the_same_flag(one, other):
    assert parsed(*one.split()) == parsed(*other.split()) != parsed()


def test_values_keep_their_dashes():
    given = parsed("--where-to", "a-b_c", "--sugar-share=-1")
    assert given.where_to == Path("a-b_c")
    assert parser().parse_args(["some-table"]).table == "some-table"
    assert parsed("--where-to=--first-fruit").where_to == Path("--first-fruit")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--frist_fruit pear", "unrecognized --frist_fruit; did you mean --first_fruit?"),
        ("--frist-fruit=pear", "unrecognized --frist-fruit; did you mean --first_fruit?"),
        ("--first pear", "unrecognized --first; did you mean --first_fruit?"),
        ("--gift-warp --pres_it", "unrecognized --gift-warp --pres_it; did you mean --gift_wrap, --press_it?"),
        ("--colour red", "unrecognized --colour; see "),
        ("one two", "unrecognized two; see "),
        ("--first_fruit paer", "invalid choice: 'paer' (choose from apple, pear); did you mean pear?"),
        ("--other_fruits apple peer", "invalid choice: 'peer' (choose from apple, pear); did you mean pear?"),
        ("--first_fruit plum", "invalid choice: 'plum' (choose from apple, pear); see "),
        ("--sugar_share sweet", "invalid float value: 'sweet'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_what_was_meant(flags, words, caplog):
    assert words in refused(*flags.split(), caplog=caplog)


def test_nothing_is_suggested_for_what_is_near_to_nothing():
    assert did_you_mean(["--", "--zzz"], ["--first_fruit"]) == ""
    assert did_you_mean([], ["--first_fruit"]) == ""


def shown(*flags: str, capsys, short: bool = True) -> str:
    with pytest.raises(SystemExit) as ended:
        parser(short).parse_args(flags)
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--help"], ["-h"], ["-h", "--gift_wrap"]])
def test_the_help_tells_of_basic_flags_in_sections(flags, capsys):
    text = shown(*flags, capsys=capsys)
    assert text.splitlines()[0].startswith("usage: ")
    assert text.splitlines()[0].endswith(" [flags] [TABLE]")
    assert "order" in text.partition("An order.")[2]
    assert not any(word in text for word in ("All about it", "ribbon", "more of them", "how sweet", "order, juice:"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    at = lines.index("order:")
    assert lines[at + 1 : at + 5] == [
        "--first_fruit FRUIT which of them (default: apple)",
        "--where_to PATH where to bring it (default: here)",
        "--press_it as juice",
        "--sugar_share SHARE sweetness",
    ]


@pytest.mark.parametrize("flags", [["--help-all"], ["--help_all"], ["--help", "all"], ["-h", "all"]])
def test_the_whole_help_tells_of_every_flag(flags, capsys):
    text = shown(*flags, capsys=capsys)
    assert text.splitlines()[0].endswith(" [flags] [TABLE]")
    assert {"order:", "order, juice:"} <= set(text.splitlines())
    assert all(word in text for word in ("All about it", "ribbon", "more of them", "how sweet it is", "{apple,pear}"))


def test_a_script_of_few_flags_shows_them_all(capsys):
    text = shown("--help", capsys=capsys, short=False)
    assert "ribbon" in text
    assert "--help-all" not in text


def test_a_word_may_stand_in_front_of_a_value(caplog):
    parser = Parser("")
    parser.add_argument("--into", nargs="+", action=BehindWord, const="jam", metavar=("jam", "POT"))
    assert parser.parse_args(["--into", "pot"]).into == parser.parse_args(["--into", "jam", "pot"]).into == "pot"
    for values, message in (
        (["jam"], "--into: a value is missing behind jam"),
        (["honey", "pot"], "--into: honey is not known; give jam and one value"),
        (["jam", "pot", "pan"], "--into: jam pot is not known"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(["--into", *values])
        assert message in caplog.text
