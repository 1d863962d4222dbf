"""The packed KV cache: to the bit what an ordinary cache of quantized k and v computes, in fewer bytes."""

import copy
from collections.abc import Callable

import families
import pytest
import torch
from conftest import random_tokens, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

import duquant.cache
from duquant.attention import attach_, install, make_attention_quantizer
from duquant.cache import PackedCache, decoded, encoded
from duquant.formats import IntegerFormat
from duquant.quantizer import CenteredQuantizer, FoundClip, Quantizer
from duquant.scheme import SEARCHED, Scheme, TensorScheme
from models import decoder_spec
from quantize.bits import BitSettings, ClipSettings
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationSettings
from quantize.settings import QuantSettings

CPU = torch.device("cpu")
HEADS, HEAD_DIM = 2, 16  # kv heads of conftest's tiny model, and their size
TOKENS = random_tokens(3, 11, seed=5)
PADDED = torch.ones_like(TOKENS)
PADDED[0, :4], PADDED[1, :9] = 0, 0
SEARCHES = {"greedy": {}, "beams": {"num_beams": 3}, "several": {"num_beams": 2, "num_return_sequences": 2}}
FOUR_BITS, CLIPPED = TensorScheme(), TensorScheme(clip=0.9)  # clipped: rounding twice is not rounding once
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def quantized_(
    model: nn.Module,
    key: TensorScheme = CLIPPED,
    value: TensorScheme = FOUR_BITS,
    found: dict[str, Tensor] | None = None,
) -> nn.Module:
    """`model` with q at 4 bits, and k and v as given, in every layer."""
    install(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        scheme = Scheme(query=FOUR_BITS, key=key, value=value)
        attach_(attention, make_attention_quantizer(scheme, attention.head_dim, CPU, found))
    return model


def caches(model: nn.Module, max_cache_len: int | None = None) -> tuple[Cache, PackedCache]:
    """An ordinary cache, which simulates, and a packed one of the same kind."""
    if max_cache_len is None:
        return DynamicCache(config=model.config), PackedCache(model)
    return StaticCache(model.config, max_cache_len=max_cache_len), PackedCache(model, max_cache_len)


def assert_same_generation(model: nn.Module, pair: tuple[Cache, PackedCache], **how) -> None:
    """Assert that greedy or beam search through both gives the same tokens and logits."""
    how = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0, **how}
    how |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": PADDED}
    simulated, packed = (model.generate(TOKENS, past_key_values=cache, **how) for cache in pair)
    assert torch.equal(packed.sequences, simulated.sequences)
    for found, expected in zip(packed.logits, simulated.logits, strict=True):
        assert torch.equal(found, expected)
    assert {layer.keys.dtype for layer in pair[1].layers} == {torch.uint8}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request) -> nn.Module:
    made = tiny_model()
    made.set_attn_implementation(request.param)
    return quantized_(made)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("length", [None, 24], ids=["growing", "static"])
def test_generation_is_that_of_the_simulated_cache(model, length, search):
    assert_same_generation(model, caches(model, length), **SEARCHES[search])


def test_it_serves_a_model_that_was_quantized_as_a_whole():
    made = tiny_model(torch.bfloat16)
    config = QuantSettings(BitSettings(4, 4), ClipSettings(0.9, 0.8), rotation=RotationSettings(16, 8))
    quantize_model(made, decoder_spec(made.config), random_tokens(4, 16), None, config, CPU)
    assert_same_generation(made, caches(made))


@pytest.mark.parametrize("length", [None, 24], ids=["growing", "static"])
@pytest.mark.parametrize("name", ["mistral", "qwen2, local", "gemma3_text", "phi3, no GQA"])
def test_windows_that_slide_and_other_families_are_served(name, length):
    made = quantized_(families.make_model(name))
    simulated, packed = caches(made, length)
    assert [type(layer) for layer in packed.layers] == [type(layer) for layer in simulated.layers]
    assert_same_generation(made, (simulated, packed), num_beams=2)


@pytest.mark.parametrize("length", [None, 24], ids=["growing", "static"])
def test_means_clips_and_matrices_that_were_found_are_applied(length):
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(HEADS, 1, HEAD_DIM, generator=generator) for name in ("key.mean", "value.mean")}
    found |= {name: torch.randn(HEADS, HEAD_DIM, HEAD_DIM, generator=generator) for name in ("matrix", "key_matrix")}
    found |= {"key.clip.ratios": torch.tensor([0.8, 0.9]), "value.clip.ratios": torch.tensor([0.7, 1.0])}
    searched = TensorScheme(bits=3, clip=SEARCHED)
    made = quantized_(tiny_model(), searched, searched, found)
    assert_same_generation(made, caches(made, length))


@pytest.mark.parametrize("length", [None, 24], ids=["growing", "static"])
@pytest.mark.parametrize(("key", "value"), [(16, 4), (4, 16), (16, 16)])
def test_what_has_sixteen_bits_is_kept_as_floats(key, value, length):
    made = quantized_(tiny_model(torch.bfloat16), TensorScheme(bits=key), TensorScheme(bits=value))
    simulated, packed = caches(made, length)
    assert_same_generation(made, (simulated, packed))
    for bits, name in ((key, "keys"), (value, "values")):
        width = 2 * HEAD_DIM if bits == 16 else HEAD_DIM // 2 + 4 + 2
        assert {getattr(layer, name).shape[-1] for layer in packed.layers} == {width}


@pytest.mark.parametrize(("dtype", "fraction"), [(torch.float16, 0.297), (torch.float32, 0.149)])
def test_four_bits_take_a_third_of_float16_or_less(dtype, fraction):
    made = quantized_(tiny_model(dtype, head_dim=64))
    simulated, packed = caches(made, 32)
    with torch.no_grad():
        for cache in (simulated, packed):
            made(TOKENS, past_key_values=cache)
    ordinary = sum(tensor.nbytes for layer in simulated.layers for tensor in (layer.keys, layer.values))
    assert packed.nbytes == sum(tensor.nbytes for layer in packed.layers for tensor in (layer.keys, layer.values))
    assert packed.nbytes == 2 * 2 * len(TOKENS) * HEADS * 32 * (32 + 4 + 2)  # layers, k and v, ..., bytes of a row
    assert packed.nbytes / ordinary == pytest.approx(fraction, abs=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 16))
def test_rows_decode_to_fake_quantization_to_the_bit(bits, symmetric, group_size, dtype):
    x = tokens_of_many_sizes(dtype)
    for mean in (None, torch.linspace(-2, 2, 2 * 15).view(2, 1, 15)):
        how = (IntegerFormat(bits, symmetric), FoundClip(torch.tensor([0.9, 0.7])), group_size)
        quantizer = Quantizer(*how) if mean is None else CenteredQuantizer(*how, mean)
        rows, layout = encoded(x, quantizer, dtype)
        assert rows.dtype is torch.uint8
        assert rows.shape[-1] == sum(layout.widths)
        assert torch.equal(decoded(rows, layout, quantizer, dtype), quantizer(x))


def tokens_of_many_sizes(dtype: torch.dtype) -> Tensor:
    """[2, 2, 6, 15]: ranges at both ends of what scales and zero points can be, a constant and zeros among them."""
    x = torch.randn(2, 2, 6, 15, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 4, 6)[:, None]
    x[:, :, 1], x[:, :, 2], x[0, 0, 3] = 0, 5, 300 + x[0, 0, 3]
    return x.to(dtype)


def test_what_is_not_finite_stays_in_its_token_and_head():
    x, quantizer = tokens_of_many_sizes(torch.float32), Quantizer(IntegerFormat(4))
    x[0, 1, 2, 3], x[1, 0, 4, 5] = torch.nan, torch.inf
    rows, layout = encoded(x, quantizer, x.dtype)
    assert torch.equal(decoded(rows, layout, quantizer, x.dtype).nan_to_num(7), quantizer(x).nan_to_num(7))


@pytest.mark.parametrize("elements", [1, 200, 300])
def test_decoding_in_parts_is_decoding_at_once(elements, monkeypatch):
    mean = torch.linspace(-2, 2, 2 * 15).view(2, 1, 15)
    quantizer = CenteredQuantizer(IntegerFormat(4), None, 5, mean)
    rows, layout = encoded(tokens_of_many_sizes(torch.float16), quantizer, torch.float16)
    whole = decoded(rows, layout, quantizer, torch.float16)
    monkeypatch.setattr(duquant.cache, "PART_ELEMENTS", elements)
    assert torch.equal(decoded(rows, layout, quantizer, torch.float16), whole)


def next_logits(model: nn.Module, cache: Cache, rows: int) -> Tensor:
    """Two more tokens for `rows` sequences through what is cached."""
    with torch.no_grad():
        return model(random_tokens(rows, 2, seed=9), past_key_values=cache).logits


def selected(cache: Cache) -> int:
    cache.batch_select_indices(torch.tensor([2, 0]))
    return 2


def repeated(cache: Cache) -> int:
    cache.batch_repeat_interleave(2)
    return 6


def reordered(cache: Cache) -> int:
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    return 3


def cropped(cache: Cache) -> int:
    cache.crop(-4)
    assert cache.get_seq_length() == 7
    return 3


@pytest.mark.parametrize("change", [selected, repeated, reordered, cropped])
def test_what_is_done_to_cached_tokens_is_done_to_their_codes(model, change: Callable[[Cache], int]):
    found = []
    for cache in caches(model):
        with torch.no_grad():
            model(TOKENS, past_key_values=cache)
        untouched = next_logits(model, copy.deepcopy(cache), 3)
        found.append(next_logits(model, cache, change(cache)))
        assert found[-1].shape != untouched.shape or not torch.equal(found[-1], untouched)
    assert torch.equal(*found)


@pytest.mark.parametrize("length", [None, 24], ids=["growing", "static"])
def test_a_cache_that_was_reset_is_as_new(model, length):
    _, packed = caches(model, length)
    first, again = [], []
    for logits in (first, again):
        with torch.no_grad():
            logits.append(model(TOKENS, past_key_values=packed).logits)
        logits.append(next_logits(model, packed, 3))
        packed.reset()
        assert packed.get_seq_length() == 0
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert (packed.nbytes == 0) == (length is None)


def test_guesses_from_the_prompt_are_taken_back_as_in_the_simulated_cache(model, monkeypatch):
    simulated, packed = caches(model)
    removed = []
    monkeypatch.setattr(packed, "crop", lambda tokens: (removed.append(tokens), PackedCache.crop(packed, tokens)))
    repeating = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "prompt_lookup_num_tokens": 3}
    made = [model.generate(repeating, past_key_values=cache, **how) for cache in (simulated, packed)]
    assert torch.equal(*made)
    assert min(removed) < 0


def test_a_layer_whose_attention_is_not_quantized_keeps_floats():
    made = tiny_model()
    install(made)
    attach_(made.model.layers[0].self_attn, make_attention_quantizer(Scheme(), HEAD_DIM, CPU))
    simulated, packed = caches(made)
    assert torch.equal(next_logits(made, packed, 3), next_logits(made, simulated, 3))
    assert [layer.keys.dtype for layer in packed.layers] == [torch.uint8, torch.float32]


def test_a_model_that_is_not_quantized_is_refused():
    with pytest.raises(ValueError, match=r"^PackedCache: no attention of this LlamaForCausalLM is quantized; .*$"):
        PackedCache(tiny_model())


def test_a_cache_made_for_another_model_is_refused(model):
    with pytest.raises(ValueError, match=r"^PackedCache: made for another model, layer 0 .*$"):
        next_logits(tiny_model(), PackedCache(model), 1)
