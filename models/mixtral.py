"""Mixtral: Mistral's attention, and a mixture of experts in every layer."""

from transformers import PretrainedConfig

from models.dense import attention_groups
from models.moe import EXPERTS, expert_groups
from quantize.spec import DecoderSpec, Norm


def mixtral_spec(config: PretrainedConfig) -> DecoderSpec:
    """RMSNorm before attention and before the experts."""
    attention = attention_groups(config, Norm("input_layernorm"))
    mixture = expert_groups(config.num_local_experts, config.intermediate_size)
    return DecoderSpec((*attention, *mixture), experts=EXPERTS)
