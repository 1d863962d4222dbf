"""Model families: `model_type` of a Hugging Face config → `DecoderSpec`. A new family is one file and one line here."""

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
