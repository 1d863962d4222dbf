"""A GGUF file of a tiny Llama with a byte-level tokenizer."""

from pathlib import Path

import torch
from conftest import tiny_model
from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGED = ["ĠĠ", "th", "the"]
CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
VOCABULARY = [*SPECIAL, *sorted(ByteLevel.alphabet()), *MERGED]


def tied_llama() -> LlamaForCausalLM:
    """A tiny model whose weights are numbers of float16, but calculated with in float32."""
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = tiny_model(
        vocab_size=len(VOCABULARY), tie_word_embeddings=True, head_dim=8, rms_norm_eps=1e-5, **special,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():  # and no buffer: the rotary embedding's stay as they are
            parameter.copy_(parameter.half())
    return model


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The model's weights under GGUF's names; rows of q and k as its rotary embedding wants them, in pairs."""
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tensors = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                weight = weight.unflatten(0, (-1, 2, model.config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            tensors[f"blk.{index}.{theirs}.weight"] = weight
    return tensors


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """Write `model` and a byte-level tokenizer as a GGUF file."""
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    control, normal = TokenType.CONTROL, TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL else normal for token in VOCABULARY])
    writer.add_token_merges(["Ġ Ġ", "t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
