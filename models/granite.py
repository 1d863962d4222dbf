"""Granite: Llama's decoder layer, whose branches are multiplied by a constant before they join the residual.

The other constants are outside of the layers (embedding, logits) or inside attention (its scaling).
"""

from models.llama import llama_spec

granite_spec = llama_spec
