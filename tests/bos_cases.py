"""Tokenizers that put BOS before a text or do not, and a model that is lost on windows without it."""

from pathlib import Path

import torch
from conftest import VOCABULARY, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BOS = 1
WORDS = VOCABULARY - 3  # w0 … with ids from 3 on, that follow the numbers


def bos_tokenizer(adds: bool, **options: str) -> PreTrainedTokenizerFast:
    """The word w<n> has the id n + 3; if it `adds` BOS, that stands before every text."""
    special = {"<pad>": 0, "<s>": BOS, "</s>": 2}
    backend = Tokenizer(models.WordLevel({**special, **{f"w{n}": n + 3 for n in range(WORDS)}}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **options)


def words(count: int, step: int = 1) -> str:
    """A text of so many words."""
    return " ".join(f"w{n * step % WORDS}" for n in range(count))


def save_with_bos(model: nn.Module, folder: Path, adds: bool = True) -> Path:
    """Save `model` with such a tokenizer; return `folder`."""
    model.save_pretrained(folder)
    bos_tokenizer(adds).save_pretrained(folder)
    return folder


def lost_model() -> LlamaForCausalLM:
    """Every word is equally probable where BOS is in sight, and none is where it is not.

    Channel 0 of an embedding says BOS, channel 1 a word. Attention looks everywhere alike and writes what it saw of
    channel 0, much amplified, into channel 2, which the head reads as words; it reads channel 1 as BOS.
    """
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    model = LlamaForCausalLM(tiny_config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, **heads))
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    attention = model.model.layers[0].self_attn
    model.model.embed_tokens.weight[BOS, 0] = 1
    model.model.embed_tokens.weight[3:, 1] = 1
    attention.v_proj.weight[2, 0] = 1
    attention.o_proj.weight[2, 2] = 100
    model.lm_head.weight[3:, 2] = 8
    model.lm_head.weight[BOS, 1] = 8
    return model


def windows_of(count: int, seqlen: int, begins: bool) -> torch.Tensor:
    """The test windows of `words(count)` by hand, from a tokenizer that adds BOS."""
    text = torch.arange(count) % WORDS + 3
    if not begins:
        stream = torch.cat([torch.tensor([BOS]), text])
        return stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)
    rows = text[: count // (seqlen - 1) * (seqlen - 1)].view(-1, seqlen - 1)
    return torch.cat([torch.full((len(rows), 1), BOS), rows], dim=1)
