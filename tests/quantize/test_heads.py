"""Matrices, means and clips of heads: exact before rounding, and what they are chosen by."""

import copy

import pytest
import torch
from best_settings import BALANCED
from families import CASES, TOKENS, logits, make_config, make_model, relative_error
from torch import Tensor

from duquant.attention import by_head, make_attention_quantizer
from duquant.hadamard import hadamard
from duquant.quantizer import CenteredQuantizer
from duquant.scheme import SEARCHED, Scheme, TensorScheme
from models import decoder_spec
from quantize.clipping import ACTIVATION_RATIOS
from quantize.heads import (
    _covariance,
    balancing_matrices,
    decide_heads,
    rotate_values_,
    rotated_energy,
    value_matrices,
    value_rows,
)
from quantize.refinements import ExtraSettings

KV, GROUPS, SIZE, TOKENS_SEEN = 2, 3, 16, 300
FOUR, SIXTEEN = TensorScheme(bits=4), TensorScheme(bits=16)
SCHEME = Scheme(FOUR, FOUR, FOUR, FOUR, FOUR)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(seed: int, heads: int = KV, spread: float = 2.0) -> Tensor:
    """[heads, n, D] whose energy differs much between directions."""
    mixing = torch.randn(heads, SIZE, SIZE, generator=generator(seed), dtype=torch.float64)
    widths = torch.logspace(-spread / 2, spread / 2, SIZE, dtype=torch.float64)
    x = torch.randn(heads, TOKENS_SEEN, SIZE, generator=generator(seed + 1), dtype=torch.float64)
    return (x * widths) @ torch.linalg.qr(mixing).Q


def sampled_heads() -> dict[str, Tensor]:
    """q, k and v of some tokens: [n, heads, D]."""
    shapes = {"query": KV * GROUPS, "key": KV, "value": KV}
    return {
        role: vectors(10 * number, heads).transpose(0, 1).float() for number, (role, heads) in enumerate(shapes.items())
    }


def products(covariances: tuple[Tensor, Tensor], matrices: tuple[Tensor, Tensor]) -> Tensor:
    """E|qM|² E|kM⁻ᵀ|² of every head."""
    traces = [
        (m.transpose(1, 2) @ s @ m).diagonal(dim1=1, dim2=2).sum(dim=1)
        for s, m in zip(covariances, matrices, strict=True)
    ]
    return traces[0] * traces[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_balanced_queries_and_keys_have_the_same_products(dtype, tolerance):
    query, key = (vectors(seed).to(dtype) for seed in (0, 7))
    first, second = balancing_matrices(query, key)
    found = by_head(query, first) @ by_head(key, second).transpose(1, 2)
    assert relative_error(found, query @ key.transpose(1, 2)) < tolerance


@pytest.mark.parametrize("seed", range(4))
def test_balanced_energies_reach_the_bound_and_a_hadamard_matrix_does_not(seed):
    query, key = vectors(seed, spread=seed), vectors(seed + 20, spread=1.0)
    covariances = _covariance(query), _covariance(key)
    matrices = tuple(each.double() for each in balancing_matrices(query, key))
    roots = [torch.linalg.cholesky(each).transpose(1, 2) for each in covariances]  # S = RᵀR
    bound = torch.linalg.svdvals(roots[0] @ roots[1].transpose(1, 2)).sum(dim=1).square()
    torch.testing.assert_close(products(covariances, matrices), bound, rtol=1e-4, atol=0)
    spread = hadamard(SIZE).double().expand(KV, -1, -1)
    assert (products(covariances, matrices) < 0.95 * products(covariances, (spread, spread))).all()
    balanced = [m.transpose(1, 2) @ s @ m for s, m in zip(covariances, matrices, strict=True)]
    torch.testing.assert_close(*balanced, rtol=1e-3, atol=1e-5)


def test_directions_that_no_token_has_are_not_blown_up():
    query, key = vectors(0), vectors(7)
    query[..., 5:], key[..., :3] = 0.0, 0.0
    matrices = balancing_matrices(query, key)
    assert all(each.isfinite().all() for each in matrices)
    assert max(torch.linalg.cond(each).max().item() for each in matrices) < 100


def test_nothing_is_decided_that_is_not_asked_for():
    assert decide_heads(sampled_heads(), SCHEME, ExtraSettings()) == {}
    untouched = Scheme(FOUR, FOUR, SIXTEEN, SIXTEEN, SIXTEEN)
    assert decide_heads(sampled_heads(), untouched, ExtraSettings(key_mean=True, value_mean=True)) == {}


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("head_transform", ExtraSettings.__dataclass_fields__["head_transform"].type.__mro__[:1])
def test_means_are_of_what_is_rounded(rotate, head_transform):
    scheme = Scheme(FOUR, FOUR, FOUR, FOUR, FOUR, rotate_heads=rotate)
    heads = sampled_heads()
    heads["key"] += 3.0
    for transform in head_transform if rotate else list(head_transform)[:1]:
        extras = ExtraSettings(key_mean=True, value_mean=True, head_transform=transform)
        found = decide_heads(heads, scheme, extras)
        made = make_attention_quantizer(scheme, SIZE, torch.device("cpu"), found)
        assert isinstance(made.key, CenteredQuantizer)
        assert not isinstance(made.query, CenteredQuantizer)
        matrix = made.matrix if made.key_matrix is None else made.key_matrix
        key = by_head(heads["key"].transpose(0, 1), matrix)
        torch.testing.assert_close(key.mean(dim=1, keepdim=True), found["key.mean"], atol=1e-4, rtol=1e-4)
        value = heads["value"].transpose(0, 1).mean(dim=1, keepdim=True)
        torch.testing.assert_close(value, found["value.mean"], atol=1e-5, rtol=1e-4)
        assert made.state_dict().keys() >= found.keys()
        assert all(torch.equal(made.state_dict()[name], each) for name, each in found.items())


def test_a_mean_that_all_keys_share_costs_no_precision():
    heads = sampled_heads()
    heads["key"] += 50.0
    errors = []
    for extras in (ExtraSettings(), ExtraSettings(key_mean=True)):
        made = make_attention_quantizer(SCHEME, SIZE, torch.device("cpu"), decide_heads(heads, SCHEME, extras))
        key = heads["key"].transpose(0, 1)[None]
        rounded, _ = made.key_value(key, heads["value"].transpose(0, 1)[None])
        errors.append((rounded - by_head(key, made.matrix)).square().mean().item())
    assert errors[1] < 0.2 * errors[0]


def test_clips_of_all_roles_are_searched_where_the_scheme_asks():
    searched = TensorScheme(bits=4, clip=SEARCHED)
    found = decide_heads(sampled_heads(), Scheme(FOUR, FOUR, searched, FOUR, searched), ExtraSettings())
    assert found.keys() == {"query.clip.ratios", "value.clip.ratios"}
    assert all(each.shape == (2,) and each[0] == each[1] for each in found.values())
    assert all(round(each[0].item(), 2) in ACTIVATION_RATIOS for each in found.values())
    with pytest.raises(ValueError, match="to be searched"):
        make_attention_quantizer(Scheme(query=searched), SIZE, torch.device("cpu"), {})


def random_matrices(heads: int, size: int) -> Tensor:
    return torch.randn(heads, size, size, generator=generator(3)) + 2 * torch.eye(size)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("kind", ["hadamard", "any"])
def test_values_are_rotated_without_a_trace(family, kind):
    model = make_model(family, torch.float64)
    rotated, config = copy.deepcopy(model), make_config(family)
    spec = decoder_spec(config)
    for index, layer in enumerate(spec.decoder_layers(rotated)):
        own = spec.at(index)
        size = layer.get_submodule(own.attention).head_dim
        heads = config.num_key_value_heads
        spread = hadamard(size).expand(heads, -1, -1)
        before = layer.get_submodule(value_rows(own).path).weight.clone()
        rotate_values_(layer, own, spread if kind == "hadamard" else random_matrices(heads, size))
        after = layer.get_submodule(value_rows(own).path).weight
        start = value_rows(own).start
        assert not torch.equal(after[start:], before[start:])
        assert torch.equal(after[:start], before[:start]), "q and k of a fused linear stay"
        assert len(before) == start + heads * size
    assert relative_error(logits(rotated), logits(model)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotated_weights_keep_their_dtype(dtype):
    model = make_model("qwen2", dtype)
    spec, expected = decoder_spec(model.config), logits(model)
    for layer in spec.decoder_layers(model):
        rotate_values_(layer, spec, hadamard(8).expand(2, -1, -1))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert relative_error(logits(model).float(), expected.float()) < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "extras", [ExtraSettings(), ExtraSettings(head_transform=BALANCED)], ids=["hadamard", "balanced"]
)
def test_matrices_of_values_are_one_for_every_kv_head(extras):
    model = make_model("llama")
    spec, values = decoder_spec(model.config), sampled_heads()["value"]
    found = value_matrices(values, spec.decoder_layers(model)[0], spec, extras)
    assert found.shape == (KV, SIZE, SIZE)
    assert found.is_contiguous()
    orthogonal = torch.allclose(found @ found.transpose(1, 2), torch.eye(SIZE).expand(KV, -1, -1), atol=1e-5)
    assert orthogonal == (extras.head_transform is not BALANCED)


def test_energies_of_rotated_values_are_those_of_the_rotated_rows():
    x = vectors(4, KV * GROUPS)
    moments, matrices = x.transpose(1, 2) @ x / x.shape[1], random_matrices(KV, SIZE)
    expected = by_head(x, matrices.double()).square().mean(dim=1).sqrt().flatten()
    torch.testing.assert_close(rotated_energy(moments, matrices), expected.float(), rtol=1e-4, atol=0)
    assert TOKENS.shape == (6, 24)
