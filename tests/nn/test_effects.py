"""Sparse effects: the table form of q(E | M), the KL, and draws from given noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn.functional import leaky_relu, one_hot

from pertvae.nn import SparseEffects, gathered_shift, gaussian_kl, sample_mask
from pertvae.nn._low_rank import low_rank_kl, low_rank_noise

T, L = 5, 4
INFERENCES = ["mean_field", "correlated", "gated", "low_rank"]


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
        embedding_rank=2,
    )
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.add_(spread * (0.7 if name in ("mask_logits", "loc", "log_sd", "factor") else 0.1) * torch.randn(p.shape))
    return module


def covariance(module: SparseEffects) -> torch.Tensor:
    """Covariance of q(e) with low rank."""
    sd = module.log_sd.detach().exp() + 1e-4
    return torch.diag_embed(sd.square()) + module.factor.detach() @ module.factor.detach().mT


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


@pytest.mark.parametrize("inference", INFERENCES)
def test_posterior_of_some_components(inference: str) -> None:
    module = effects(inference)
    mask, some = (torch.rand(7, T, L) < 0.5).float(), torch.tensor([3, 0])
    for part, whole in zip(module.posterior(mask[:, some], some), module.posterior(mask), strict=True):
        torch.testing.assert_close(part, whole[:, some])


def test_what_the_posterior_reads_of_the_mask() -> None:
    zeros, ones = torch.zeros(1, T, L), torch.ones(1, T, L)
    for inference in ("mean_field", "low_rank"):
        for at_zeros, at_ones in zip(*(effects(inference).posterior(m) for m in (zeros, ones)), strict=True):
            assert torch.equal(at_zeros, at_ones)
    assert not torch.allclose(effects("correlated").posterior(zeros)[0], effects("correlated").posterior(ones)[0])
    mean, sd = effects("gated").posterior(zeros)  # the prior
    assert (mean == 0).all()
    assert (sd == 2.0).all()
    for gated, free in zip(effects("gated").posterior(ones), effects("mean_field").posterior(ones), strict=True):
        assert torch.equal(gated, free)


@pytest.mark.parametrize("inference", INFERENCES)
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
        if inference == "low_rank":
            normal_prior = MultivariateNormal(torch.zeros(L), 4.0 * torch.eye(L))
            kl_effect = kl_divergence(MultivariateNormal(module.loc, covariance(module)), normal_prior)
    error = sample.kl.mean(0) - kl_mask - kl_effect
    assert (error.abs() < 5 * sample.kl.std(0) / 200 + 1e-3).all()


@pytest.mark.parametrize("inference", INFERENCES)
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
    for t in range(2):  # effects of one component may be correlated
        torch.testing.assert_close(own[:, t].T.cov(), given[:, t].T.cov(), rtol=0.05, atol=0.05)


def test_expected_effect() -> None:
    for inference in ("mean_field", "gated", "low_rank"):
        module = effects(inference)
        torch.testing.assert_close(module.expected(), torch.sigmoid(module.mask_logits) * module.loc)
    module = effects("correlated")
    with torch.no_grad():
        own = module.sample(40_000).effect.mean(0)
        expected = module.expected(20_000)
        assert torch.equal(module.expected(), module.expected())
    torch.testing.assert_close(expected, own, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("inference", INFERENCES)
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


# ---------------------------------------------------------------- gated


@pytest.mark.parametrize("gradient", ["gumbel", "identity"])
def test_gated_is_mean_field_where_masks_are_sure_to_be_on(gradient: str) -> None:
    samples = []
    for inference in ("gated", "mean_field"):
        module = effects(inference, gradient)
        with torch.no_grad():
            module.mask_logits.fill_(25.0)
        samples.append(module.sample(5, torch.Generator().manual_seed(2)))
    torch.testing.assert_close(samples[0].kl, samples[1].kl)
    assert torch.equal(samples[0].effect, samples[1].effect)


@pytest.mark.parametrize("gradient", ["gumbel", "identity"])
def test_gated_effects_cost_nothing_where_masks_are_sure_to_be_off(gradient: str) -> None:
    module = effects("gated", gradient)
    with torch.no_grad():
        module.mask_logits.fill_(-25.0)
        kl = module.sample(3).kl
    # what is left is the masks' own: -log(1 - 0.1) an entry
    torch.testing.assert_close(kl, torch.full((3, T), -L * math.log(0.9)))


@pytest.mark.parametrize("gradient", ["gumbel", "identity"])
def test_gated_masks_reach_the_posterior(gradient: str) -> None:
    # an open entry gains 6 nats and pays the KL of its effect: its log-odds are the prior's plus the difference
    module = SparseEffects(
        1, 4, mask_prior=0.01, effect_prior_scale=1.0, embedding_inference="gated", mask_gradient=gradient  # type: ignore[arg-type]
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        module.loc.copy_(torch.tensor([[0.0, 1.0, 2.0, 2.5]]))
        module.log_sd.copy_(torch.tensor([[0.0, -1.0, -0.5, -0.5]]))
    cost = gaussian_kl(module.loc, module.log_sd.exp() + 1e-4)[0].detach()
    optimiser = torch.optim.Adam([module.mask_logits], lr=0.1)
    tail = []
    for step in range(1200):
        optimiser.param_groups[0]["lr"] = 0.2 * (1 - step / 1200) + 0.002
        kl, mask = (  # the mask of the sample comes first from its generator
            module.sample(500, torch.Generator().manual_seed(step)).kl,
            sample_mask(module.mask_logits, 500, gradient, torch.Generator().manual_seed(step)),  # type: ignore[arg-type]
        )
        loss = kl.mean(0).sum() - 6.0 * mask.mean(0).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step > 900:
            tail.append(module.mask_logits.detach().clone())
    learned = torch.stack(tail).mean(0)[0]
    assert (learned - (module.base_logit + 6.0 - cost)).abs().max() < 0.2, (learned, cost)


# ---------------------------------------------------------------- low rank


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_low_rank_kl_is_that_of_the_full_covariance(rank: int) -> None:
    torch.manual_seed(0)
    mean, sd, factor = torch.randn(7, 6), 0.2 + torch.rand(7, 6), torch.randn(7, 6, rank)
    mean, sd, factor = (a.double().requires_grad_() for a in (mean, sd, factor))
    found = low_rank_kl(mean, sd, factor, 1.7)
    q = MultivariateNormal(mean, torch.diag_embed(sd.square()) + factor @ factor.mT)
    expected = kl_divergence(q, MultivariateNormal(torch.zeros(6).double(), 1.7**2 * torch.eye(6).double()))
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(v.sum(), (mean, sd, factor)) for v in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_low_rank_kl_without_a_factor_is_that_of_the_diagonal() -> None:
    mean, sd = torch.randn(3, L), torch.rand(3, L) + 0.1
    torch.testing.assert_close(low_rank_kl(mean, sd, torch.zeros(3, L, 2), 0.7), gaussian_kl(mean, sd, 0.7).sum(-1))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_low_rank_noise_has_the_covariance(scale: float) -> None:
    torch.manual_seed(0)
    sd, factor = 0.2 + torch.rand(3, 6).double(), scale * torch.randn(3, 6, 2).double()
    root = low_rank_noise(sd, factor, torch.eye(6).double()[:, None].expand(6, 3, 6)).permute(1, 2, 0)
    torch.testing.assert_close(root @ root.mT, torch.diag_embed(sd.square()) + factor @ factor.mT)
    turned = factor @ torch.linalg.qr(torch.randn(2, 2).double())[0]  # another factor of the same covariance
    again = low_rank_noise(sd, turned, torch.eye(6).double()[:, None].expand(6, 3, 6)).permute(1, 2, 0)
    torch.testing.assert_close(root, again)


def test_rank_is_at_most_that_of_the_latents() -> None:
    module = SparseEffects(
        T, 3, mask_prior=0.1, effect_prior_scale=1.0, embedding_inference="low_rank", embedding_rank=9
    )
    assert module.factor.shape == (T, 3, 3)


# ---------------------------------------------------------------- phases of the training


@pytest.mark.parametrize("inference", ["mean_field", "gated", "low_rank"])
def test_rotation_turns_effects(inference: str) -> None:
    module = effects(inference)
    module.open = True
    rotation = torch.linalg.qr(torch.randn(L, L))[0]
    mean, before = module.loc.detach().clone(), torch.diag_embed((module.log_sd.exp() + 1e-4).square()).detach()
    if inference == "low_rank":
        outer = module.factor.detach() @ module.factor.detach().mT
        before = covariance(module)
    module.rotate(rotation)
    torch.testing.assert_close(module.loc.detach(), mean @ rotation)
    # each entry's variance is that of the turned covariance
    expected = (rotation.T @ before @ rotation).diagonal(dim1=-2, dim2=-1)
    found = module.posterior(torch.ones(T, L))[1].detach().square()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if inference == "low_rank":
        torch.testing.assert_close(module.factor.detach() @ module.factor.detach().mT, rotation.T @ outer @ rotation)


@pytest.mark.parametrize("inference", ["mean_field", "gated", "low_rank"])
def test_rotation_leaves_the_kl_where_the_diagonal_is_round(inference: str) -> None:
    module = effects(inference)
    module.open = True
    with torch.no_grad():
        module.log_sd.copy_(module.log_sd[:, :1].expand(T, L))
    kl = module.sample(1).kl
    module.rotate(torch.linalg.qr(torch.randn(L, L))[0])
    torch.testing.assert_close(module.sample(1).kl, kl, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inference", INFERENCES)
def test_masks_start_from_dense_effects(inference: str) -> None:
    module = effects(inference)
    module.open = True
    with torch.no_grad():
        if inference != "correlated":
            module.loc.copy_(torch.where(torch.rand(T, L) < 0.4, 6.0, 0.1))
            module.log_sd.fill_(-2.0)
        assert (module.sample(2).effect != 0).all()
        mean, _ = module.posterior(torch.ones(T, L))
        threshold = module.start_masks(0.95)
    assert not module.open
    on = module.mask_logits > module.base_logit
    if inference != "correlated":
        assert on.sum() == (mean == 6.0).sum() == (mean.abs() >= threshold).sum()
    assert torch.isfinite(module.sample(2).kl).all()


@pytest.mark.parametrize("n_samples", [1, 3])
def test_gathered_shifts_equal_the_product(n_samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    doses = torch.zeros(40, 200)
    for cell in range(30):  # the others are controls
        chosen = torch.randperm(200, generator=generator)[: 1 + cell % 3]
        doses[cell, chosen] = torch.rand(len(chosen), generator=generator) + 0.1
    gradients = []
    for shift_of in (lambda e: doses @ e, lambda e: gathered_shift(doses, e, 3)):
        effect = torch.randn(n_samples, 200, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        shift = shift_of(effect)
        shift.square().sum().backward()
        gradients.append((shift.detach(), effect.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not gradients[1][0][:, 30:].any()


@pytest.mark.parametrize("inference", INFERENCES)
def test_closed_entries_have_their_prior(inference: str) -> None:
    module = effects(inference)
    module.set_typical_dose(torch.tensor([1.0, 1.0, 50.0, 1.0, 1.0]))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.close_masks(torch.tensor([2, 4]), torch.tensor([1, 3]))
    closed = torch.zeros(T, L, dtype=torch.bool)
    closed[2, 1] = closed[4, 3] = True
    torch.testing.assert_close(module.inclusion[closed], torch.tensor([0.1, 0.1]))
    if inference != "correlated":
        mean, sd = module.posterior(torch.ones(T, L))
        torch.testing.assert_close(mean[closed], torch.zeros(2))
        torch.testing.assert_close(sd[closed], torch.tensor([2.0, 2.0]))
    for name, value in module.state_dict().items():
        if name in ("mask_logits", "loc", "log_sd", "factor"):
            torch.testing.assert_close(value[~closed], before[name][~closed], msg=name)
        else:
            torch.testing.assert_close(value, before[name], msg=name)


def test_entries_are_closed_whatever_the_prior() -> None:
    module = SparseEffects(T, L, mask_prior=0.8, effect_prior_scale=1.0, embedding_inference="mean_field")
    module.close_masks(torch.tensor([1]), torch.tensor([2]))
    assert module.inclusion[1, 2].item() == pytest.approx(0.2)
