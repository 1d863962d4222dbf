"""What samples show of a layer and of the input of its groups, against computing it directly."""

import copy
from types import SimpleNamespace

import pytest
import torch
from families import CPU, TOKENS, make_model
from torch import Tensor

from duquant.attention import install
from models import decoder_spec
from quantize.inputs import LayerInputs
from quantize.observe import capture_rows, layer_calls, layer_output
from quantize.samples import GroupRows, heads_by_kv, in_two, mean_of, moment_of, parts_of, viewed
from tools.fake_device import fake_device
from utils.memory import in_memory

SEEN = TOKENS.clamp(min=3)  # without the padding token, whose embedding is zero
FAMILIES = ("llama", "qwen2", "phi3", "gemma2", "mixtral", "qwen3_moe")
every_family = pytest.mark.parametrize("family", FAMILIES)
widely = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr("quantize.observe.TOKENS_PER_FORWARD", 2 * SEEN.shape[1])
    monkeypatch.setattr("quantize.samples.ROWS_AT_ONCE", 37)


def first_layer(family: str, tokens: Tensor = SEEN) -> SimpleNamespace:
    """A family's first layer in full precision, its spec, and what enters it."""
    model = make_model(family)
    spec = decoder_spec(model.config)
    install(model)
    calls = layer_calls(model, spec, tokens, CPU)
    layer = spec.decoder_layers(model)[0]
    inputs = LayerInputs(calls.hidden[:1], calls.kwargs[0], student=calls.hidden, total=len(tokens))
    return SimpleNamespace(layer=layer, spec=spec.at(0), hidden=calls.hidden, kwargs=calls.kwargs[0], inputs=inputs)


def view_of(case: SimpleNamespace, centered: bool = False, keep_rows: torch.device | None = None):
    with viewed(case.layer, case.spec, SEEN.numel(), centered, keep_rows) as view:
        for sample in case.hidden.split(2):
            layer_output(case.layer, sample, case.kwargs)
    return view


def rows_of(case: SimpleNamespace, group) -> Tensor:
    """What enters a group, sample by sample."""
    parts = (capture_rows(case.layer, group.inputs, sample, case.kwargs) for sample in case.hidden.split(2))
    return torch.cat([part.flatten(0, -2) for part in parts])


def second_moment(x: Tensor, centered: bool) -> Tensor:
    """Of rows [n, C], each scaled to length 1: [C, C], about the mean of x where each weighs 1/|x|²."""
    x = x.double()
    weights = x.square().sum(dim=1).reciprocal()
    weights = weights / weights.sum()
    mean = weights @ x if centered else torch.zeros(x.shape[1], dtype=x.dtype)
    return (weights[:, None] * (x - mean)).T @ (x - mean)


@every_family
@pytest.mark.parametrize("centered", [False, True])
def test_energies_are_roots_of_mean_squares_of_tokens_of_length_one(family, centered):
    case = first_layer(family)
    view = view_of(case, centered)
    assert view.energies.keys() == {group.name for group in case.spec.groups}
    assert view.rows == {}
    for group in case.spec.groups:
        expected = second_moment(rows_of(case, group), centered).diagonal().sqrt().float()
        torch.testing.assert_close(view.energies[group.name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("centered", [False, True])
def test_moments_of_what_heads_give_are_blocks_of_the_whole_one(centered):
    case = first_layer("llama")
    view, group = view_of(case, centered), case.spec.groups[1]
    whole = second_moment(rows_of(case, group), centered)
    size = case.layer.self_attn.head_dim
    assert view.outputs.shape == (6, size, size)
    for head, found in enumerate(view.outputs):
        part = slice(head * size, (head + 1) * size)
        torch.testing.assert_close(found, whole[part, part], rtol=1e-3, atol=1e-7)


def test_a_token_of_zeros_has_no_weight():
    case = first_layer("llama", torch.cat([SEEN, torch.zeros_like(SEEN[:1])]))
    case.hidden[-1] = 0.0
    with_zeros = view_of(case)
    case.hidden = case.hidden[:-1]
    without = view_of(case)
    torch.testing.assert_close(with_zeros.energies["qkv"], without.energies["qkv"])
    case.hidden = torch.zeros_like(case.hidden)
    assert all(energy.isfinite().all() for energy in view_of(case, centered=True).energies.values())


@every_family
def test_rows_are_kept_in_the_order_of_the_samples_if_they_are_wanted(family):
    case = first_layer(family)
    view = view_of(case, keep_rows=torch.device("cpu"))
    for group in case.spec.groups:
        if len(group.inputs) == 1:
            assert torch.equal(view.rows[group.name], rows_of(case, group))
        else:  # of one batch after the other, expert by expert
            assert view.rows[group.name].sort(dim=0).values.equal(rows_of(case, group).sort(dim=0).values)


@every_family
def test_looking_on_changes_nothing_and_leaves_nothing_behind(family):
    case = first_layer(family)
    before, hooks = layer_output(case.layer, case.hidden, case.kwargs), hooks_of(case.layer)
    with viewed(case.layer, case.spec, SEEN.numel(), centered=False):
        assert torch.equal(layer_output(case.layer, case.hidden, case.kwargs), before)
    assert hooks_of(case.layer) - hooks <= 1, "that of the cache stays, as it does on a quantized layer"
    assert torch.equal(layer_output(case.layer, case.hidden, case.kwargs), before)


def hooks_of(layer) -> int:
    return sum(len(module._forward_pre_hooks) for module in layer.modules())


@every_family
def test_heads_are_those_that_attention_is_computed_of(family, monkeypatch):
    case = first_layer(family)
    view = view_of(case)
    attention = case.layer.self_attn
    kv = attention.config.num_key_value_heads
    heads = attention.config.num_attention_heads
    shapes = {name: tuple(each.shape) for name, each in view.heads.items()}
    assert shapes == {
        "query": (SEEN.numel(), heads, attention.head_dim),
        "key": (SEEN.numel(), kv, attention.head_dim),
        "value": (SEEN.numel(), kv, attention.head_dim),
    }
    x = rows_of(case, case.spec.groups[0])
    linear = case.layer.get_submodule(case.spec.groups[0].linears[-1])  # v, or q, k and v in one
    value = linear(x)[:, -kv * attention.head_dim :].unflatten(1, (kv, -1))
    torch.testing.assert_close(view.heads["value"], value, **widely)
    monkeypatch.setattr("quantize.samples.HEAD_TOKENS", 36)
    assert len(view_of(case).heads["key"]) == 36


def test_samples_shorter_than_the_stride_show_a_token_each(monkeypatch):
    monkeypatch.setattr("quantize.samples.HEAD_TOKENS", 2)
    assert len(view_of(first_layer("llama")).heads["key"]) == len(SEEN)


def test_query_heads_come_to_the_kv_head_that_they_meet():
    query, key = torch.arange(24.0).view(2, 6, 2), torch.arange(8.0).view(2, 2, 2)
    view = {"query": query, "key": key}
    assert heads_by_kv(view, "key").equal(key.transpose(0, 1))
    found = heads_by_kv(view, "query")
    assert found.shape == (2, 6, 2)
    assert found[1].equal(query[:, 3:].flatten(0, 1))


@every_family
def test_rows_of_a_group_are_what_enters_it(family):
    case = first_layer(family)
    for group in case.spec.groups:
        expected = rows_of(case, group)
        rows = case.inputs.rows(case.layer, group)
        assert torch.equal(rows.rows, expected)
        assert torch.equal(torch.cat(list(rows.parts())), expected)
        assert max(len(part) for part in rows.parts()) == 37
        torch.testing.assert_close(rows.peak(), expected.abs().amax(dim=0))


def group_rows(rows: Tensor) -> GroupRows:
    made = copy.copy(GroupRows.__new__(GroupRows))
    made.rows, made.device = rows, CPU
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_rows_are_those_with_the_largest_magnitudes_behind_the_scale(dtype):
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.tensor([1.0] * 7 + [100.0])
    rows[11, 3], rows[250, 5], rows[7, 7] = -40.0, 30.0, 90.0
    found = group_rows(rows).largest(2, None)
    assert torch.equal(found, rows[[7, 11]])
    assert torch.equal(group_rows(rows).largest(2, scale), rows[[11, 250]])
    assert len(group_rows(rows).largest(1000, scale)) == 300


def test_some_rows_are_spread_over_all_of_them():
    rows = torch.arange(300.0)[:, None].bfloat16()
    found = group_rows(rows).some(100)
    assert found.dtype == torch.float32
    assert torch.equal(found, rows[::3].float())
    assert len(group_rows(rows).some(10_000)) == 300


def test_means_and_moments_are_of_all_parts_together():
    a, b = (torch.randn(100, 5, generator=torch.Generator().manual_seed(seed)) + seed for seed in (1, 2))
    torch.testing.assert_close(mean_of(parts_of(a, CPU)), a.mean(dim=0))
    found = moment_of(zip(parts_of(b, CPU), parts_of(a, CPU), strict=True))
    assert found.dtype == torch.float64
    own, cross = found.tensor_split(2)
    torch.testing.assert_close(own, b.double().T @ b.double() / 100, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cross, a.double().T @ b.double() / 100, rtol=1e-5, atol=1e-6)
    assert torch.equal(moment_of((part,) for part in parts_of(b, CPU)), own)


def test_on_a_gpu_products_of_moments_alone_are_of_tf32(monkeypatch):
    precisions = []

    def parts():
        for _ in range(2):
            precisions.append(("what is multiplied", torch.get_float32_matmul_precision()))
            yield torch.ones(10, 4, device="cuda"), torch.ones(10, 4, device="cuda")

    def recorded(name: str):
        multiply = getattr(Tensor, name)

        def call(*factors: Tensor) -> Tensor:
            precisions.append(("product", torch.get_float32_matmul_precision()))
            return multiply(*factors)

        return call

    with fake_device(), monkeypatch.context() as patch:
        for name in ("__matmul__", "addmm_"):
            patch.setattr(Tensor, name, recorded(name))
        assert moment_of(parts()).shape == (8, 4)
    assert precisions == [("what is multiplied", "highest"), *[("product", "high")] * 6] * 2


def test_a_float_is_a_number_that_tf32_holds_and_a_small_one():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 1000)
    high, low = in_two(x)
    assert torch.equal(high + low, x)
    assert torch.equal(torch.frexp(high).mantissa * 2**11, (torch.frexp(high).mantissa * 2**11).round())
    assert (low.abs() <= 2**-10 * x.abs()).all()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_given_every_token_as_often_as_it_is_routed(family):
    case = first_layer(family)
    gate_up, down = case.spec.groups[2:]
    assert len(case.inputs.rows(case.layer, gate_up).rows) == SEEN.numel()
    assert len(case.inputs.rows(case.layer, down).rows) == 2 * SEEN.numel()


def test_rows_of_one_input_live_where_samples_do():
    case, asked = first_layer("llama"), []

    def allocate(shape, dtype):
        asked.append((tuple(shape), dtype))
        return in_memory(shape, dtype)

    case.inputs.allocate = allocate
    case.inputs.rows(case.layer, case.spec.groups[3])
    assert asked == [((SEEN.numel(), 80), torch.float32)]
