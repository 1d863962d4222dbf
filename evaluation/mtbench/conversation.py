"""How a conversation is written down for a model: its tokenizer's chat template, or a format known by name."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from evaluation.mtbench.settings import CHAT_FORMATS, TEMPLATE
from utils.errors import InputError

Turn = tuple[str, str | None]  # what the user said, and the answer; None: the one that is wanted now
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """One way to write a conversation.

    `render` writes the turns, up to where the assistant's next words belong. `stops` are texts at which an answer ends,
    besides the model's own end tokens. `adds_bos`: `render` writes the special tokens at the start itself.
    """

    name: str
    render: Callable[[Sequence[Turn]], str]
    stops: tuple[str, ...] = ()
    adds_bos: bool = False


def render_vicuna(turns: Sequence[Turn]) -> str:
    """Vicuna v1.1: the system sentence, then `USER: … ASSISTANT: …</s>`."""
    written = (f"USER: {user} ASSISTANT:{'' if answer is None else f' {answer}</s>'}" for user, answer in turns)
    return f"{VICUNA_SYSTEM} {''.join(written)}"


def render_llama_2(turns: Sequence[Turn]) -> str:
    """Llama-2-chat without a system message (none is the benchmark's default): `[INST] … [/INST] … </s><s>[INST] …`.

    The first `<s>` is the tokenizer's.
    """
    return "".join(f"[INST] {user} [/INST]{'' if answer is None else f' {answer} </s><s>'}" for user, answer in turns)


def render_mistral(turns: Sequence[Turn]) -> str:
    """Mistral-Instruct and Mixtral-Instruct: `[INST] … [/INST] …</s>[INST] …`; the first `<s>` is the tokenizer's."""
    return "".join(f"[INST] {user} [/INST]{'' if answer is None else f' {answer}</s>'}" for user, answer in turns)


def render_plain(turns: Sequence[Turn]) -> str:
    """For models that were never taught to converse: `Question: …`, `Answer: …`, a blank line between turns."""
    written = (f"Question: {user}\nAnswer:{'' if answer is None else f' {answer}'}" for user, answer in turns)
    return "\n\n".join(written)


FORMATS = {
    "vicuna": Format("vicuna", render_vicuna, ("</s>",)),
    "llama-2": Format("llama-2", render_llama_2, ("</s>",)),
    "mistral": Format("mistral", render_mistral, ("</s>",)),
    "plain": Format("plain", render_plain, ("\nQuestion:",)),
}
_NAMES = {r"vicuna": "vicuna", r"llama[-_]?2.*chat": "llama-2", r"mi[sx]tral.*instruct": "mistral"}


def pick_format(tokenizer: PreTrainedTokenizerBase, model_name: str, wanted: str | None = None) -> Format:
    """The format for a model: `wanted`, else its tokenizer's chat template, else by its name, else `plain`.

    Raises InputError if there is no such format, or if the chat template is wanted and there is none, or it fails.
    """
    if wanted is not None and wanted not in CHAT_FORMATS:
        raise InputError(f"--chat_format {wanted}: unknown; choose one of {', '.join(CHAT_FORMATS)}")
    if wanted == TEMPLATE and not tokenizer.chat_template:
        raise InputError(f"--chat_format {TEMPLATE}: the tokenizer has none; choose one of {', '.join(FORMATS)}")
    if wanted in FORMATS:
        return FORMATS[wanted]
    if tokenizer.chat_template:
        return template_format(tokenizer)
    for pattern, name in _NAMES.items():
        if re.search(pattern, model_name.lower()):
            return FORMATS[name]
    logger.warning(
        "%s: no chat template and no known conversation format by its name, so questions are put plainly; a model that "
        "was not trained to converse answers at random, and --chat_format names the format of one that was",
        model_name,
    )
    return FORMATS["plain"]


def template_format(tokenizer: PreTrainedTokenizerBase) -> Format:
    """The tokenizer's own chat template; an answer also stops at whatever the template writes behind answers.

    Raises InputError if the template cannot write two turns.
    """
    from jinja2 import TemplateError

    def render(turns: Sequence[Turn]) -> str:
        return tokenizer.apply_chat_template(_messages(turns), tokenize=False, add_generation_prompt=True)

    try:
        render([("Question", "Answer"), ("Question", None)])
        written = tokenizer.apply_chat_template(_messages([("Question", "Answer")]), tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(
            f"--chat_format: the tokenizer's chat template fails ({reason}); choose one of {', '.join(FORMATS)}"
        ) from None
    return Format(TEMPLATE, render, _end_of_answer(tokenizer, written), adds_bos=True)


def prompt_tokens(form: Format, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[int]:
    """Token ids of a conversation; BOS as often as the tokenizer or the template wants it, and no EOS at the end."""
    ids = list(tokenizer(form.render(turns), add_special_tokens=not form.adds_bos)["input_ids"])
    while not form.adds_bos and ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers add it, too
        ids.pop()
    return ids


def _end_of_answer(tokenizer: PreTrainedTokenizerBase, written: str) -> tuple[str, ...]:
    """The special token that a template writes behind "Answer"; it need not be the tokenizer's EOS."""
    behind = written.rpartition("Answer")[2].strip() if "Answer" in written else ""
    matches = [token for token in tokenizer.get_added_vocab() if behind.startswith(token)]
    return (max(matches, key=len),) if matches else ()


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    messages = []
    for user, answer in turns:
        messages.append({"role": "user", "content": user})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages
