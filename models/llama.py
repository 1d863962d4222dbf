"""Llama 1, 2 and 3.x, and every model with its decoder layer (Vicuna among them)."""

from transformers import PretrainedConfig

from quantize.spec import DecoderSpec, InputGroup


def llama_spec(config: PretrainedConfig) -> DecoderSpec:
    """RMSNorm before attention and before a gated MLP; o_proj's scale folds into v_proj only without GQA."""
    shared_heads = config.num_key_value_heads != config.num_attention_heads
    return DecoderSpec(
        groups=(
            InputGroup(
                name="qkv",
                linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                representative="self_attn.q_proj",
                absorber="input_layernorm",
            ),
            InputGroup(
                name="o",
                linears=("self_attn.o_proj",),
                representative="self_attn.o_proj",
                absorber=None if shared_heads else "self_attn.v_proj",
            ),
            InputGroup(
                name="gate_up",
                linears=("mlp.gate_proj", "mlp.up_proj"),
                representative="mlp.up_proj",
                absorber="post_attention_layernorm",
            ),
            InputGroup(
                name="down",
                linears=("mlp.down_proj",),
                representative="mlp.down_proj",
                absorber="mlp.up_proj",
            ),
        ),
    )
