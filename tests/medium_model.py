"""A model that is wide enough for estimates: what they leave out does not show."""

import torch
from conftest import tiny_config
from transformers import LlamaForCausalLM

MEDIUM = {  # what is not counted: masks, positions, figures
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "num_hidden_layers": 3,
}


def medium_model(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**MEDIUM, **changes)).eval().requires_grad_(False)
