"""Conversation formats: their exact text, which one a model gets, and the special tokens around them."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from evaluation.generation import cut_at_stops
from evaluation.mtbench.conversation import FORMATS, pick_format, prompt_tokens
from evaluation.mtbench.settings import CHAT_FORMATS, TEMPLATE
from utils.errors import InputError

TURNS = [("Name a river.", "The Nile."), ("Another?", None)]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORDS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "Name", "a", "river", "The", "Nile", ".", "?")


def make_tokenizer(chat_template: str | None = None, template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Words as tokens; `template` is what the tokenizer puts around a text."""
    words = {word: index for index, word in enumerate(WORDS)}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


EXACT = {
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Name a river. ASSISTANT: The Nile.</s>"
        "USER: Another? ASSISTANT:"
    ),
    "llama-2": "[INST] Name a river. [/INST] The Nile. </s><s>[INST] Another? [/INST]",
    "mistral": "[INST] Name a river. [/INST] The Nile.</s>[INST] Another? [/INST]",
    "plain": "Question: Name a river.\nAnswer: The Nile.\n\nQuestion: Another?\nAnswer:",
}


@pytest.mark.parametrize("name", FORMATS)
def test_two_turns_are_written_exactly_so(name):
    assert FORMATS[name].render(TURNS) == EXACT[name]


@pytest.mark.parametrize("name", FORMATS)
def test_the_first_turn_is_how_the_second_prompt_begins(name):
    first = FORMATS[name].render([(TURNS[0][0], None)])
    assert EXACT[name].startswith(first + " The Nile.")


def test_chat_template_is_what_the_tokenizer_itself_applies():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    form = pick_format(tokenizer, "some-chat-model")
    messages = [
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Nile."},
        {"role": "user", "content": "Another?"},
    ]
    own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    own_tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert (form.name, form.render(TURNS)) == (TEMPLATE, own)
    assert prompt_tokens(form, tokenizer, TURNS) == own_tokens
    assert own_tokens.count(tokenizer.bos_token_id) == 1


def test_answers_stop_at_the_token_that_the_template_ends_them_with():
    assert pick_format(make_tokenizer(CHAT_TEMPLATE), "m").stops == ("<|end|>",)


def test_template_that_writes_nothing_behind_answers_has_no_stop():
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    assert pick_format(make_tokenizer(template), "m").stops == ()


@pytest.mark.parametrize("name", FORMATS)
def test_bos_is_there_once_and_no_eos_at_the_end(name):
    for template in ("<s> $A", "<s> $A </s>"):
        tokenizer = make_tokenizer(template=template)
        tokens = prompt_tokens(FORMATS[name], tokenizer, TURNS[-1:])
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens.count(tokenizer.bos_token_id) == 1
        assert tokens[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("model_name", "expected"),
    [
        ("lmsys/vicuna-7b-v1.5", "vicuna"),
        ("/models/Vicuna-13B-v1.3", "vicuna"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2"),
        ("llama2-70b-chat", "llama-2"),
        ("meta-llama/Llama-2-7b-hf", "plain"),
        ("meta-llama/Llama-3.2-1B", "plain"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "mistral"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistral"),
        ("mistralai/Mistral-7B-v0.1", "plain"),
    ],
)
def test_without_a_template_the_name_decides(model_name, expected):
    assert pick_format(make_tokenizer(), model_name).name == expected


def test_the_template_comes_before_the_name_and_the_flag_before_both():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    assert pick_format(tokenizer, "vicuna").name == TEMPLATE
    assert pick_format(tokenizer, "vicuna", "mistral").name == "mistral"
    assert pick_format(tokenizer, "vicuna", TEMPLATE).name == TEMPLATE


def test_a_model_that_is_no_chat_model_is_warned_about(caplog):
    pick_format(make_tokenizer(), "base-model")
    assert "base-model" in caplog.text
    assert "--chat_format" in caplog.text
    caplog.clear()
    pick_format(make_tokenizer(), "base-model", "plain")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("chat_template", "wanted", "words"),
    [
        (None, "alpaca", "--chat_format alpaca"),
        (None, TEMPLATE, "the tokenizer has none"),
        ("{{ raise_exception('roles must alternate') }}", None, "roles must alternate"),
        ("{% for %}", None, "fails"),
        ("{{ messages[0].content.missing.deeper }}", TEMPLATE, "fails"),
    ],
)
def test_formats_that_cannot_be_used_are_refused_in_one_line(chat_template, wanted, words):
    with pytest.raises(InputError, match=words) as raised:
        pick_format(make_tokenizer(chat_template), "m", wanted)
    assert "--chat_format" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_choices_are_all_formats():
    assert set(CHAT_FORMATS) == {TEMPLATE, *FORMATS}


def test_text_is_cut_at_the_first_stop_that_occurs():
    assert cut_at_stops(" one </s> two\nQuestion: three", ("\nQuestion:", "</s>")) == "one"
    assert cut_at_stops(" one ", ()) == "one"


@pytest.mark.parametrize("name", FORMATS)
def test_real_questions_and_braces_are_taken_as_they_are(name):
    text = json.dumps({"a": ["{0}", "%s", "{name}"]})
    assert text in FORMATS[name].render([(text, None)])
