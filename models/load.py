"""Models and tokenizers from a local folder or the hub, with errors a user can act on."""

import hashlib
import json
import logging
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from duquant.attention import soft_capping
from duquant.experts import unfuse_experts_
from models import COMPOSITES, decoder_spec, require_supported
from utils.errors import InputError, Missing
from utils.log import shows_bars
from utils.memory import all_finite

SAMPLED_BYTES = 1 << 20  # of each weights file that enter a fingerprint
DEFAULT_SEQLEN = 2048
# a text model's names where it was saved as a part of a larger one; names of its own are left as they are
TEXT_PART = {r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a local folder or a hub id, and whether code that comes with it may run."""

    name: str
    trust_remote_code: bool = False


def load_config(source: ModelSource) -> PretrainedConfig:
    """The model's config; of a model of text and images, that of its text part.

    Raises InputError if there is no such model or its family is not supported.
    """
    _quieten()
    if Path(source.name).is_dir() and not (Path(source.name) / "config.json").is_file():
        raise InputError(f"--model {source.name}: the folder has no config.json, so it is not a Hugging Face model")
    looks_local = source.name.startswith((".", "/", "~")) or source.name.count("/") > 1
    if looks_local and not Path(source.name).is_dir():
        raise InputError(f"--model {source.name}: no such folder")
    try:
        described, _ = PretrainedConfig.get_config_dict(source.name)
        require_supported(described.get("model_type"))
        config = AutoConfig.from_pretrained(source.name, trust_remote_code=source.trust_remote_code)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise InputError(_explain(source, error)) from None
    return text_config(config) if config.model_type in COMPOSITES else config


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text part, with what its model inherits from the whole."""
    text = config.text_config
    logger.info("%s: its text part, %s, alone is loaded", config.model_type, text.model_type)
    text.dtype = text.dtype or config.dtype
    for name in ("_commit_hash", "quantization_config"):
        if getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    return text


def load_skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> nn.Module:
    """The model without weights (on the meta device): shapes to check settings against before anything is loaded."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    spec = decoder_spec(config)
    unfuse_experts_(spec.decoder_layers(skeleton), spec.experts)
    return skeleton


def has_weights(source: ModelSource) -> bool:
    """Whether there is a local folder with safetensors weights; nothing is read or fetched."""
    return any(Path(source.name).glob("*.safetensors"))


def check_weights(source: ModelSource) -> None:
    """Raise InputError if there is a local folder without safetensors weights."""
    if Path(source.name).is_dir() and not has_weights(source):
        raise Missing(_explain(source, FileNotFoundError()))


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(source.name, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        raise Missing(f"--model {source.name}: its tokenizer cannot be loaded ({_first_line(error)})") from None


def load_model(source: ModelSource, config: PretrainedConfig, dtype: torch.dtype, attention: str) -> nn.Module:
    """The model on the host, in `dtype`, ready for inference; safetensors weights only, every one of them finite.

    The experts of a mixture are linears of their own (see `duquant.experts`).

    Raises InputError if there are no safetensors weights, if tensors are missing, or if one has NaN or inf.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.name,
            config=config,
            dtype=dtype,
            attn_implementation=pick_attention(attention, config),
            use_safetensors=True,
            output_loading_info=True,
            key_mapping=TEXT_PART if config.model_type in COMPOSITES.values() else None,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise InputError(_explain(source, error)) from None
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise InputError(
            f"--model {source.name}: a tensor of its weights has not the shape config.json asks for"
        ) from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"--model {source.name}: its checkpoint lacks {missing[0]} (and {len(missing) - 1} more)")
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise InputError(f"--model {source.name}: {name} contains NaN or inf; the checkpoint is damaged")
    spec = decoder_spec(config)
    unfuse_experts_(spec.decoder_layers(model), spec.experts)
    return model.eval().requires_grad_(False)


def pick_attention(name: str, config: PretrainedConfig) -> str:
    """The attention implementation for `--attn_implementation name`: one that can do what this model does."""
    capable = soft_capping(name, config)
    if capable != name:
        logger.info("attention: %s instead of %s, which cannot soft-cap as this model does", capable, name)
    return capable


def pick_dtype(name: str, config: PretrainedConfig, device: torch.device, named: dict[str, torch.dtype]) -> torch.dtype:
    """The dtype of the model's weights and activations for `--dtype name`.

    `auto` is float32 on the CPU, and elsewhere the checkpoint's own dtype (float16 if it is float32).
    """
    if name != "auto":
        return named[name]
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if own is torch.float32 else own


def context_length(config: PretrainedConfig) -> int:
    """The default of `--seqlen`: 2048, or the model's maximum where that is less."""
    return min(DEFAULT_SEQLEN, longest_context(config))


def longest_context(config: PretrainedConfig) -> int:
    """The most tokens the model can read: what its config says, else 2048."""
    return getattr(config, "max_position_embeddings", None) or DEFAULT_SEQLEN


def config_digest(config: PretrainedConfig) -> str:
    """Hex digest of a config, without what does not describe the model (its path, the library's version)."""
    described = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    described.pop("transformers_version", None)
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(source: ModelSource, config: PretrainedConfig) -> str:
    """Hex digest of a model's weights: of the first and last MiB of each safetensors file, header included.

    Fine-tunes of one architecture differ there. For a hub id it is that of the id and the commit.
    """
    digest = hashlib.sha256()
    folder = Path(source.name)
    if not folder.is_dir():
        digest.update(f"{source.name}@{getattr(config, '_commit_hash', None)}".encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def model_fingerprint(source: ModelSource, config: PretrainedConfig) -> str:
    """Hex digest that tells this model from another, from its config and its weights."""
    return hashlib.sha256((config_digest(config) + weights_digest(source, config)).encode()).hexdigest()


def _explain(source: ModelSource, error: Exception) -> str:
    folder = Path(source.name)
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            return (
                f"--model {source.name}: the folder has no safetensors weights; convert it first with "
                "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)` (pickled weights are never loaded)"
            )
    elif "safetensors" in str(error):
        return f"--model {source.name}: the repository has no safetensors weights (pickled weights are never loaded)"
    return f"--model {source.name}: cannot be loaded ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    """The error as part of one line."""
    return textwrap.shorten(str(error), 200, placeholder=" …").rstrip(".:") or type(error).__name__


def _quieten() -> None:
    """Let transformers report errors, and draw bars where ours are drawn; they vanish as ours do."""
    transformers.logging.set_verbosity_error()
    if shows_bars():
        transformers.logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **{**kwargs, "leave": False}))
    else:
        transformers.logging.disable_progress_bar()
