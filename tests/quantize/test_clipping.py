"""Searched clips lose least under their own loss; learned ones keep the protocol of fixed ones."""

import pytest
import torch
from torch import Tensor, nn

from duquant.formats import IntegerFormat, Parameters
from duquant.quantizer import Quantizer, RatioClip, make_quantizer
from duquant.scheme import TensorScheme
from quantize.clipping import ACTIVATION_RATIOS, search_activation_ratio, search_parameters
from quantize.training import LearnedClip

LOW, HIGH = torch.tensor([[-2.0], [0.5], [0.0]]), torch.tensor([[1.0], [3.0], [0.0]])
FORMS = [IntegerFormat(4), IntegerFormat(3, symmetric=True)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def losses(weight: Tensor, found: Parameters, form: IntegerFormat, importance: Tensor, size: int | None) -> Tensor:
    """Of every range, given its scale and zero: [O, C/g]."""
    size = size or weight.shape[1]
    vectors, parameters = weight.unflatten(1, (-1, size)), [each.view(len(weight), -1, 1) for each in found]
    error = form.fake(vectors, Parameters(*parameters)) - vectors
    return (error.square() * importance.view(-1, size)).sum(dim=-1)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("group_size", [None, 8, 24])
def test_a_searched_range_never_loses_to_the_whole_one(group_size, form):
    weight = torch.randn(40, 24, generator=generator()) ** 3
    importance = torch.rand(24, generator=generator(1)) ** 4
    found = search_parameters(weight, form, importance, group_size)
    grouped = group_size == 8
    assert [each.shape for each in found] == [(40, 3, 1) if grouped else (40, 1)] * 2
    whole = form.parameters(*torch.aminmax(weight.unflatten(1, (-1, group_size or 24)), dim=-1, keepdim=True))
    searched, usual = (losses(weight, each, form, importance, group_size) for each in (found, whole))
    assert (searched <= usual * (1 + 1e-6)).all()
    assert searched.sum() < 0.9 * usual.sum()


@pytest.mark.parametrize("group_size", [None, 8])
def test_every_range_is_searched_by_itself(group_size, monkeypatch):
    weight, importance = torch.randn(12, 24, generator=generator()) ** 3, torch.rand(24, generator=generator(1))
    together = search_parameters(weight, FORMS[0], importance, group_size)
    alone = [search_parameters(row[None], FORMS[0], importance, group_size) for row in weight]
    for number, each in enumerate(together):
        assert torch.equal(each, torch.cat([parameters[number] for parameters in alone]))
    monkeypatch.setattr("duquant.tensors.PART_ELEMENTS", 3 * 24 + 5)
    parts = search_parameters(weight, FORMS[0], importance, group_size)
    assert all(torch.equal(one, other) for one, other in zip(parts, together, strict=True))


def test_outliers_that_hardly_matter_are_clipped_and_others_are_not():
    weight, importance = torch.rand(3, 64, generator=generator()) * 2 - 1, torch.ones(64)
    for channel, value in ((7, -1.8), (8, 1.8)):
        weight[:, channel], importance[channel] = value, 1e-6
    scale, zero = search_parameters(weight, FORMS[0], importance, None)
    low, high = -zero * scale, (15 - zero) * scale
    assert (torch.maximum(high, -low) < 1.25).all()
    assert (torch.minimum(high, -low) > 0.8).all()
    importance[7] = 100.0
    scale, zero = search_parameters(weight, FORMS[0], importance, None)
    error = FORMS[0].fake(weight, Parameters(scale, zero))[:, 7] - weight[:, 7]
    assert (error.abs() < 0.1).all()


def test_a_symmetric_range_stays_symmetric():
    weight = torch.randn(9, 24, generator=generator()) ** 3
    _, zero = search_parameters(weight, FORMS[1], torch.ones(24), None)
    assert (zero == 3).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_row_of_zeros_and_channels_that_do_not_matter_are_finite(form):
    weight = torch.randn(4, 24, generator=generator())
    weight[1] = 0.0
    for importance in (torch.ones(24), torch.zeros(24)):
        found = search_parameters(weight, form, importance, None)
        assert all(each.isfinite().all() for each in found)
        assert (form.fake(weight, found)[1] == 0).all()


def activations(outlier: float) -> Tensor:
    x = torch.rand(64, 24, generator=generator()) * 2 - 1
    x[:, 5] *= outlier
    return x


def quantizer(group_size: int | None = None) -> Quantizer:
    return make_quantizer(TensorScheme(bits=4, group_size=group_size, clip="search"), nn.Identity())


def activation_loss(x: Tensor, ratio: float, metric: Tensor) -> float:
    error = Quantizer(IntegerFormat(4), RatioClip(ratio))(x) - x
    return ((error @ metric) * error).sum().item()


@pytest.mark.parametrize("outlier", [0.5, 1.0, 3.0])
def test_the_ratio_of_activations_loses_least_of_all_that_are_tried(outlier):
    x = activations(outlier)
    root = torch.randn(24, 24, generator=generator(2))
    for metric in (None, root @ root.T):
        found = search_activation_ratio(x, quantizer(), metric)
        tried = [activation_loss(x, ratio, torch.eye(24) if metric is None else metric) for ratio in ACTIVATION_RATIOS]
        assert found == ACTIVATION_RATIOS[min(range(len(tried)), key=tried.__getitem__)]


def test_outliers_of_activations_are_clipped_where_the_metric_does_not_mind():
    x, blind = activations(2.0), torch.eye(24)
    blind[5, 5] = 0.0
    x[:, 5] = torch.where(x[:, 5] > 0, 2.0, -2.0)
    x[:, 6] = -x[:, 5]
    blind[6, 6] = 0.0
    assert search_activation_ratio(x, quantizer(), blind) == min(ACTIVATION_RATIOS)
    assert search_activation_ratio(x, quantizer(), None) > min(ACTIVATION_RATIOS)
    flat = torch.where(x > 0, 1.0, -1.0)
    assert search_activation_ratio(flat, quantizer()) == 1.0, "two values are met exactly without a clip"


def test_groups_of_activations_have_ranges_of_their_own():
    x = torch.randn(64, 24, generator=generator()) ** 3
    x[:, :16] = torch.where(x[:, :16] > 0, 1e-3, -1e-3)  # two values: exact if their range is their own
    error = Quantizer(IntegerFormat(4), RatioClip(search_activation_ratio(x, quantizer(8))), 8)(x) - x
    whole = Quantizer(IntegerFormat(4), RatioClip(search_activation_ratio(x, quantizer())))(x) - x
    assert search_activation_ratio(x, quantizer(8)) == search_activation_ratio(x[:, 16:], quantizer(8))
    assert error.square().sum() < whole.square().sum()


@pytest.mark.parametrize("clip", [RatioClip(0.5), LearnedClip((3, 1))], ids=["ratio", "learned"])
def test_the_range_given_is_not_modified(clip):
    low, high = LOW.clone(), HIGH.clone()
    clip(low, high)
    assert torch.equal(low, LOW)
    assert torch.equal(high, HIGH)


def test_learned_clipping_starts_at_the_sigmoid_of_four():
    low, high = LearnedClip((3, 1))(LOW, HIGH)
    start = 1 / (1 + torch.exp(torch.tensor(-4.0)))
    torch.testing.assert_close(low, start * LOW)
    torch.testing.assert_close(high, start * HIGH)


def test_learned_clipping_has_one_pair_of_trainable_logits_per_range():
    clip = LearnedClip((5, 2, 1))
    assert [parameter.shape for parameter in clip.parameters()] == [(5, 2, 1), (5, 2, 1)]
    assert all(parameter.requires_grad for parameter in clip.parameters())


def test_each_end_has_its_own_logit():
    clip = LearnedClip((1, 1))
    with torch.no_grad():
        clip.high_logit.fill_(0.0)
    low, high = clip(LOW[:1], HIGH[:1])
    assert high.item() == 0.5 * HIGH[0].item()
    assert low.item() == pytest.approx(LOW[0].item() / (1 + 2.718281828**-4))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
def test_every_logit_that_decides_a_range_gets_a_gradient(group_size, symmetric):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    clip = LearnedClip((6, 1) if group_size is None else (6, 2, 1))
    quantizer = Quantizer(IntegerFormat(3, symmetric), clip, group_size)
    (quantizer(weight) - weight).square().sum().backward()
    gradients = clip.low_logit.grad, clip.high_logit.grad
    assert all(gradient.isfinite().all() for gradient in gradients)
    if symmetric:  # the larger end alone makes the scale
        assert ((gradients[0] != 0) ^ (gradients[1] != 0)).all()
    else:
        assert (gradients[0] != 0).all()
        assert (gradients[1] != 0).all()


def test_gradient_steps_on_the_logits_lower_the_error():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) ** 3  # heavy tails: clipping pays
    clip = LearnedClip((8, 1))
    quantizer, optimizer = Quantizer(IntegerFormat(2), clip), torch.optim.AdamW(clip.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = (quantizer(weight) - weight).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[1:]) < 0.95 * losses[0]
