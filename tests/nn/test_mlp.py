"""Perceptrons: the split first layer and the folded standardisation are the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import leaky_relu, linear

from pertvae.nn import MLP, GaussianHead, gaussian_kl


def plain(mlp: MLP, inputs: torch.Tensor) -> torch.Tensor:
    h = leaky_relu(linear(inputs, mlp.first.weight, mlp.first.bias), 0.01)
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


# ---------------------------------------------------------------------- rotation


def rotation_of(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_rotated_input(n_layers: int, part: int) -> None:
    torch.manual_seed(0)
    mlp = MLP((5, 4, 3), 16, n_layers).double()
    parts = [torch.randn(10, n, dtype=torch.float64) for n in mlp.first.n_in]
    rotation = rotation_of(mlp.first.n_in[part])
    before = mlp(*parts)
    mlp.first.rotate_input(part, rotation)
    assert (mlp(*parts) - before).abs().max() > 0.05
    parts[part] = parts[part] @ rotation
    torch.testing.assert_close(mlp(*parts), before)


def test_rotating_an_absent_part_changes_nothing() -> None:
    mlp = MLP((5, 0, 3), 8)
    before = mlp.first.weight.detach().clone()
    mlp.first.rotate_input(1, torch.eye(4))
    assert torch.equal(mlp.first.weight, before)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_hidden_layer_of_zeros(n_layers: int) -> None:
    mlp = MLP((5, 0, 3), 8, n_layers)
    torch.testing.assert_close(mlp.at_zero(), mlp(torch.zeros(5), None, torch.zeros(3)))


def head_and_point() -> tuple[GaussianHead, torch.Tensor]:
    torch.manual_seed(0)
    head = GaussianHead(16, 5).double()
    with torch.no_grad():
        head.log_variance.weight.mul_(4)
        head.log_variance.bias.copy_(torch.linspace(-4, 1, 5))
    return head, torch.randn(16, dtype=torch.float64)


def test_rotated_head() -> None:
    head, at = head_and_point()
    rotation = rotation_of(5)
    h = torch.randn(30, 16, dtype=torch.float64)
    mean, (_, sd_at) = head(h)[0], head(at)
    head.rotate(rotation, at)
    torch.testing.assert_close(head(h)[0], mean @ rotation)
    # the diagonal of the rotated covariance, floor included
    exact = torch.diagonal(rotation.T @ torch.diag(sd_at.square()) @ rotation)
    torch.testing.assert_close(head(at)[1].square(), exact)
    assert (exact.log() - sd_at.square().log()).abs().max() > 0.5


def test_rotated_head_is_exact_to_first_order() -> None:
    step = torch.randn(16, dtype=torch.float64)
    errors = []
    for size in (1e-1, 1e-2, 1e-3):
        head, at = head_and_point()
        rotation = rotation_of(5)
        exact = head(at + size * step)[1].square() @ rotation.square()
        head.rotate(rotation, at)
        errors.append((head(at + size * step)[1].square() - exact).abs().max().item())
    # the error falls with the square of the distance
    assert errors[0] > 1e-6
    assert errors[1] < 0.02 * errors[0]
    assert errors[2] < 0.02 * errors[1]


def test_head_of_equal_variances_turns_without_loss() -> None:
    head, at = head_and_point()
    with torch.no_grad():
        head.log_variance.weight.copy_(head.log_variance.weight[:1].expand(5, 16))
        head.log_variance.bias.fill_(-1.0)
    h = 3 * torch.randn(30, 16, dtype=torch.float64)
    sd = head(h)[1]
    head.rotate(rotation_of(5), at)
    torch.testing.assert_close(head(h)[1], sd)


def test_rotated_there_and_back() -> None:
    head, at = head_and_point()
    h = torch.randn(30, 16, dtype=torch.float64)
    permutation = torch.eye(5, dtype=torch.float64)[[3, 0, 4, 1, 2]]
    mean, sd = head(h)
    head.rotate(permutation, at)  # a permutation loses nothing
    torch.testing.assert_close(head(h), (mean @ permutation, sd @ permutation))
    head.rotate(permutation.T, at)
    torch.testing.assert_close(head(h), (mean, sd))
