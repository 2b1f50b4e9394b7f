"""Sparse effects: the table form of q(E | M), the KL, and draws from given noise."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import leaky_relu, one_hot

from pertvae.nn import SparseEffects, gaussian_kl, sample_mask

T, L = 5, 4


def effects(inference: str, gradient: str = "gumbel", spread: float = 1.0) -> SparseEffects:
    torch.manual_seed(0)
    module = SparseEffects(
        T,
        L,
        mask_prior=0.1,
        effect_prior_scale=2.0,
        embedding_inference=inference,  # type: ignore[arg-type]
        mask_gradient=gradient,  # type: ignore[arg-type]
        n_hidden=16,
    )
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.add_(spread * (0.7 if name in ("mask_logits", "loc", "log_sd") else 0.1) * torch.randn(p.shape))
    return module


def test_identity_table_equals_a_perceptron_on_one_hot_identity() -> None:
    module = effects("correlated").double()
    mask = (torch.rand(3, T, L) < 0.5).double()
    joint = torch.cat([mask, one_hot(torch.arange(T), T).double().expand(3, T, T)], -1)
    weight = torch.cat([module.from_mask.weight, module.identity.weight.T], 1)
    h = leaky_relu(joint @ weight.T + module.from_mask.bias, 0.01)
    h = h + leaky_relu(module.second(h), 0.01)
    mean, sd = module.posterior(mask)
    torch.testing.assert_close(mean, module.head.mean(h))
    torch.testing.assert_close(sd.square(), module.head.log_variance(h).exp() + 1e-4)


def test_identity_table_starts_as_a_layer_of_the_joint_width() -> None:
    # default initialisation of Linear(L + T): uniform within 1/sqrt(L + T), not the embedding's standard normal
    module = effects("correlated", spread=0.0)
    bound = 1 / (L + T) ** 0.5
    for weight in (module.identity.weight, module.from_mask.weight, module.from_mask.bias):
        assert weight.abs().max() <= bound
    assert module.identity.weight.abs().max() > 0.8 * bound


@pytest.mark.parametrize("inference", ["mean_field", "correlated"])
def test_posterior_of_some_components(inference: str) -> None:
    module = effects(inference)
    mask, some = (torch.rand(7, T, L) < 0.5).float(), torch.tensor([3, 0])
    for part, whole in zip(module.posterior(mask[:, some], some), module.posterior(mask), strict=True):
        torch.testing.assert_close(part, whole[:, some])


def test_posterior_reads_the_mask_only_when_correlated() -> None:
    zeros, ones = torch.zeros(1, T, L), torch.ones(1, T, L)
    assert torch.equal(effects("mean_field").posterior(zeros)[0], effects("mean_field").posterior(ones)[0])
    assert not torch.allclose(effects("correlated").posterior(zeros)[0], effects("correlated").posterior(ones)[0])


@pytest.mark.parametrize("inference", ["mean_field", "correlated"])
@pytest.mark.parametrize("gradient", ["gumbel", "identity"])
def test_kl_of_a_sample_has_the_exact_expectation(inference: str, gradient: str) -> None:
    module = effects(inference, gradient)
    torch.manual_seed(1)
    with torch.no_grad():
        sample = module.sample(40_000)
        p = module.inclusion
        prior = torch.tensor(0.1)
        kl_mask = (p * (p / prior).log() + (1 - p) * ((1 - p) / (1 - prior)).log()).sum(-1)
        # E_q(M) of KL(q(E | M) || p(E)) by enumeration of each component's 2^L mask rows
        rows = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * L)
        weight = torch.where(rows[:, None] == 1, p, 1 - p).prod(-1)
        mean, sd = module.posterior(rows[:, None].expand(-1, T, L))
        kl_effect = (weight * gaussian_kl(mean, sd, 2.0).sum(-1)).sum(0)
    error = sample.kl.mean(0) - kl_mask - kl_effect
    assert (error.abs() < 5 * sample.kl.std(0) / 200 + 1e-3).all()


@pytest.mark.parametrize("inference", ["mean_field", "correlated"])
def test_given_noise_and_own_noise_have_one_distribution(inference: str) -> None:
    module = effects(inference)
    torch.manual_seed(1)
    n = 40_000
    some = torch.tensor([4, 1])
    with torch.no_grad():
        own = module.sample(n).effect[:, some]
        given = module.draw(some, torch.rand(n, 2, L), torch.randn(n, 2, L))
    for moment in (lambda a: a.mean(0), lambda a: a.std(0), lambda a: (a == 0).float().mean(0)):
        torch.testing.assert_close(moment(own), moment(given), rtol=0.05, atol=0.03)


def test_expected_effect() -> None:
    module = effects("mean_field")
    torch.testing.assert_close(module.expected(), torch.sigmoid(module.mask_logits) * module.loc)
    module = effects("correlated")
    with torch.no_grad():
        own = module.sample(40_000).effect.mean(0)
        expected = module.expected(20_000)
        assert torch.equal(module.expected(), module.expected())
    torch.testing.assert_close(expected, own, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("inference", ["mean_field", "correlated"])
def test_gradients_reach_every_parameter(inference: str) -> None:
    module = effects(inference)
    sample = module.sample(3)
    (sample.effect.square().sum() + sample.kl.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_correlated_effects_pass_their_gradient_to_the_mask() -> None:
    # through q(E | M): the effect's KL alone moves the mask logits
    module = effects("correlated", "identity")
    mask = sample_mask(module.mask_logits, 4, "identity")
    gaussian_kl(*module.posterior(mask), 2.0).sum().backward()
    assert module.mask_logits.grad is not None
    assert module.mask_logits.grad.abs().sum() > 0
