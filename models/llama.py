"""Llama 1, 2 and 3.x, and every model with its decoder layer.

Vicuna and Mistral are among them, and Qwen2, Qwen3 and Granite differ only in what the method does not touch.
"""

from transformers import PretrainedConfig

from models.dense import dense_spec
from quantize.spec import DecoderSpec, Norm


def llama_spec(config: PretrainedConfig) -> DecoderSpec:
    """RMSNorm before attention and before a gated MLP."""
    return dense_spec(config, Norm("input_layernorm"), Norm("post_attention_layernorm"))
