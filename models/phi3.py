"""Phi-3 and Phi-4: Llama's decoder layer with q, k, v in one linear, and gate and up in another.

A fused linear is one linear of its group: ranges are per output channel, so nothing changes for its weight. What is
folded upstream goes into a part of its rows. Its whole weight stands for the group in smoothing, where Llama's rule
would look at q or up alone.
"""

from transformers import PretrainedConfig

from models.dense import head_dim, output_group
from quantize.spec import DecoderSpec, InputGroup, Norm, Rows


def phi3_spec(config: PretrainedConfig) -> DecoderSpec:
    """qkv_proj has the rows of q, then k, then v; gate_up_proj those of gate, then up."""
    qkv, gate_up, down = "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"
    gate, up = Rows(gate_up), Rows(gate_up, config.intermediate_size)
    value_start = (config.num_attention_heads + config.num_key_value_heads) * head_dim(config)
    return DecoderSpec(
        groups=(
            InputGroup("qkv", (qkv,), qkv, (Norm("input_layernorm"),)),
            output_group(config, qkv, value_start),
            InputGroup("gate_up", (gate_up,), gate_up, (Norm("post_attention_layernorm"),)),
            InputGroup("down", (down,), down, (up,), closes="mlp", ordered=(gate, up)),
        ),
    )
