"""Decoding with a KV cache on a quantized model."""

import pytest
import torch
from conftest import random_tokens, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from duquant.attention import AttentionQuantizer, attach_, install
from duquant.hadamard import hadamard
from duquant.quantizer import make_quantizer
from duquant.scheme import TensorScheme
from models import decoder_spec
from quantize.bits import BitSettings, ClipSettings
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationSettings
from quantize.settings import QuantSettings

CPU = torch.device("cpu")
CONFIG = QuantSettings(BitSettings(4, 4), ClipSettings(0.9, 0.8), rotation=RotationSettings(16, 8))
TOKENS = random_tokens(2, 14, seed=5)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request) -> nn.Module:
    made = tiny_model()
    made.set_attn_implementation(request.param)
    quantize_model(made, decoder_spec(made.config), random_tokens(4, 16), None, CONFIG, CPU)
    return made


@torch.no_grad()
def decoded(model: nn.Module, cache, first: int) -> Tensor:
    """Logits of TOKENS: the first at once, then token by token through `cache`."""
    parts = [model(TOKENS[:, :first], past_key_values=cache).logits]
    parts += [model(TOKENS[:, at : at + 1], past_key_values=cache).logits for at in range(first, TOKENS.shape[1])]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("first", [1, 5])
def test_cached_decoding_equals_full_computation(model, first):
    with torch.no_grad():
        full = model(TOKENS, use_cache=False).logits
    cached = decoded(model, DynamicCache(config=model.config), first)
    torch.testing.assert_close(cached, full, atol=1e-4 * full.abs().max().item(), rtol=0)


def test_a_static_cache_gives_the_same(model):
    cache = StaticCache(config=model.config, max_cache_len=20)
    dynamic = decoded(model, DynamicCache(config=model.config), 5)
    torch.testing.assert_close(decoded(model, cache, 5), dynamic, atol=1e-4 * dynamic.abs().max().item(), rtol=0)


def test_generation_with_and_without_cache_gives_the_same_tokens(model):
    made = [
        model.generate(TOKENS[:, :5], max_new_tokens=12, do_sample=False, use_cache=use_cache, pad_token_id=0)
        for use_cache in (True, False)
    ]
    assert made[0].shape == (2, 17)
    assert torch.equal(*made)


def test_what_is_cached_is_quantized():
    model = tiny_model(num_hidden_layers=1)
    install(model)
    attach_(model.model.layers[0].self_attn, AttentionQuantizer(None, *[make_quantizer(TensorScheme(bits=2))] * 3))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(TOKENS, past_key_values=cache)
    for cached in (cache.layers[0].keys, cache.layers[0].values):
        assert all(len(row.unique()) <= 4 for row in cached.reshape(-1, 16))  # 2 bits: 4 levels per token and head


def test_keys_enter_the_cache_once_quantized_and_are_not_quantized_again():
    """With a clip ratio quantizing twice is not quantizing once, so the second time would show."""
    model = tiny_model(num_hidden_layers=1)
    install(model)
    quantizer = AttentionQuantizer(hadamard(16), *[make_quantizer(TensorScheme(clip=0.7))] * 3)
    key, value = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    once = quantizer.key_value(key, value)
    assert not torch.allclose(quantizer.key_value(*once)[1], once[1])
    attach_(model.model.layers[0].self_attn, quantizer)
    with torch.no_grad():
        full = model(TOKENS, use_cache=False).logits
        cached = model(TOKENS, past_key_values=DynamicCache(config=model.config)).logits
    torch.testing.assert_close(cached, full, atol=1e-5 * full.abs().max().item(), rtol=0)


def test_attaching_again_replaces_the_quantizer_and_quantizes_once():
    model = tiny_model(num_hidden_layers=1)
    install(model)
    attention = model.model.layers[0].self_attn
    for bits in (2, 4):
        attach_(attention, AttentionQuantizer(None, *[make_quantizer(TensorScheme(bits=bits, clip=0.7))] * 3))
    with torch.no_grad():
        full = model(TOKENS, use_cache=False).logits
    cached = decoded(model, DynamicCache(config=model.config), 4)
    torch.testing.assert_close(cached, full, atol=1e-4 * full.abs().max().item(), rtol=0)
