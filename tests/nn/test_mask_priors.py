"""Beta hyperpriors of masks: the bound against integrals and closed marginals, and what they learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import betaln

from pertvae.nn import SparseEffects, gaussian_kl

T, L, ALPHA = 3, 4, 0.2
SHARED = ["perturbation", "latent"]


def effects(
    hyperprior: str | None, gradient: str = "identity", alpha: float = ALPHA, shape: tuple[int, int] = (T, L)
) -> SparseEffects:
    torch.manual_seed(0)
    module = SparseEffects(
        *shape,
        mask_prior=alpha,
        effect_prior_scale=1.0,
        embedding_inference="mean_field",
        mask_gradient=gradient,  # type: ignore[arg-type]
        mask_hyperprior=hyperprior,  # type: ignore[arg-type]
    ).double()
    with torch.no_grad():
        module.mask_logits.copy_(1.5 * torch.randn(shape))
    return module


def masks_kl(module: SparseEffects, n_samples: int = 1) -> torch.Tensor:
    """What a sample pays for masks and their probabilities alone, ``(samples, components)``."""
    sd = module.log_sd.exp() + 1e-4
    return module.sample(n_samples).kl - gaussian_kl(module.loc, sd, 1.0).sum(-1)


def parameters(shared: str, alpha: float = ALPHA) -> tuple[float, float]:
    """a and b as documented."""
    return (1.0, 1 / alpha - 1) if shared == "perturbation" else (alpha / (1 - alpha), 1.0)


def groups(p: np.ndarray, shared: str) -> np.ndarray:
    """One row for each pi."""
    return p if shared == "perturbation" else p.T


def integrated_kl(p: np.ndarray, a: float, b: float, qa: float, qb: float) -> float:
    """KL(q(pi) prod q(m) || p(pi) prod p(m | pi)) by quadrature, for the masks of one pi."""
    q, prior = stats.beta(qa, qb), stats.beta(a, b)

    def integrand(pi: float) -> float:
        each = p * np.log(p / pi) + (1 - p) * np.log((1 - p) / (1 - pi))
        return float(q.pdf(pi) * (q.logpdf(pi) - prior.logpdf(pi) + each.sum()))

    return quad(integrand, 0, 1, limit=500)[0]


def total_kl(p: np.ndarray, shared: str) -> float:
    """The same for all, at the conjugate q(pi)."""
    a, b = parameters(shared)
    return sum(integrated_kl(g, a, b, a + g.sum(), b + (1 - g).sum()) for g in groups(p, shared))


@pytest.mark.parametrize("shared", SHARED)
def test_the_bound_is_that_of_masks_and_their_probabilities(shared: str) -> None:
    module = effects(shared)
    p = module.inclusion.detach().numpy()
    assert masks_kl(module).sum().item() == pytest.approx(total_kl(p, shared), abs=1e-5)
    if shared == "perturbation":  # each component pays for its own pi
        a, b = parameters(shared)
        each = [integrated_kl(g, a, b, a + g.sum(), b + (1 - g).sum()) for g in p]
        np.testing.assert_allclose(masks_kl(module)[0].detach(), each, atol=1e-5)


@pytest.mark.parametrize("shared", SHARED)
def test_no_other_posterior_of_the_probability_is_better(shared: str) -> None:
    a, b = parameters(shared)
    module = effects(shared)
    p = groups(module.inclusion.detach().numpy(), shared)[0]
    found = minimize(lambda x: integrated_kl(p, a, b, *np.exp(x)), np.log([1.0, 2.0]), method="Nelder-Mead")
    assert module.hyperprior is not None
    qa, qb = (float(v.flatten()[0]) for v in module.hyperprior.posterior(module.inclusion.detach()))
    np.testing.assert_allclose(np.exp(found.x), [qa, qb], rtol=2e-2)


@pytest.mark.parametrize("shared", SHARED)
def test_gradient_is_that_of_the_whole_bound(shared: str) -> None:
    # q(pi) is held fixed in the backward pass, and still nothing is missing
    module = effects(shared)
    masks_kl(module).sum().backward()
    logits, step = module.mask_logits.detach().numpy().copy(), 1e-3
    for i, j in [(0, 0), (1, 3), (2, 2)]:
        values = []
        for sign in (1, -1):
            moved = logits.copy()
            moved[i, j] += sign * step
            values.append(total_kl(1 / (1 + np.exp(-moved)), shared))
        assert module.mask_logits.grad is not None
        assert float(module.mask_logits.grad[i, j]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-4)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("gradient", ["gumbel", "identity"])
def test_sure_masks_pay_their_beta_binomial_probability(shared: str, gradient: str) -> None:
    # for sure masks q(pi) is the exact posterior, and the bound is tight
    module = effects(shared, gradient)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).double()
    with torch.no_grad():
        module.mask_logits.copy_(60 * mask - 30)
        found = masks_kl(module).sum().item()
    a, b = parameters(shared)
    rows = groups(mask.numpy(), shared)
    expected = -sum(betaln(a + r.sum(), b + (1 - r).sum()) - betaln(a, b) for r in rows)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shared", SHARED)
def test_bound_lies_above_the_marginal_divergence(shared: str) -> None:
    module = effects(shared)
    a, b = parameters(shared)
    marginal = 0.0
    for p in groups(module.inclusion.detach().numpy(), shared):
        for mask in itertools.product((0, 1), repeat=len(p)):
            m = np.array(mask)
            log_q = float((m * np.log(p) + (1 - m) * np.log(1 - p)).sum())
            marginal += math.exp(log_q) * (log_q - betaln(a + m.sum(), b + (1 - m).sum()) + betaln(a, b))
    excess = masks_kl(module).sum().item() - marginal
    assert 0 < excess < 3.0


@pytest.mark.parametrize("shared", SHARED)
def test_monte_carlo_form_is_unbiased(shared: str) -> None:
    sampled, exact = (effects(shared, g) for g in ("gumbel", "identity"))
    with torch.no_grad():
        kl = masks_kl(sampled, 40_000)
        error = kl.mean(0) - masks_kl(exact)[0]
    assert (error.abs() < 5 * kl.std(0) / 200).all()


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3, 0.9])
def test_prior_mean_is_mask_prior(shared: str, alpha: float) -> None:
    prior = effects(shared, alpha=alpha).hyperprior
    assert prior is not None
    assert prior.a / (prior.a + prior.b) == pytest.approx(alpha)
    if alpha < 0.5:
        assert (prior.a, prior.b) == pytest.approx(parameters(shared, alpha))


@pytest.mark.parametrize("shared", SHARED)
def test_no_kl_of_masks_or_probabilities_while_masks_are_open(shared: str) -> None:
    module = effects(shared)
    module.open = True
    assert masks_kl(module).abs().max() < 1e-9


@pytest.mark.parametrize("shared", [None, *SHARED])
def test_cost_of_an_open_mask_comes_on_top(shared: str | None) -> None:
    cost = torch.tensor([[0.0], [2.0], [5.0]])
    gradients = []
    for c in (0 * cost, cost):
        module = effects(shared)
        module.set_prior(module.base_logit - c)
        masks_kl(module).sum().backward()
        assert module.mask_logits.grad is not None
        gradients.append(module.mask_logits.grad)
    p = module.inclusion.detach()
    torch.testing.assert_close(gradients[1] - gradients[0], p * (1 - p) * cost, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- what they learn


def learn(hyperprior: str | None, gains: torch.Tensor, gradient: str, alpha: float) -> torch.Tensor:
    """Probabilities at the optimum of gains of open masks less their KL, from one half everywhere."""
    module = effects(hyperprior, gradient, alpha, (gains.shape[0], gains.shape[1]))
    torch.manual_seed(1)
    with torch.no_grad():
        module.mask_logits.zero_()
        module.loc.fill_(1.0)
        module.log_sd.fill_(-9.0)  # an effect is its mask
    optimiser = torch.optim.Adam([module.mask_logits], lr=0.1)
    for step in range(400):
        optimiser.param_groups[0]["lr"] = 0.2 * (1 - step / 400) + 0.01
        sample = module.sample(30)
        loss = sample.kl.sum(-1).mean() - (gains * sample.effect).sum((-2, -1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return module.inclusion.detach()


@pytest.mark.parametrize("gradient", ["gumbel", "identity"])
def test_density_of_each_perturbation_adapts(gradient: str) -> None:
    # both have a weak entry (gain 2 nats, and logit(0.05) + 2 is below zero); one touches ten latents more
    gains = torch.full((2, 20), -3.0)  # an effect that is not there costs what is known of it
    gains[0, :10] = 12.0
    gains[:, 19] = 2.0
    fixed = learn(None, gains, gradient, alpha=0.05)
    adapted = learn("perturbation", gains, gradient, alpha=0.05)
    assert 0.2 < fixed[:, 19].min() < fixed[:, 19].max() < 0.35
    assert adapted[0, 19] > 0.6
    assert adapted[1, 19] < 0.2
    assert (adapted[0, :10] > 0.95).all()
    assert (adapted[:, 10:19] < 0.1).all()


@pytest.mark.parametrize("gradient", ["gumbel", "identity"])
def test_latents_that_nobody_uses_are_pruned(gradient: str) -> None:
    # 3 latents with 15 users; 3 with nothing but chance, where 4 of 40 perturbations seem to gain 2.5 nats
    torch.manual_seed(0)
    gains = torch.full((40, 6), -3.0)
    for latent in range(6):
        users = torch.randperm(40)[: 15 if latent < 3 else 4]
        gains[users, latent] = 10.0 if latent < 3 else 2.5
    fixed, pruned = (learn(h, gains, gradient, alpha=0.1) for h in (None, "latent"))
    chance = gains == 2.5
    assert fixed[chance].mean() > 0.45
    assert pruned[:, 3:].max() < 0.1
    assert pruned[gains == 10].min() > 0.95
    assert pruned[:, :3].sum(0).sub(15).abs().max() < 15  # used latents stay sparse
