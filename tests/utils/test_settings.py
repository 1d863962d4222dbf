"""Settings whose fields say everything: flags, JSON, identity and folder, on a class of our own."""

import argparse
import json
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import pytest
from settings_cases import switched_on, with_another

from utils.parser import Parser
from utils.setting_flags import add_flags, from_flags, from_flat, start_flags_from, way_off
from utils.settings import Changes, defaults, flat, folder_name, from_dict, identity, option, options, part, to_dict


class Fruit(StrEnum):
    APPLE = "apple"
    PEAR = "pear"


@dataclass(frozen=True)
class Juice:
    TITLE: ClassVar[str] = "juice"

    sugar: float = option(0.5, "how sweet", tag="sugar")
    cold: bool = option(False, "with ice", flag="with_ice")


@dataclass(frozen=True)
class Straw:
    length: int = option(20, "in centimetres", changes=Changes.FIGURES)


@dataclass(frozen=True)
class Order:
    """`count` may not be negative."""

    TITLE: ClassVar[str] = "order"

    fruit: Fruit = option(Fruit.APPLE, "which", tag="")
    count: int | None = option(3, "how many", flag=("number", "n"), tag="x")
    names: tuple[str, ...] = option((), "for whom")
    where: Path = option(Path("here"), "to bring it to", changes=Changes.NOTHING)
    gift: bool | None = option(None, "wrapped or not", changes=Changes.FIGURES, tag="gift")
    juice: Juice | None = part(Juice, switch="squeeze", help="as juice", tag="squeezed")
    straw: Straw | None = part(Straw, switch="straw", help="without a straw", on=True)

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 0:
            raise ValueError("--number: must not be negative")


FULL = Order(Fruit.PEAR, None, ("Ann", "Bob"), Path("there"), False, Juice(0.25, True), None)
every_option = pytest.mark.parametrize("each", options(Order), ids=lambda each: each.name)


def parsed(*flags: str, leave_out: tuple[str, ...] = (), start: dict | None = None) -> Order:
    parser = Parser("An order.")
    add_flags(parser, Order, leave_out)
    start_flags_from(parser, Order, start or {})
    return from_flags(Order, parser.parse_args(flags))


def test_options_are_those_of_all_parts_in_order_with_their_switches():
    found = {each.name: (each.path, each.switches, each.changes) for each in options(Order)}
    assert list(found) == ["fruit", "number", "names", "where", "gift", "sugar", "with_ice", "length"]
    assert found["with_ice"] == (("juice", "cold"), (("juice",),), Changes.LAYERS)
    assert found["number"] == (("count",), (), Changes.LAYERS)
    assert found["length"] == (("straw", "length"), (("straw",),), Changes.FIGURES)


def test_without_flags_everything_is_as_the_class_says():
    assert parsed() == Order()


def test_flags_reach_their_fields():
    flags = "--fruit pear --n 7 --names Ann Bob --where there --no-gift --squeeze --sugar 0.25 --with_ice --no_straw"
    assert parsed(*flags.split()) == replace(FULL, count=7)
    assert parsed("--number", "7").count == 7
    assert parsed("--gift").gift is True
    assert parsed("--length", "9").straw == Straw(9)


@pytest.mark.parametrize("no", ["no_", "no-"])
@pytest.mark.parametrize("name", ["squeeze", "straw", "with_ice", "gift"])
def test_what_is_on_or_off_can_be_said_both_ways_and_the_last_word_wins(name, no):
    on, off = f"--{name}", f"--{no}{name}"
    with_it, without = parsed("--squeeze", on), parsed("--squeeze", off)
    assert parsed("--squeeze", off, on) == with_it != without == parsed("--squeeze", on, off)


@pytest.mark.parametrize(("before", "after"), [(("--number", "7", "--number", "none"), None), (("--number", "0"), 0)])
def test_the_word_none_is_a_value_where_there_may_be_none(before, after):
    assert parsed(*before).count is after


def test_the_word_none_is_one_of_the_choices_where_there_may_be_none(capsys):
    @dataclass(frozen=True)
    class Basket:
        fruit: Fruit | None = option(Fruit.PEAR, "which")

    parser = argparse.ArgumentParser()
    add_flags(parser, Basket)
    assert from_flags(Basket, parser.parse_args(["--fruit", "none"])) == Basket(None)
    assert from_flags(Basket, parser.parse_args(["--fruit", "apple"])).fruit is Fruit.APPLE
    assert "{apple,pear,none}" in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--fruit", "plum"])
    assert "invalid choice: 'plum' (choose from apple, pear, none)" in capsys.readouterr().err


START = {"fruit": "pear", "number": 7, "names": ["Ann"], "where": "there", "gift": True, "squeeze": True, "sugar": 0.25}
STARTED = Order(Fruit.PEAR, 7, ("Ann",), Path("there"), True, Juice(0.25), None)


def test_flags_can_start_from_other_values_than_the_defaults():
    started = parsed(start=START | {"straw": False})
    assert started == STARTED
    assert type(started.fruit) is Fruit
    assert isinstance(started.where, Path)


def test_what_is_given_wins_over_what_the_flags_start_from():
    given = [
        "--fruit",
        "apple",
        "--number",
        "none",
        "--names",
        "Bob",
        "--where",
        "here",
        "--no_gift",
        "--no_squeeze",
        "--straw",
    ]
    assert parsed(*given, start=START | {"straw": False}) == Order(count=None, names=("Bob",), gift=False)


def test_what_has_no_flag_does_not_start_from_another_value():
    assert parsed(leave_out=("fruit", "squeeze"), start=START) == replace(
        STARTED, fruit=Fruit.APPLE, juice=None, straw=Straw()
    )


@pytest.mark.parametrize("values", [{"colour": "red"}, {"juice": True}, {"fruit": "plum"}, {"sugar": "sweet"}], ids=str)
def test_flags_do_not_start_from_what_cannot_be(values):
    with pytest.raises(ValueError, match=r"is no setting of Order|plum|sweet"):
        parsed(start=values)


@pytest.mark.parametrize("name", ["squeeze", "straw", "with_ice", "gift", "number"])
def test_the_way_off_turns_it_off(name):
    everything = START | {"straw": True, "with_ice": True}
    before, after = (flat(parsed(*flags, start=everything)) for flags in ((), way_off(Order, name).split()))
    assert before[name]
    assert not after[name]
    assert all(after[other] == before[other] for other in after if other != name)


def test_there_is_no_way_off_where_only_another_value_can_be():
    assert [way_off(Order, name) for name in ("fruit", "sugar", "names", "where")] == [None] * 4


def test_flags_of_a_part_that_is_off_change_nothing():
    assert parsed("--sugar", "0.25") == Order()


def test_what_is_left_out_has_no_flag_and_keeps_its_default():
    assert parsed("--n", "1", leave_out=("squeeze", "where")) == Order(count=1)
    with pytest.raises(SystemExit):
        parsed("--squeeze", leave_out=("squeeze",))


@pytest.mark.parametrize("flags", [["--fruit", "plum"], ["--number", "many"], ["--length", "1.5"]])
def test_a_value_of_another_type_is_refused(flags, caplog):
    with pytest.raises(SystemExit):
        parsed(*flags)
    assert flags[0] in caplog.text


def test_a_value_that_the_class_refuses_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        parsed("--number", "-1")


def test_the_help_has_a_group_per_title_and_tells_every_flag():
    parser = argparse.ArgumentParser()
    add_flags(parser, Order)
    text = parser.format_help()
    assert {"order:", "juice:"} <= set(text.splitlines())
    assert all(f"--{each.name}" in text and each.field.metadata["help"] in text for each in options(Order))
    assert "--no_straw" in text
    assert "--no_gift" in text
    assert not {"--straw", "--no_squeeze", "--no_with_ice", "--no-gift"} & set(
        text.replace("[", " ").replace("]", " ").split()
    )


def test_a_required_flag_is_required(capsys):
    @dataclass(frozen=True)
    class Needs:
        name: str = option("", "whose", required=True)

    parser = argparse.ArgumentParser()
    add_flags(parser, Needs)
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "--name" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [Order(), FULL], ids=["default", "full"])
def test_json_gives_the_same_settings_back(settings):
    again = from_dict(Order, json.loads(json.dumps(to_dict(settings))))
    assert again == settings
    assert type(again.fruit) is Fruit
    assert isinstance(again.where, Path)


def test_what_was_written_before_a_setting_existed_has_its_default():
    assert from_dict(Order, {"count": 5, "juice": {}}) == Order(count=5, juice=Juice())


@pytest.mark.parametrize("values", [{"colour": "red"}, {"juice": {"pulp": True}}])
def test_a_name_that_is_no_setting_is_refused(values):
    with pytest.raises(ValueError, match="is no setting"):
        from_dict(Order, values)


@pytest.mark.parametrize("values", [{"fruit": "plum"}, {"count": "many"}, {"count": -1}])
def test_a_value_that_cannot_be_is_refused(values):
    with pytest.raises(ValueError, match=r"plum|many|negative"):
        from_dict(Order, values)


def test_flat_settings_go_by_their_flags_and_leave_out_what_is_off():
    assert flat(FULL) == {
        "fruit": "pear",
        "number": None,
        "names": ["Ann", "Bob"],
        "where": "there",
        "gift": False,
        "squeeze": True,
        "sugar": 0.25,
        "with_ice": True,
        "straw": False,
    }
    assert set(flat(Order())) == {"fruit", "number", "names", "where", "gift", "squeeze", "straw", "length"}


@pytest.mark.parametrize("settings", [FULL, Order(), Order(straw=Straw(9))], ids=["full", "default", "straw"])
def test_flat_settings_give_the_same_settings_back(settings):
    assert from_flat(Order, flat(settings)) == settings


def test_what_flat_values_do_not_name_has_its_default_and_what_is_off_is_left_out():
    assert from_flat(Order, {"fruit": "pear", "sugar": 0.25}) == Order(Fruit.PEAR)
    assert from_flat(Order, {"sugar": 0.25, "squeeze": True}) == Order(juice=Juice(0.25))


@pytest.mark.parametrize("values", [{"colour": "red"}, {"fruit": "plum"}, {"number": -1}, {"count": 3}], ids=str)
def test_flat_values_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError, match=r"is no setting of Order|plum|negative"):
        from_flat(Order, values)


def test_flat_settings_can_be_those_that_change_at_least_so_much():
    assert set(flat(Order(), Changes.FIGURES)) == set(flat(Order())) - {"where"}
    assert set(flat(Order(), Changes.LAYERS)) == {"fruit", "number", "names", "squeeze"}


def test_defaults_know_parts_that_are_off():
    assert defaults(Order)["sugar"] == 0.5
    assert (defaults(Order)["squeeze"], defaults(Order)["straw"]) == (False, True)


@every_option
def test_another_value_is_another_identity_and_another_folder_where_it_says_so(each):
    before = switched_on(Order, each)
    after = with_another(before, each)
    assert identity(after) != identity(before)
    for least in Changes:
        assert (identity(after, least) != identity(before, least)) == (each.changes >= least)
    assert (folder_name("run", after) != folder_name("run", before)) == (each.changes > Changes.NOTHING)


@pytest.mark.parametrize(("name", "value"), [("juice", Juice()), ("straw", None)])
def test_a_switch_is_another_identity_and_another_folder(name, value):
    after = replace(Order(), **{name: value})
    assert identity(after) != identity(Order())
    assert folder_name("run", after) != folder_name("run", Order())


def test_what_is_switched_off_is_in_no_identity():
    assert identity(replace(FULL, juice=None)) == identity(
        Order(Fruit.PEAR, None, ("Ann", "Bob"), Path("there"), False, straw=None)
    )


def test_identities_do_not_depend_on_the_order_or_on_where_they_are_computed():
    assert identity(Order()) == identity(from_dict(Order, dict(reversed(to_dict(Order()).items()))))
    assert len(identity(Order())) == 64


def test_a_folder_tells_what_differs_from_the_defaults():
    assert folder_name("run", Order()) == "run"
    assert (
        folder_name("run", Order(Fruit.PEAR, 4, gift=False, juice=Juice(0.25)))
        == "run_pear_x4_no_gift_squeezed_sugar0.25"
    )
    assert folder_name("run", Order(count=None)) == "run_xauto"
    assert folder_name("run_pear", Order(Fruit.PEAR), told=["fruit"]) == "run_pear"


def test_what_has_no_tag_is_told_by_a_digest():
    names = [folder_name("run", Order(names=(name,))) for name in ("Ann", "Bob")]
    assert names[0] != names[1]
    assert all(name.startswith("run_") and len(name) == len("run_") + 6 for name in names)
    assert folder_name("run", Order(names=("Ann",), where=Path("there"))) == names[0]


def test_numbers_that_differ_in_a_late_digit_have_different_folders():
    names = {folder_name("run", Order(juice=Juice(sugar))) for sugar in (0.9, 0.9000001, 0.90000001)}
    assert len(names) == 3
    assert "run_squeezed_sugar0.9" in names
