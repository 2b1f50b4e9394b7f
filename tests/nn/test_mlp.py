"""Perceptrons: the split first layer and the folded standardisation are the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import leaky_relu

from pertvae.nn import MLP, GaussianHead, gaussian_kl


def plain(mlp: MLP, inputs: torch.Tensor) -> torch.Tensor:
    h = leaky_relu(mlp.first(inputs), 0.01)
    for layer in mlp.rest:
        h = h + leaky_relu(layer(h), 0.01)
    return h


@pytest.mark.parametrize("n_layers", [1, 3])
def test_split_first_layer_is_concatenation(n_layers: int) -> None:
    torch.manual_seed(0)
    mlp = MLP((7, 4, 3), 16, n_layers).double()
    x, offset = torch.randn(10, 7, dtype=torch.float64), torch.randn(5, 10, 4, dtype=torch.float64)
    covariates = torch.randn(10, 3, dtype=torch.float64)
    joint = torch.cat([x.expand(5, 10, 7), offset, covariates.expand(5, 10, 3)], -1)
    out = mlp(x, offset, covariates)
    assert out.shape == (5, 10, 16)
    torch.testing.assert_close(out, plain(mlp, joint))


def test_particles_with_one_part_each_give_gradients_of_concatenation() -> None:
    torch.manual_seed(0)
    mlp = MLP((7, 4), 16).double()
    x, offset = torch.randn(10, 7, dtype=torch.float64), torch.randn(5, 10, 4, dtype=torch.float64, requires_grad=True)
    joint = torch.cat([x.expand(5, 10, 7), offset], -1)
    for ours, theirs in zip(
        torch.autograd.grad(mlp(x, offset).square().sum(), [offset, mlp.first.weight]),
        torch.autograd.grad(plain(mlp, joint).square().sum(), [offset, mlp.first.weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_absent_parts_contribute_nothing() -> None:
    mlp = MLP((7, 0, 3), 16)
    x = torch.randn(10, 7)
    zeros = torch.zeros(10, 3)
    torch.testing.assert_close(mlp(x, None, None), mlp(x, torch.zeros(10, 0), zeros))


def test_folded_standardisation_is_the_explicit_one() -> None:
    torch.manual_seed(0)
    mlp = MLP((50, 4), 16)
    x = torch.log1p(torch.poisson(torch.rand(30, 50) * 6))
    mean, sd, offset = x.mean(0), x.std(0) + 0.1, torch.randn(30, 4)
    explicit = plain(mlp, torch.cat([(x - mean) / sd, offset], -1))
    torch.testing.assert_close(mlp(x, offset, standardize=(mean, sd)), explicit, rtol=1e-5, atol=1e-5)


def test_only_the_first_part_is_standardised() -> None:
    mlp = MLP((5, 4), 8)
    x, offset = torch.randn(3, 5), torch.randn(3, 4)
    with_unit = mlp(x, offset, standardize=(torch.zeros(5), torch.ones(5)))
    torch.testing.assert_close(with_unit, mlp(x, offset))


def test_no_hidden_layer() -> None:
    with pytest.raises(ValueError, match="n_layers=0"):
        MLP((5,), 8, 0)


def test_gaussian_head_variance_has_its_floor() -> None:
    head = GaussianHead(6, 2)
    with torch.no_grad():
        head.log_variance.weight.zero_()
        head.log_variance.bias.fill_(-40.0)
    h = torch.randn(9, 6)
    mean, sd = head(h)
    torch.testing.assert_close(mean, head.mean(h))
    torch.testing.assert_close(sd, torch.full_like(sd, 1e-2))


@pytest.mark.parametrize("prior_sd", [1.0, 0.3, 4.0])
def test_gaussian_kl(prior_sd: float) -> None:
    torch.manual_seed(0)
    mean, sd = torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64).exp()
    exact = kl_divergence(Normal(mean, sd), Normal(torch.zeros(()).double(), prior_sd))
    torch.testing.assert_close(gaussian_kl(mean, sd, prior_sd), exact)


def test_gaussian_kl_vanishes_at_the_prior() -> None:
    assert gaussian_kl(torch.zeros(3), torch.full((3,), 2.5), 2.5).abs().max() < 1e-6
