"""Likelihoods against scvi-tools, torch and scipy: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from scvi.distributions import NegativeBinomial
from scvi.distributions._negative_binomial import log_nb_positive
from torch import Tensor
from torch.distributions import Gamma, Normal, Poisson

from pertvae.nn import ExpressionDecoder, nb_log_prob, poisson_log_prob

CELLS, GENES = 24, 60


def draw(dtype: torch.dtype, log_theta: float = 0.0, spread: float = 1.0, particles: int = 0) -> tuple[Tensor, ...]:
    """Counts from 0 to 10,000, means from 0.01 to 10,000, dispersions around ``exp(log_theta)``."""
    g = torch.Generator().manual_seed(1)
    shape = (particles, CELLS, GENES) if particles else (CELLS, GENES)
    mu = torch.exp(torch.empty(shape).uniform_(np.log(0.01), np.log(1e4), generator=g))
    theta = torch.exp(log_theta + spread * torch.randn(GENES, generator=g))
    x = torch.poisson(mu[0] if particles else mu, generator=g)
    x[:, :20] = 0.0
    x[0, 20:24] = 1e4
    return x.to(dtype), mu.to(dtype), theta.to(dtype)


def scvi_nb(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    return NegativeBinomial(mu=mu, theta=theta).log_prob(x).sum(-1)


def value_and_gradients(f: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    leaves = [p.clone().requires_grad_() for p in parameters]
    value = f(x, *leaves)
    # unequal weights of particles and cells, so that a permutation or a plain sum would show
    weight = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    (value * weight).sum().backward()
    return (value.detach(), *(p.grad for p in leaves))  # type: ignore[misc]


@pytest.mark.parametrize("particles", [0, 1, 4])
def test_negative_binomial_is_scvis(particles: int) -> None:
    x, mu, theta = draw(torch.float64, particles=particles)
    ours = value_and_gradients(nb_log_prob, x, mu, theta)
    theirs = value_and_gradients(scvi_nb, x, mu, theta)
    assert ours[0].shape == ((particles, CELLS) if particles else (CELLS,))
    for a, b in zip(ours, theirs, strict=True):
        # the absolute part is for entries at which a gradient crosses zero
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().median()))


@pytest.mark.parametrize("particles", [0, 4])
def test_negative_binomial_is_scvis_in_single_precision(particles: int) -> None:
    x, mu, theta = draw(torch.float32, particles=particles)
    x, mu = x.clamp(max=100.0), mu.clamp(max=100.0)
    ours = value_and_gradients(nb_log_prob, x, mu, theta)
    theirs = value_and_gradients(scvi_nb, x, mu, theta)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0.0)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_large_counts_in_single_precision_are_as_good_as_scvis() -> None:
    # lgamma(10,000) has no more than 1e-2 nats in float32, in either implementation
    x, mu, theta = draw(torch.float32)
    exact = nb_log_prob(x.double(), mu.double(), theta.double())
    ours, theirs = nb_log_prob(x, mu, theta) - exact, scvi_nb(x, mu, theta) - exact
    assert ours.abs().max() < 1.5 * theirs.abs().max() < 0.1


def test_tiny_means() -> None:
    # scvi-tools adds 1e-8 inside logarithms, which is felt at the mean floor: with that off the numbers agree
    theta = torch.exp(torch.randn(GENES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    mu = torch.full((CELLS, GENES), 1e-4, dtype=torch.float64)
    zeros, ones = torch.zeros_like(mu), torch.ones_like(mu)

    def without_eps(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
        return log_nb_positive(x, mu, theta, eps=0.0).sum(-1)

    for x in (zeros, ones, 40 * ones):
        ours, theirs = value_and_gradients(nb_log_prob, x, mu, theta), value_and_gradients(without_eps, x, mu, theta)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12)
    ours, theirs = value_and_gradients(nb_log_prob, zeros, mu, theta), value_and_gradients(scvi_nb, zeros, mu, theta)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(nb_log_prob(ones, mu, theta), scvi_nb(ones, mu, theta), rtol=2e-5, atol=0.0)


def test_negative_binomial_is_a_gamma_poisson_with_the_published_rate() -> None:
    # concentration theta, rate theta / (mu + 1e-4), integrated numerically over the gamma's quantiles
    theta, mu, x = 1.7, 3.2, 5.0
    rate = Gamma(torch.tensor(theta, dtype=torch.float64), theta / (mu + 1e-4))
    grid = torch.linspace(1e-6, 60.0, 200_001, dtype=torch.float64)
    density = (rate.log_prob(grid) + Poisson(grid).log_prob(torch.tensor(x, dtype=torch.float64))).exp()
    exact = torch.trapezoid(density, grid).log()
    ours = nb_log_prob(torch.tensor([[x]]).double(), torch.tensor([[mu + 1e-4]]).double(), torch.tensor([theta]))
    torch.testing.assert_close(ours[0], exact, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("log_theta", [0.0, 4.0, 8.0])
def test_single_precision_holds_for_large_dispersion(log_theta: float) -> None:
    # near-Poisson genes: theta log theta summed over genes must not swallow the likelihood
    g = torch.Generator().manual_seed(2)
    n_genes = 2000
    theta = torch.exp(log_theta + 0.5 * torch.randn(n_genes, generator=g))
    mu = torch.exp(-2 + 1.5 * torch.randn(32, n_genes, generator=g)) + 1e-4
    x = torch.poisson(mu, generator=g)
    t, m = theta.double().numpy(), mu.double().numpy()
    exact = stats.nbinom.logpmf(x.numpy(), t, t / (t + m)).sum(-1)
    assert np.abs(nb_log_prob(x, mu, theta).numpy() - exact).max() < (1e-3 if log_theta < 8 else 0.1)

    exact_gradient = value_and_gradients(nb_log_prob, x.double(), mu.double(), theta.double())[2]
    ours = value_and_gradients(nb_log_prob, x, mu, theta)[2]
    theirs = value_and_gradients(scvi_nb, x, mu, theta)[2]

    def error(gradient: Tensor) -> float:
        return float((gradient - exact_gradient).norm() / exact_gradient.norm())

    # scvi-tools pays one lgamma(theta) a cell for its precision; we must not be worse
    assert error(ours) < 1.5 * error(theirs) + 1e-6


def test_poisson() -> None:
    x, mu, _ = draw(torch.float64, particles=3)
    ours = value_and_gradients(poisson_log_prob, x, mu)
    theirs = value_and_gradients(lambda x, mu: Poisson(mu, validate_args=False).log_prob(x).sum(-1), x, mu)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "normal"])
@pytest.mark.parametrize("particles", [0, 3])
def test_through_the_decoder(likelihood: str, particles: int) -> None:
    """Log-likelihood and every parameter's gradient equal those of torch's own distributions on the same outputs."""
    torch.manual_seed(0)
    decoder = ExpressionDecoder(5, 2, GENES, n_hidden=16, gene_likelihood=likelihood).double()  # type: ignore[arg-type]
    if decoder.log_scale is not None:
        decoder.log_scale.data.normal_(std=0.7)
    z = torch.randn((particles, CELLS, 5) if particles else (CELLS, 5), dtype=torch.float64)
    covariates, library = torch.randn(CELLS, 2, dtype=torch.float64), torch.full((CELLS, 1), 900.0).double()
    x = torch.poisson(torch.full((CELLS, GENES), 15.0, dtype=torch.float64))
    x[:, :5] = 0.0

    def gradients(value: Tensor) -> list[Tensor]:
        decoder.zero_grad()
        value.mean().backward()
        return [p.grad.clone() for p in decoder.parameters()]  # type: ignore[union-attr]

    ours = decoder.log_prob(decoder(z, covariates, library), x)
    ours_gradients = gradients(ours)

    h = torch.cat([z, covariates.expand(*z.shape[:-1], 2)], -1) @ decoder.mlp.first.weight.T + decoder.mlp.first.bias
    out = torch.nn.functional.leaky_relu(h, 0.01) @ decoder.out.weight.T + decoder.out.bias
    mean = 900.0 * torch.softmax(out, -1) + 1e-4
    if likelihood == "nb":
        theirs = NegativeBinomial(mu=mean, theta=decoder.log_scale.exp()).log_prob(x).sum(-1)
    elif likelihood == "poisson":
        theirs = Poisson(mean, validate_args=False).log_prob(x).sum(-1)
    else:
        theirs = Normal(out, decoder.log_scale.exp()).log_prob(x).sum(-1)
    assert ours.shape == z.shape[:-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    for a, b in zip(ours_gradients, gradients(theirs), strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
