"""OLMo-2: norms only behind attention and MLP, so their inputs are the residual stream itself.

Nothing upstream can take the scales of {q, k, v} and {gate, up}: they stay online. The norms on q and k span all heads
and are behind their linears; v has none, so o_proj's scale folds as usual.
"""

from transformers import PretrainedConfig

from models.dense import dense_spec
from quantize.spec import DecoderSpec


def olmo2_spec(config: PretrainedConfig) -> DecoderSpec:
    """No norm before attention, none before the gated MLP."""
    return dense_spec(config, None, None)
