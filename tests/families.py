"""A tiny random model of every family, with outliers; quantizing, saving and loading one."""

import copy
from pathlib import Path

import torch
from conftest import VOCABULARY, random_tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from duquant.experts import unfuse_experts_
from models import decoder_spec
from models.load import ModelSource, load_config
from models.saved import ModelWriter, load_saved_model, read_settings
from quantize.bits import BitSettings
from quantize.observer import Observer
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationSettings
from quantize.settings import GqaSmooth, QuantSettings, SmoothSettings
from quantize.spec import Norm
from quantize.state import FinishedLayer
from quantize.statistics import channel_statistics

CPU = torch.device("cpu")
TOKENS = random_tokens(6, 24)

SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LOCAL = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts_per_tok": 2, "tie_word_embeddings": True}
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 7}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, local": ("qwen2", {"use_sliding_window": True, **LOCAL}),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "phi3": ("phi3", {"num_attention_heads": 4, "sliding_window": 7}),
    "phi3, no GQA": ("phi3", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "phi3, partial rope": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "tie_word_embeddings": True, **LOCAL}),
    "gemma3_text": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 24, **LOCAL}),
    "olmo2": ("olmo2", {}),
    "olmo2, no GQA": ("olmo2", {"num_key_value_heads": 6}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3}),
}
CASES |= {
    "mixtral": ("mixtral", {"head_dim": 16, "num_local_experts": 4, **MOE}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 5, "moe_intermediate_size": 32, "norm_topk_prob": True, **MOE}),
    "qwen3_moe, one dense layer": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [0], "norm_topk_prob": False, **MOE},
    ),
}


def make_config(name: str) -> PretrainedConfig:
    model_type, changes = CASES[name]
    return AutoConfig.for_model(model_type, **{**SHARED, **changes})


def make_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights, norms that are not all ones with an outlier channel, and biases that are not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name)).to(dtype).eval().requires_grad_(False)
    ones = 0.0 if name.startswith("gemma") else 1.0
    spec = decoder_spec(model.config)
    unfuse_experts_(spec.decoder_layers(model), spec.experts)
    absorbing = {absorber.path for group in spec.groups for absorber in group.absorbers if isinstance(absorber, Norm)}
    for path, parameter in model.named_parameters():
        if path.endswith("norm.weight"):
            parameter.uniform_(ones - 0.5, ones + 0.5)
            parameter[3] += 19 if path.split(".")[-2] in absorbing else 0  # elsewhere it would drown all else
        elif path.endswith("bias"):
            parameter.normal_(std=0.3)
        else:
            parameter.mul_(4)
    return model


def settings(bits: int = 4, gqa: GqaSmooth = GqaSmooth.ONLINE, **changes) -> QuantSettings:
    usual = {"bits": BitSettings(bits, bits), "rotation": RotationSettings(block_size=16, steps=12)}
    return QuantSettings(**{**usual, "smooth": SmoothSettings(0.6, gqa=gqa), **changes})


def quantize(
    model: nn.Module, config: QuantSettings, finished=None, tokens: Tensor = TOKENS
) -> tuple[nn.Module, dict[int, FinishedLayer]]:
    """A quantized copy, and those of its layers that were decided now."""
    model, decided = copy.deepcopy(model), Decided()
    spec = decoder_spec(model.config)
    peaks = channel_statistics(model, spec, tokens, CPU).scales
    quantize_model(model, spec, tokens, peaks, config, CPU, finished, [decided])
    return model, decided.layers


class Decided(Observer):
    """The layers that were not restored, by index."""

    def __init__(self):
        self.layers: dict[int, FinishedLayer] = {}

    def layer_done(self, index: int, finished: FinishedLayer, restored: bool) -> None:
        if not restored:
            self.layers[index] = finished


def save(
    folder: Path,
    model: nn.Module,
    config: QuantSettings,
    tokenizer_folder: Path,
    kind: type[ModelWriter] = ModelWriter,
) -> None:
    """Write a quantized model as `--save_model` does, or as what has a writer of that `kind`."""
    spec, tokenizer = decoder_spec(model.config), AutoTokenizer.from_pretrained(tokenizer_folder)
    layers = spec.decoder_layers(model)
    with kind(folder, spec, len(layers)) as writer:
        for index, layer in enumerate(layers):
            writer.visit(index, layer)
        writer.finish(model, tokenizer, config)


def reload(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, QuantSettings]:
    """The model in a folder that was saved, and its settings."""
    source = ModelSource(str(folder))
    config = load_config(source)
    saved = read_settings(config)
    del config.quantization_config
    return load_saved_model(source, config, decoder_spec(config), saved, dtype, "sdpa"), saved


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens, use_cache=False).logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
