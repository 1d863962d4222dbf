"""Text that a model writes: greedy decoding with the KV cache."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def complete(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, device: torch.device, max_new_tokens: int
) -> str:
    """What `model` writes behind `prompt`, the most probable token each time, up to `max_new_tokens` or its end."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
    made = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)
