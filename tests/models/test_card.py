"""The model card that --save_model writes."""

import pytest

from duquant.loading import base_model
from duquant.scheme import Scheme, TensorScheme
from models.card import CARD, model_card, write_card
from utils.errors import InputError

SCHEME = Scheme(weight=TensorScheme(bits=3, symmetric=True, group_size=64), value=TensorScheme(bits=16))


def card(base: str = "org/name", perplexities: dict | None = None) -> str:
    return model_card(base, "DuQuant W3A4", "w3a4", SCHEME, "python main.py --model org/name", perplexities or {})


def front_matter(text: str) -> list[str]:
    lines = text.splitlines()
    assert lines[0] == "---"
    return lines[1 : lines.index("---", 1)]


def test_its_front_matter_says_what_the_hub_reads():
    lines = front_matter(card())
    assert {'base_model: "org/name"', "library_name: transformers", "- duquant", "- w3a4"} <= set(lines)
    assert not any(line.startswith("license") for line in lines)


def test_a_folder_is_no_base_model_on_the_hub(tmp_path):
    for base in (str(tmp_path), "./model", "/nowhere/else/model"):
        text = card(base)
        assert not any(line.startswith("base_model") for line in front_matter(text))
        assert f"Base model: `{base}`" in text


def test_it_says_what_is_rounded_to_what_and_how_it_was_made_and_how_it_is_loaded():
    text = card()
    assert "| weight | 3 | symmetric | 64 channels of an output channel |" in text
    assert "| input | 4 | asymmetric | a token |" in text
    assert "| value | 16 | – | – |" in text
    assert "python main.py --model org/name\n" in text
    assert "import duquant" in text


def test_perplexities_are_there_once_they_are_measured():
    assert "--eval_ppl" in card()
    text = card(perplexities={"wikitext2": (5.4721, 6.28), "c4": (None, 8.0)})
    assert "--eval_ppl" not in text
    assert "| wikitext2 | 5.4721 | 6.2800 |" in text
    assert "| c4 | – | 8.0000 |" in text


def test_the_runtime_finds_the_base_model_in_it_only_where_that_is_at_hand(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name, found in ((str(base), str(base)), ("org/never-fetched", None), ("no: name", None)):
        write_card(tmp_path, card(name))
        assert base_model(str(tmp_path)) == found
    (tmp_path / CARD).write_text("another card\n")
    assert base_model(str(tmp_path)) is None
    assert base_model(str(base)) is None


def test_a_card_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="its card cannot be written"):
        write_card(tmp_path / "file", card())
