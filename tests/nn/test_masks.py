"""Masks: hard values, straight-through gradients, and their KL."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from pertvae.nn import mask_kl, sample_mask

LOGITS = torch.tensor([-6.0, -4.6, -1.5, 0.0, 0.7, 3.0])


@pytest.mark.parametrize("gradient", ["gumbel", "identity"])
def test_masks_are_exactly_zero_or_one_with_the_right_probability(gradient: str) -> None:
    mask = sample_mask(LOGITS, 200_000, gradient, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert mask.shape == (200_000, len(LOGITS))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    p = torch.sigmoid(LOGITS)
    assert ((mask.mean(0) - p).abs() < 5 * (p * (1 - p) / 200_000).sqrt()).all()


def test_masks_stay_exact_at_any_log_odds() -> None:
    logits = torch.linspace(-20, 20, 5001)
    assert set(sample_mask(logits, 20).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("gradient", ["gumbel", "identity"])
def test_generator_makes_masks_reproducible_and_leaves_the_global_state(gradient: str) -> None:
    state = torch.get_rng_state()
    a, b = (sample_mask(LOGITS, 50, gradient, torch.Generator().manual_seed(3)) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("logit", "relaxed", "exact"), [(0.0, 0.1667, 0.25), (2.0, 0.113, 0.105), (-4.595, 0.0277, 0.0099)]
)
def test_gradient_of_the_mean(logit: float, relaxed: float, exact: float) -> None:
    # the relaxed gradient is biased, by up to 2.8 times where sparse masks live; the identity gradient is not
    for gradient, expected in (("gumbel", relaxed), ("identity", exact)):
        x = torch.tensor([logit], requires_grad=True)
        mask = sample_mask(x, 400_000, gradient, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        mask.mean().backward()
        assert x.grad is not None
        assert float(x.grad) == pytest.approx(expected, rel=0.02)


def exact_kl(logits: torch.Tensor, prior: float) -> torch.Tensor:
    return kl_divergence(Bernoulli(logits=logits.double()), Bernoulli(torch.tensor(prior, dtype=torch.float64)))


@pytest.mark.parametrize("prior", [0.001, 0.01, 0.5, 0.9])
def test_exact_kl(prior: float) -> None:
    logits = LOGITS.double().requires_grad_()
    reference = LOGITS.double().requires_grad_()
    ours = mask_kl(logits, sample_mask(logits, 3, "identity"), math.log(prior / (1 - prior)), "identity")
    theirs = exact_kl(reference, prior)
    assert ours.shape == (3, len(LOGITS))
    torch.testing.assert_close(ours[0], theirs)
    assert torch.equal(ours[0], ours[2])
    ours[0].sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(logits.grad, reference.grad)


@pytest.mark.parametrize("prior", [0.001, 0.01, 0.5])
def test_monte_carlo_kl_is_unbiased(prior: float) -> None:
    mask = sample_mask(LOGITS, 400_000, "gumbel", torch.Generator().manual_seed(0))
    sampled = mask_kl(LOGITS, mask, math.log(prior / (1 - prior)), "gumbel")
    error = sampled.mean(0) - exact_kl(LOGITS, prior)
    assert (error.abs() < 5 * sampled.std(0) / 400_000**0.5 + 1e-5).all()


def test_monte_carlo_kl_is_the_log_ratio_of_the_sample() -> None:
    mask = sample_mask(LOGITS, 20, "gumbel")
    prior = Bernoulli(torch.tensor(0.01))
    ratio = Bernoulli(logits=LOGITS).log_prob(mask) - prior.log_prob(mask)
    torch.testing.assert_close(mask_kl(LOGITS, mask, math.log(0.01 / 0.99), "gumbel"), ratio, rtol=1e-5, atol=1e-5)


def test_monte_carlo_kl_has_the_bias_of_the_relaxed_gradient() -> None:
    # at p = 0.01 against 0.001: 0.0639 where the exact gradient is 0.0227; the likelihood is off by the same factor
    logit = torch.logit(torch.tensor([0.01])).requires_grad_()
    mask = sample_mask(logit, 400_000, "gumbel", torch.Generator().manual_seed(0))
    mask_kl(logit, mask, math.log(0.001 / 0.999), "gumbel").mean().backward()
    assert logit.grad is not None
    assert float(logit.grad) == pytest.approx(0.0639, rel=0.03)
