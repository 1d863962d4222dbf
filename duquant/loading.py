"""Opening models for the command line: what is wrong with what was given ends in one line."""

import resource
import sys
import textwrap
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from duquant.hub import METHOD
from duquant.linear import linears_of

BASE_LINE = "Base model: "  # what a card's line begins with that names it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAILURES = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError)  # of from_pretrained


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, by default an accelerator if there is one. Raises ValueError if it is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name}: not usable here ({first_line(error)})") from None
    return device


def load_quantized(
    name: str, device: torch.device, dtype: str, runtime: str, expand: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that was quantized and saved, a folder or a hub id, and its tokenizer. Raises ValueError."""
    require_place(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except FAILURES as error:
        raise ValueError(f"{name}: cannot be loaded ({first_line(error)})") from None
    made = getattr(config, "quantization_config", None)
    if not isinstance(made, dict) or made.get("quant_method") != METHOD:
        raise ValueError(f"{name}: is no model that main.py --save_model wrote")
    config.quantization_config = {**made, "runtime": runtime, "expand": expand}
    return load(name, device, dtype, config=config), load_tokenizer(name)


def load(name: str, device: torch.device, dtype: str, **how: object) -> PreTrainedModel:
    """Any causal language model with safetensors weights, in `dtype` (`auto`: its own). Raises ValueError."""
    require_place(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES.get(dtype, dtype), use_safetensors=True, **how)
        return model.to(device).requires_grad_(False)
    except FAILURES as error:
        raise ValueError(f"{name}: cannot be loaded ({first_line(error)})") from None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises ValueError."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except FAILURES as error:
        raise ValueError(f"{name}: its tokenizer cannot be loaded ({first_line(error)})") from None


def base_model(folder: str) -> str | None:
    """The model that a saved one was made from, as the card in its folder names it, if it is at hand: never fetched."""
    card = Path(folder) / "README.md"
    for line in card.read_text(encoding="utf-8").splitlines() if card.is_file() else ():
        if line.startswith(BASE_LINE):
            name = line.removeprefix(BASE_LINE).strip().strip("`")
            return name if is_at_hand(name) else None
    return None


def is_at_hand(name: str) -> bool:
    """Whether a model is a folder here, or was fetched before."""
    try:
        return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no name of a model on the hub
        return False


def require_model(name: str) -> None:
    """Raise ValueError if there is no model of that name with a config, before anything large is loaded."""
    require_place(name)
    try:
        AutoConfig.from_pretrained(name)
    except FAILURES as error:
        raise ValueError(f"{name}: cannot be loaded ({first_line(error)})") from None


def require_place(name: str) -> None:
    """Raise ValueError if `name` is a folder that is not there: no hub is asked for it then."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).is_dir():
        raise ValueError(f"{name}: no such folder")


def first_line(error: Exception) -> str:
    """The error as part of one line."""
    return textwrap.shorten(str(error), 300, placeholder=" …").rstrip(".:") or type(error).__name__


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers of a model, and of what its quantized linears keep beside them."""
    kept = sum(linear.kept_bytes for linear in linears_of(model))
    return kept + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def peak_bytes(device: torch.device) -> int:
    """The most memory there was in use: on the accelerator, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def quieten() -> None:
    """Let transformers say nothing but errors, and draw no bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
