"""The models of the paper's experiments, by name: their public dimensions, for planning and for benchmarks.

Nothing is loaded; a config here has the shapes of the published checkpoint, and no more than these are known of it.
"""

from transformers import LlamaConfig, MistralConfig, PretrainedConfig

from utils.errors import InputError

# hidden size, MLP size, layers, heads, kv heads
SHAPES = {
    "llama-7b": (4096, 11008, 32, 32, 32),
    "llama-13b": (5120, 13824, 40, 40, 40),
    "llama-30b": (6656, 17920, 60, 52, 52),
    "llama-65b": (8192, 22016, 80, 64, 64),
    "llama-2-7b": (4096, 11008, 32, 32, 32),
    "llama-2-13b": (5120, 13824, 40, 40, 40),
    "llama-2-70b": (8192, 28672, 80, 64, 8),
    "llama-3-8b": (4096, 14336, 32, 32, 8),
    "llama-3-70b": (8192, 28672, 80, 64, 8),
    "vicuna-7b": (4096, 11008, 32, 32, 32),
    "vicuna-13b": (5120, 13824, 40, 40, 40),
    "mistral-7b": (4096, 14336, 32, 32, 8),
}

# series → what its models share: vocabulary, longest context, RoPE's base, epsilon of the norms, dtype as published
SERIES = {
    "llama-2": (32000, 4096, 1e4, 1e-5, "float16"),
    "llama-3": (128256, 8192, 5e5, 1e-5, "bfloat16"),
    "llama": (32000, 2048, 1e4, 1e-6, "float16"),
    "vicuna": (32000, 4096, 1e4, 1e-5, "float16"),  # 1.5, which is made from Llama 2
    "mistral": (32000, 32768, 1e4, 1e-5, "bfloat16"),  # 0.1, whose attention sees 4096 tokens
}


def zoo_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """The config of a model of the zoo, with `layers` decoder layers instead of its own if that is given.

    Raises InputError, listing the names, for one that is not in the zoo.
    """
    if name not in SHAPES:
        raise InputError(f"{name}: not in the zoo, which has {', '.join(SHAPES)}")
    hidden, mlp, own_layers, heads, kv_heads = SHAPES[name]
    vocabulary, context, base, epsilon, dtype = next(SERIES[each] for each in SERIES if name.startswith(f"{each}-"))
    kind, special = (MistralConfig, {"sliding_window": 4096}) if name.startswith("mistral") else (LlamaConfig, {})
    return kind(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers or own_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        rms_norm_eps=epsilon,
        tie_word_embeddings=False,
        dtype=dtype,
        **special,
    )
