"""Model families: `model_type` of a Hugging Face config → `DecoderSpec`. A new family is one file and one line here."""

from collections.abc import Callable

from transformers import PretrainedConfig

from models.llama import llama_spec
from models.mistral import mistral_spec
from quantize.spec import DecoderSpec
from utils.errors import InputError

FAMILIES: dict[str, Callable[[PretrainedConfig], DecoderSpec]] = {
    "llama": llama_spec,
    "mistral": mistral_spec,
}


def require_supported(model_type: str | None) -> None:
    """Raise InputError, listing what is supported, if there is no spec for this `model_type`."""
    if model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise InputError(f"--model: model type '{model_type}' is not supported; supported are {supported}")


def decoder_spec(config: PretrainedConfig) -> DecoderSpec:
    """The spec of a model's family. Raises InputError as `require_supported`."""
    require_supported(config.model_type)
    return FAMILIES[config.model_type](config)
