"""Models that were written for other engines, as compressed-tensors describes them: what transformers leaves out.

    model = duquant.exported.load("FOLDER")

transformers reads codes and scales of such a folder and rounds inputs as it says, but knows nothing of its
`transform_config`: without the rotations in front of its linears a model writes nonsense. They are compressed-tensors'
own modules, which it needs (`pip install compressed-tensors`); nothing of this package remains in the model.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn


def load(folder: str | Path, **how: object) -> nn.Module:
    """The causal language model in a folder that `main.py --export` wrote; `how` is for from_pretrained.

    Raises ImportError without compressed-tensors, ValueError for a folder that lacks a rotation.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    apply_transforms_(model, folder)
    decode_(model)
    return model.eval()


def decode_(model: nn.Module) -> None:
    """Decode the weights of `model` now, and not at the first call: 4-bit floats become bfloat16 first."""
    model.hf_quantizer.compressor.decompress_model(model)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.weight.data = module.weight.data.to(model.dtype)


@torch.no_grad()
def apply_transforms_(model: nn.Module, folder: str | Path) -> None:
    """Put the rotations of `folder` in front of the linears of `model`, which from_pretrained made of that folder."""
    from compressed_tensors.transform import TransformConfig, TransformFactory

    made = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    groups = TransformConfig.model_validate(made.get("transform_config") or {"config_groups": {}}).config_groups
    for name, scheme in groups.items():
        TransformFactory.from_scheme(scheme, name=name).apply_to_model(model, use_tqdm=False)
    matrices = {
        f"{path}.{name}_{apply.location}.weight"
        for name, scheme in groups.items()
        for apply in scheme.apply
        for path in apply.targets
    }
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in matrices.intersection(tensors.keys()):
                model.get_parameter(name).copy_(tensors.get_tensor(name))
                matrices.discard(name)
    if matrices:
        raise ValueError(f"{folder}: lacks {min(matrices)}; export the model again")
