"""Gemma 2 and the text models of Gemma 3.

Norms multiply by 1 + weight. Attention and MLP have a norm before and one behind; the latter's input is the output of
o_proj or down_proj, so it takes no part in smoothing. Soft-capping, local attention, the norms on q and k (Gemma 3)
and the embedding's factor are the model's own code, which the method calls and does not copy.

Without BOS at the start of a window the models are lost: on the same text the perplexity of a Gemma 3 in full precision
is 79 without it and 28.6 with it.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from models.dense import dense_spec
from quantize.spec import DecoderSpec, Norm


def gemma_spec(config: PretrainedConfig) -> DecoderSpec:
    """(1 + w) norms before attention and before a gated MLP, whose names are not those of Llama."""
    norms = Norm("input_layernorm", offset=1.0), Norm("pre_feedforward_layernorm", offset=1.0)
    return replace(dense_spec(config, *norms), needs_bos=True)
