"""Gemma 2 and the text models of Gemma 3.

Norms multiply by 1 + weight. Attention and MLP have a norm before and one behind; the latter's input is the output of
o_proj or down_proj, so it takes no part in smoothing. Soft-capping, local attention, the norms on q and k (Gemma 3)
and the embedding's factor are the model's own code, which the method calls and does not copy.
"""

from transformers import PretrainedConfig

from models.dense import dense_spec
from quantize.spec import DecoderSpec, Norm


def gemma_spec(config: PretrainedConfig) -> DecoderSpec:
    """(1 + w) norms before attention and before a gated MLP, whose names are not those of Llama."""
    return dense_spec(config, Norm("input_layernorm", offset=1.0), Norm("pre_feedforward_layernorm", offset=1.0))
