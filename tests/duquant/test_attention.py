"""q, k and v caught after RoPE through transformers' registry."""

import pytest
import torch
from conftest import random_tokens, tiny_model
from torch import Tensor, nn

from duquant.attention import AttentionQuantizer, attach_, install, make_attention_quantizer
from duquant.formats import IntegerFormat
from duquant.hadamard import hadamard
from duquant.quantizer import Quantizer, make_quantizer
from duquant.scheme import Scheme, TensorScheme
from quantize.bits import BitSettings
from quantize.rotation_settings import Transform
from quantize.settings import QuantSettings

IMPLEMENTATIONS = ("sdpa", "eager")
TOKENS = random_tokens(2, 12)
HEADS, HEAD_DIM = 6, 16  # of conftest's tiny model


def make_model(implementation: str, **changes) -> nn.Module:
    model = tiny_model(**changes)
    model.set_attn_implementation(implementation)
    return model


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def attach_everywhere_(model: nn.Module, bits: int, matrix: Tensor | None) -> None:
    install(model)
    for layer in model.model.layers:
        quantizers = (make_quantizer(TensorScheme(bits=bits)) for _ in range(3))
        attach_(layer.self_attn, AttentionQuantizer(matrix, *quantizers))


def heads(heads_count: int = HEADS, seed: int = 0) -> Tensor:
    return torch.randn(2, heads_count, 5, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_installing_leaves_logits_as_they_are_to_the_bit(implementation):
    model = make_model(implementation)
    before = logits(model)
    install(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_installing_keeps_the_masks_of_padded_and_single_token_input(implementation):
    model = make_model(implementation)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    with torch.no_grad():
        before = model(TOKENS, attention_mask=mask, use_cache=False).logits
        install(model)
        assert torch.equal(model(TOKENS, attention_mask=mask, use_cache=False).logits, before)
    assert torch.equal(logits(model, TOKENS[:, :1]), logits(make_model(implementation), TOKENS[:, :1]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_installing_twice_is_installing_once(implementation):
    model = make_model(implementation)
    before = logits(model)
    install(model)
    name = model.config._attn_implementation
    install(model)
    assert model.config._attn_implementation == name
    assert name != implementation
    assert torch.equal(logits(model), before)


def test_one_model_s_quantizers_do_not_reach_another():
    first, second = make_model("sdpa"), make_model("sdpa")
    before = logits(second)
    attach_everywhere_(first, 2, None)
    install(second)
    assert torch.equal(logits(second), before)
    assert not torch.allclose(logits(first), before, atol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sixteen_bits_leave_logits_as_they_are(implementation):
    model = make_model(implementation)
    before = logits(model)
    attach_everywhere_(model, 16, hadamard(HEAD_DIM))
    torch.testing.assert_close(logits(model), before, atol=1e-5 * before.abs().max().item(), rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_eager_and_sdpa_agree(bits):
    # one layer: its q, k and v are the same to the bit, so no rounding of a code can fall on the other side
    found = []
    for implementation in IMPLEMENTATIONS:
        model = make_model(implementation, num_hidden_layers=1)
        attach_everywhere_(model, bits, hadamard(HEAD_DIM))
        found.append(logits(model))
    eager, sdpa = found
    torch.testing.assert_close(eager, sdpa, atol=1e-5 * sdpa.abs().max().item(), rtol=0)
    assert not torch.allclose(sdpa, logits(make_model("sdpa", num_hidden_layers=1)), atol=1e-4), "nothing was quantized"


def test_hadamard_cancels_between_query_and_key():
    quantizer = AttentionQuantizer(hadamard(HEAD_DIM), nn.Identity(), nn.Identity(), nn.Identity())
    query, key, value = quantizer(heads(), heads(2, seed=1), heads(2, seed=2))
    expected = heads()[:, :2] @ heads(2, seed=1).transpose(-1, -2)
    torch.testing.assert_close(query[:, :2] @ key.transpose(-1, -2), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(query, heads(), atol=0.1)
    assert torch.equal(value, heads(2, seed=2))


def test_query_and_key_are_quantized_after_the_hadamard_and_the_value_as_it_is():
    matrix, roles = hadamard(HEAD_DIM), [Quantizer(IntegerFormat(bits)) for bits in (3, 4, 5)]
    query, key, value = AttentionQuantizer(matrix, *roles)(heads(), heads(2, seed=1), heads(2, seed=2))
    torch.testing.assert_close(query, roles[0](heads() @ matrix))
    torch.testing.assert_close(key, roles[1](heads(2, seed=1) @ matrix))
    torch.testing.assert_close(value, roles[2](heads(2, seed=2)))


@pytest.mark.parametrize("matrix", [None, hadamard(HEAD_DIM)], ids=["plain", "hadamard"])
def test_every_token_and_head_has_its_own_range(matrix):
    quantizer = AttentionQuantizer(matrix, *(Quantizer(IntegerFormat(4)) for _ in range(3)))
    changed = heads()
    changed[1, 2, 3] *= 1000
    others = torch.ones(2, HEADS, 5, dtype=torch.bool)
    others[1, 2, 3] = False
    for before, after in zip(quantizer(*[heads()] * 3), quantizer(*[changed] * 3), strict=True):
        assert torch.equal(after[others], before[others])
        assert not torch.equal(after[1, 2, 3], before[1, 2, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept_and_inputs_left_alone(dtype):
    four = Quantizer(IntegerFormat(4))
    quantizer = AttentionQuantizer(hadamard(HEAD_DIM), four, four, four)
    inputs = [heads(seed=seed).to(dtype) for seed in range(3)]
    before = [x.clone() for x in inputs]
    assert {y.dtype for y in quantizer(*inputs)} == {dtype}
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))


@pytest.mark.parametrize("head_dim", [8, 12, 16])
def test_hadamard_has_the_size_of_the_head_and_not_of_the_block(head_dim):
    model = make_model("sdpa", head_dim=head_dim)
    before = logits(model)
    install(model)
    for layer in model.model.layers:
        matrix = make_attention_quantizer(Scheme(), head_dim, torch.device("cpu")).matrix
        assert matrix.shape == (head_dim, head_dim)
        attach_(layer.self_attn, AttentionQuantizer(matrix, *[nn.Identity()] * 3))
    torch.testing.assert_close(logits(model), before, atol=1e-5 * before.abs().max().item(), rtol=0)


@pytest.mark.parametrize("transform", Transform)
def test_only_a_transform_that_rotates_brings_the_hadamard(transform):
    rotated = transform not in (Transform.NONE, Transform.PERMUTATION)
    for bits, multiplied in ((BitSettings(4, 4), rotated), (BitSettings(4, 4, query=16), rotated), (BitSettings(4), 0)):
        scheme = QuantSettings(bits, transform=transform).scheme
        made = make_attention_quantizer(scheme, HEAD_DIM, torch.device("cpu"))
        assert (made.matrix is not None) == multiplied, "where neither q nor k is rounded it would change nothing"


def test_keys_and_values_of_shared_heads_are_quantized_once_per_kv_head():
    """GQA: the quantizer sees 2 key heads for 6 query heads, before they are repeated."""
    seen = []

    class Recording(AttentionQuantizer):
        def forward(self, query, key, value):
            seen.append((query.shape, key.shape, value.shape))
            return super().forward(query, key, value)

    model = make_model("eager")
    install(model)
    attach_(model.model.layers[1].self_attn, Recording(None, nn.Identity(), nn.Identity(), nn.Identity()))
    logits(model)
    assert seen == [((2, 6, 12, HEAD_DIM), (2, 2, 12, HEAD_DIM), (2, 2, 12, HEAD_DIM))]


def test_queries_and_keys_are_caught_after_the_rotary_embedding():
    caught = []

    class Recording(AttentionQuantizer):
        def forward(self, query, key, value):
            caught.append(key)
            return super().forward(query, key, value)

    model = make_model("sdpa")
    install(model)
    attach_(model.model.layers[0].self_attn, Recording(None, nn.Identity(), nn.Identity(), nn.Identity()))
    logits(model, TOKENS[:1].new_full((1, 6), 3))  # the same token six times: keys differ by their position alone
    key = caught[0]
    assert (key[:, :, 1:] - key[:, :, :1]).abs().amax(dim=-1).min() > 1e-3
