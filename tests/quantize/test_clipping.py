"""Learned clips, which keep the protocol of fixed ones."""

import pytest
import torch

from duquant.formats import IntegerFormat
from duquant.quantizer import Quantizer, RatioClip
from quantize.training import LearnedClip

LOW, HIGH = torch.tensor([[-2.0], [0.5], [0.0]]), torch.tensor([[1.0], [3.0], [0.0]])


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
