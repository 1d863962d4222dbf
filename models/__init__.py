"""Model families: `model_type` of a Hugging Face config → `DecoderSpec`. A new family is one file and one line here.

Adding a model family
---------------------

1. Open the family's `modeling_<name>.py` in transformers and find its decoder layer, attention and MLP. Everything
   they compute is called, never copied; the method only has to know which linears read the same activation, and what
   is upstream of it.
2. Write `models/<name>.py`: a function from the config to a `DecoderSpec`. If only things differ that the method does
   not touch (masks, RoPE, norms on q and k, biases, multipliers, soft-capping), the spec is Llama's: one line, see
   `qwen2.py`. If the norms are elsewhere or of another kind, say which to `dense_spec`, see `gemma.py` and
   `olmo2.py`. If linears are fused, write the groups, see `phi3.py`. For a mixture of experts see `moe.py`. A family
   that is lost on text without BOS (a run on its full precision warns of it) says `needs_bos`, see `gemma.py`.
3. For every group answer: can 1/s go upstream exactly? Into a norm that nobody else reads (`Norm`, with `offset=1.0`
   if its gain is 1 + weight); into rows of a linear that the activation is linear in (`Rows`: v for o_proj, up for
   down_proj; not through a norm, an activation function or a residual sum); into rows of v that query heads share
   (`SharedRows`). If somebody else reads the norm, name it in `readers`. If not: no absorber, and the scale stays
   online. The log says for every group where its scale went. And which rows upstream make its channels, all of them
   (`ordered`), so that they can be put into another order: gate and up for down_proj, v inside heads for o_proj.
4. Add the line to `FAMILIES`, and a tiny config to `CASES` in `tests/families.py`: two layers, grouped-query
   attention, head_dim ≠ hidden size / heads, odd widths, whatever is particular to the family switched on. Run
   `python -m pytest tests/models/test_families.py -k <name>`. The first test, logits unchanged in float64 without
   rounding, finds nearly every mistake: a wrong absorber, a forgotten reader, rows that begin elsewhere.
5. Quantize a real checkpoint with `--wbits 8 --abits 8 --smooth`: perplexity must stay within a percent of full
   precision.
"""

from collections.abc import Callable

from transformers import PretrainedConfig

from models.gemma import gemma_spec
from models.granite import granite_spec
from models.llama import llama_spec
from models.mistral import mistral_spec
from models.mixtral import mixtral_spec
from models.olmo2 import olmo2_spec
from models.phi3 import phi3_spec
from models.qwen2 import qwen2_spec
from models.qwen3 import qwen3_spec
from models.qwen3_moe import qwen3_moe_spec
from quantize.spec import DecoderSpec
from utils.errors import InputError

FAMILIES: dict[str, Callable[[PretrainedConfig], DecoderSpec]] = {
    "gemma2": gemma_spec,
    "gemma3_text": gemma_spec,
    "granite": granite_spec,
    "llama": llama_spec,
    "mistral": mistral_spec,
    "mixtral": mixtral_spec,
    "olmo2": olmo2_spec,
    "phi3": phi3_spec,
    "qwen2": qwen2_spec,
    "qwen3": qwen3_spec,
    "qwen3_moe": qwen3_moe_spec,
}

# models of text and more: the family of their text part, which is loaded alone
COMPOSITES = {"gemma3": "gemma3_text"}


def require_supported(model_type: str | None) -> None:
    """Raise InputError, listing what is supported, if there is no spec for this `model_type`."""
    if model_type not in {**FAMILIES, **COMPOSITES}:
        supported = ", ".join(sorted({**FAMILIES, **COMPOSITES}))
        raise InputError(f"--model: model type '{model_type}' is not supported; supported are {supported}")


def decoder_spec(config: PretrainedConfig) -> DecoderSpec:
    """The spec of a model's family. Raises InputError as `require_supported`."""
    require_supported(config.model_type)
    return FAMILIES[config.model_type](config)
