"""A quantized model as a folder that loads again: ordinary Hugging Face files, and the transforms beside them.

The weights are stored as they are used, rotated and rounded, so that loading gives the same model bit for bit. They
mean nothing without the transforms: config.json declares a quantization method that transformers warns it does not
know.
"""

from pathlib import Path

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from quantize.attention import AttentionQuantizer, install
from quantize.config import BitConfig, ClipConfig, QuantConfig, SmoothConfig, Transform
from quantize.experts import fuse_experts
from quantize.layer import attach_attention_quantizer_, replace_linear_
from quantize.linear import QuantLinear
from quantize.spec import DecoderSpec
from quantize.transform import DualTransform
from utils.errors import InputError
from utils.io import read_tensors, system_errors, write_tensors

METHOD = "duquant"
TRANSFORMS_FILE = "duquant_transforms.safetensors"
OWN_MODULES = (DualTransform, AttentionQuantizer)


def save_model(
    folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, spec: DecoderSpec, config: QuantConfig
) -> None:
    """Write the quantized `model` to `folder`.

    Raises InputError if that is not empty or cannot be written, or if nothing in the model is quantized.
    """
    require_empty(folder)
    transforms = dict(_transform_tensors(model, spec))
    ours = _own_buffers(model)
    ordinary = {name: tensor for name, tensor in model.state_dict().items() if name not in ours}
    ordinary = fuse_experts(model, ordinary)
    model.config.quantization_config = {"quant_method": METHOD, **_settings(config)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with system_errors(folder):
            model.save_pretrained(folder, state_dict=ordinary)
        tokenizer.save_pretrained(folder)
        write_tensors(folder / TRANSFORMS_FILE, transforms, {"format": "pt"})
    except OSError as error:
        raise InputError(f"--save_model {folder}: cannot be written ({error})") from None
    finally:
        del model.config.quantization_config


def require_empty(folder: Path) -> None:
    """Raise InputError if `folder` is something that a saved model would overwrite."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--save_model {folder}: is there already and not empty; choose another folder")


def saved_config(config: PretrainedConfig) -> QuantConfig | None:
    """The settings of a model that `save_model` wrote, from its config; None for any other model.

    Raises InputError if they are damaged.
    """
    saved = getattr(config, "quantization_config", None)
    if not isinstance(saved, dict) or saved.get("quant_method") != METHOD:
        return None
    try:
        bits = BitConfig(saved["wbits"], saved["abits"], saved["group_size"], saved["symmetric"])
        smooth = None if saved["alpha"] is None else SmoothConfig(saved["alpha"])
        return QuantConfig(bits, ClipConfig(saved["lac"]), smooth, Transform(saved["transform"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"--model: quantization_config in its config.json is damaged ({error})") from None


def attach_transforms_(model: nn.Module, folder: Path, spec: DecoderSpec, config: QuantConfig) -> None:
    """Make the freshly loaded weights of a saved model work: put transforms and quantizers in their places."""
    tensors, _ = read_tensors(folder / TRANSFORMS_FILE)
    install(model)
    for index, layer in enumerate(spec.decoder_layers(model)):
        attach_attention_quantizer_(layer.get_submodule(spec.attention), config, next(layer.parameters()).device)
        for group in spec.at(index).groups:
            prefix = spec.linear_key(index, group.name)
            try:
                rotations, permutations = tensors[f"{prefix}.rotations"], tensors[f"{prefix}.permutations"]
            except KeyError as error:
                raise InputError(f"{folder / TRANSFORMS_FILE}: lacks {error}; save the model again") from None
            transform = DualTransform(rotations, permutations.long(), tensors.get(f"{prefix}.scale"))
            for path in group.linears:
                replace_linear_(layer, path, transform, config, baked=True)


def _settings(config: QuantConfig) -> dict[str, object]:
    """What the activations' side needs to know, and what tables say; the weights' side is in the weights."""
    bits = config.bits
    return {
        "wbits": bits.weight,
        "abits": bits.activation,
        "group_size": bits.group_size,
        "symmetric": bits.symmetric,
        "lac": config.clip.activation_ratio,
        "alpha": config.smooth.alpha if config.smooth else None,
        "transform": config.transform.value,
    }


def _transform_tensors(model: nn.Module, spec: DecoderSpec):
    for index, layer in enumerate(spec.decoder_layers(model)):
        for group in spec.at(index).groups:
            linear = layer.get_submodule(group.linears[0])
            if not isinstance(linear, QuantLinear):
                raise InputError("--save_model: nothing was quantized, so there is nothing to save; drop the flag")
            prefix = spec.linear_key(index, group.name)
            for name, tensor in linear.transform.named_buffers():
                yield f"{prefix}.{name}", tensor


def _own_buffers(model: nn.Module) -> set[str]:
    """Names in the state dict that an ordinary model lacks: those inside transforms and attention quantizers."""
    owners = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, OWN_MODULES)}
    return {f"{owner}.{name}" for owner in owners for name, _ in model.get_submodule(owner).named_buffers()}
