"""Tokens behind several prompts at once: those of each prompt alone, whatever it is beside."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model
from families import CASES, CPU, make_config, make_model, quantize, settings
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import decoding
from evaluation.decoding import AT_ONCE, Request, choose_batch, rope_switch, write_tokens
from models import decoder_spec
from quantize.bits import BitSettings
from quantize.quantization import quantize_model
from quantize.rotation_settings import RotationSettings
from quantize.settings import QuantSettings
from utils.batching import BatchSize

LENGTHS = (3, 20, 11, 1)  # windows of the tiny families have 7 tokens
MODEL = ROOT / "assets/tiny-llama"


def prompts(lengths=LENGTHS, seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def requests(count: int = 10, lengths=LENGTHS) -> list[Request]:
    return [Request(prompt, count) for prompt in prompts(lengths)]


def write(model: nn.Module, asked: list[Request], ended=lambda written: False) -> list[list[int]]:
    return write_tokens(model, asked, ended, CPU)


@torch.no_grad()
def greedy_without_a_cache(model: nn.Module, request: Request) -> list[int]:
    tokens = torch.tensor([request.prompt])
    for _ in range(request.max_new_tokens):
        best = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
    return tokens[0, len(request.prompt) :].tolist()


def w4a4(model: nn.Module) -> nn.Module:
    return quantize(model, settings(rotation=RotationSettings(block_size=16, steps=2)))[0]


@pytest.mark.parametrize("name", CASES)
def test_every_family_writes_what_each_prompt_is_given_alone_and_without_a_cache(name):
    model = make_model(name, torch.float64)
    asked = requests()
    assert write(model, asked) == [greedy_without_a_cache(model, request) for request in asked]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "mixtral"])
def test_a_quantized_family_writes_what_each_prompt_is_given_alone(name):
    model = w4a4(make_model(name, torch.float64))
    asked = requests()
    assert write(model, asked) == [greedy_without_a_cache(model, request) for request in asked]


@pytest.fixture(scope="module")
def bundled() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def stories() -> list[Request]:
    """Prompts of 2 to 60 tokens out of the test stories."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    text = (ROOT / "assets/stories/test.txt").read_text(encoding="utf-8")[:4000]
    tokens = tokenizer(text).input_ids
    return [Request(tokens[start : start + length], 24) for start, length in ((0, 60), (100, 2), (300, 31), (500, 9))]


@pytest.fixture(scope="module")
def rounded(bundled, stories) -> nn.Module:
    """The bundled model in W4A4."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True).eval()
    tokens = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(0))
    config = QuantSettings(bits=BitSettings(4, 4), rotation=RotationSettings(block_size=32, steps=2))
    quantize_model(model, decoder_spec(model.config), tokens, None, config, CPU)
    return model


def test_the_bundled_model_writes_in_a_batch_what_it_writes_alone(bundled, stories):
    assert write(bundled, stories) == [write(bundled, [request])[0] for request in stories]


def test_the_bundled_model_in_w4a4_writes_in_a_batch_what_it_writes_alone(rounded, stories):
    wide = copy.deepcopy(rounded).double()  # in float32 the order of a sum decides codes that lie on a tie
    assert write(wide, stories) == [write(wide, [request])[0] for request in stories]


def test_in_w4a4_what_a_prompt_is_given_is_the_same_to_the_bit_beside_any_other(rounded, stories, monkeypatch):
    seen = []
    forward = decoding._forward

    def spy(*arguments, **inputs):
        cache, logits = forward(*arguments, **inputs)
        seen.append(logits[0])
        return cache, logits

    monkeypatch.setattr(decoding, "_forward", spy)
    found = []
    for other in stories[1:]:
        seen.clear()
        write(rounded, [stories[0], other])
        found.append(torch.stack([seen[0], *seen[2:]]))  # the second was the other's prompt
    assert all(torch.equal(found[0], each) for each in found)


def test_rows_of_nan_stay_where_they_are_and_padding_makes_none(rounded, stories, monkeypatch):
    expected = write(rounded, stories)
    joined, poisoned = decoding._joined, []

    def poison(*arguments):
        cache = joined(*arguments)
        for layer in cache.layers:
            assert layer.keys.isfinite().all()
            assert layer.values.isfinite().all()
            layer.values[1] = math.nan
            poisoned.append(layer)
        return cache

    monkeypatch.setattr(decoding, "_joined", poison)
    found = write(rounded, stories)
    assert poisoned
    assert [found[row] for row in (0, 2, 3)] == [expected[row] for row in (0, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_no_logit_is_nan_in_half_precision(name, dtype, monkeypatch):
    model = make_model(name).to(dtype)
    model.get_output_embeddings().register_forward_hook(lambda *hooked: finite.append(hooked[2].isfinite().all()))
    finite = []
    write(model, requests())
    assert len(finite) == len(LENGTHS) + 9
    assert all(finite)


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 6,
    "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
}


def test_where_rope_changes_with_length_a_prompt_is_given_what_it_is_given_alone():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    changes = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16, **heads}
    config = make_config("phi3").to_dict() | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(make_config("phi3"))(**config)).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    assert rope_switch(model.config) == 16
    asked = requests(10, (3, 12, 20, 1, 16))  # some never come there, some begin there, some pass it
    assert write(model, asked) == [greedy_without_a_cache(model, request) for request in asked]


def test_rope_of_most_models_never_changes():
    for name in CASES:
        assert rope_switch(make_config(name)) == math.inf
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert rope_switch(tiny_config(rope_parameters=dynamic)) == 64


def rows_of(model: nn.Module) -> list[int]:
    """How many rows each forward pass has, from now on."""
    rows: list[int] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    return rows


def test_a_row_that_has_all_its_tokens_leaves_the_batch_and_changes_no_other():
    model = tiny_model(torch.float64)
    asked = [replace(request, max_new_tokens=count) for request, count in zip(requests(), (5, 1, 3, 4), strict=True)]
    expected = [greedy_without_a_cache(model, request) for request in asked]
    rows = rows_of(model)
    assert write(model, asked) == expected
    assert rows == [1, 1, 1, 1, 3, 3, 2, 1]


def test_a_row_ends_with_the_token_that_is_its_last():
    model = tiny_model(torch.float64)
    whole = write(model, requests())
    last = whole[1][4]
    found = write(model, requests(), lambda written: written[-1] == last)
    for row, tokens in zip(found, whole, strict=True):
        assert row == (tokens[: tokens.index(last) + 1] if last in tokens else tokens)
    assert len(found[1]) <= 5


def sampled(temperature: float = 2.0) -> list[Request]:
    return [
        replace(request, temperature=temperature, generator=torch.Generator().manual_seed(seed))
        for seed, request in enumerate(requests())
    ]


def test_what_is_drawn_for_a_prompt_depends_on_its_generator_alone():
    model = tiny_model(torch.float64)
    state = torch.get_rng_state()
    together = write(model, sampled())
    assert together == [write(model, [request])[0] for request in sampled()]
    mixed = write(model, [*sampled()[:2], *requests()[2:]])
    assert mixed == [*together[:2], *write(model, requests())[2:]]
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_are_drawn_as_often_as_their_probabilities_say(monkeypatch):
    logits = torch.tensor([[0.0, 1.0, 2.0]]).log_softmax(-1)
    asked = Request([1], 1, 0.5, torch.Generator().manual_seed(0))
    drawn = decoding._choose(logits.expand(4000, -1), [asked] * 4000)
    shares = torch.bincount(torch.tensor(drawn)) / 4000
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), atol=0.03, rtol=0)


def test_a_given_size_is_taken_and_a_host_is_not_filled_with_caches(monkeypatch):
    model = tiny_model()  # a token: keys and values of 2 layers, 2 heads, 16 channels, 4 bytes
    assert choose_batch(5, model, 100, CPU) == BatchSize(5, given=True)
    assert choose_batch(None, model, 100, CPU) == BatchSize(AT_ONCE)
    for free, expected in ((2 * 3 * 512 * 100, 3), (10, 1)):
        monkeypatch.setattr(decoding, "available_memory", lambda free=free: free)
        assert choose_batch(None, model, 100, CPU) == BatchSize(expected)
