"""Qwen3-MoE: Qwen3's attention, and a mixture of experts in all layers or some; the others have Qwen3's MLP."""

from transformers import PretrainedConfig

from models.dense import attention_groups
from models.moe import EXPERTS, expert_groups
from models.qwen3 import qwen3_spec
from quantize.spec import DecoderSpec, Norm


def qwen3_moe_spec(config: PretrainedConfig) -> DecoderSpec:
    """RMSNorm before attention and before experts or MLP."""
    attention = attention_groups(config, Norm("input_layernorm"))
    mixture = expert_groups(config.num_experts, config.moe_intermediate_size)
    dense = qwen3_spec(config).groups
    special = {index: dense for index in range(config.num_hidden_layers) if not has_experts(config, index)}
    return DecoderSpec((*attention, *mixture), special=special, experts=EXPERTS)


def has_experts(config: PretrainedConfig, index: int) -> bool:
    """Whether a layer has a mixture: every `decoder_sparse_step`-th does, unless it is named in `mlp_only_layers`."""
    sparse = config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0
    return sparse and index not in (config.mlp_only_layers or [])
