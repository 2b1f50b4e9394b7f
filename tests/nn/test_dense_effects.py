"""Sparse effects with masks open, their rotation, and the start of the masks."""

from __future__ import annotations

import math

import pytest
import torch

from pertvae.nn import SparseEffects, gaussian_kl
from pertvae.nn._effects import START_LOGIT

T, L, SCALE, PRIOR = 6, 4, 2.0, 0.1
BASE = math.log(PRIOR / (1 - PRIOR))
INFERENCE = pytest.mark.parametrize("inference", ["mean_field", "correlated"])


def effects(inference: str = "mean_field", seed: int = 0, *, is_open: bool = True) -> SparseEffects:
    torch.manual_seed(seed)
    module = SparseEffects(
        T, L, mask_prior=PRIOR, effect_prior_scale=SCALE, embedding_inference=inference, n_hidden=16
    )  # type: ignore[arg-type]  # fmt: skip
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.add_((0.7 if name in ("mask_logits", "loc", "log_sd") else 0.2) * torch.randn(p.shape))
    module.open = is_open
    return module


def rotation_of(n: int = L) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(5)))[0]


# -------------------------------------------------------------------- open masks


@INFERENCE
def test_open_masks_are_ones_without_kl(inference: str) -> None:
    module = effects(inference)
    mean, sd = module.posterior(torch.ones(T, L))
    assert torch.equal(module.inclusion, torch.ones(T, L))
    with torch.no_grad():
        sample = module.sample(20_000)
    torch.testing.assert_close(sample.kl, gaussian_kl(mean, sd, SCALE).sum(-1).expand(20_000, T))
    assert (sample.effect != 0).all()
    torch.testing.assert_close(sample.effect.mean(0), mean, atol=0.06, rtol=0.0)
    torch.testing.assert_close(sample.effect.std(0), sd, atol=0.0, rtol=0.05)
    torch.testing.assert_close(module.expected(), mean, rtol=1e-4, atol=1e-5)
    uniform, normal = torch.rand(3, T, L), torch.randn(3, T, L)
    torch.testing.assert_close(module.draw(torch.arange(T), uniform, normal), mean + sd * normal)


@INFERENCE
def test_open_masks_learn_nothing(inference: str) -> None:
    module = effects(inference)
    sample = module.sample(2)
    (sample.effect.square().sum() + sample.kl.sum()).backward()
    logits = module.mask_logits.grad
    assert logits is None or not logits.any()
    others = [p for p in module.parameters() if p is not module.mask_logits]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in others)


@INFERENCE
def test_expected_follows_the_switch(inference: str) -> None:
    # no parameter changes between the two: a value kept from before would be wrong
    module = effects(inference)
    with torch.no_grad():
        dense = module.expected()
        module.open = False
        sparse = module.expected()
        assert not torch.allclose(dense, sparse, atol=0.05)
        module.open = True
        assert torch.equal(module.expected(), dense)


@INFERENCE
@pytest.mark.parametrize("was_open", [True, False])
def test_open_is_saved_with_the_weights(inference: str, was_open: bool) -> None:
    module = effects(inference, is_open=was_open)
    module.set_prior(torch.full((T, 1), -9.0))
    other = effects(inference, seed=1, is_open=not was_open)
    other.load_state_dict(module.state_dict())
    assert other.open is was_open
    assert torch.equal(other.inclusion, module.inclusion)
    torch.manual_seed(3)
    kl = module.sample(2).kl
    torch.manual_seed(3)
    assert torch.equal(other.sample(2).kl, kl)


def test_stricter_prior_costs_its_log_odds() -> None:
    module = effects(is_open=False)
    with torch.no_grad():
        module.mask_logits[0], module.mask_logits[1] = 20.0, -20.0  # surely open, surely closed
        kl, exact = [], gaussian_kl(*module.posterior(torch.ones(T, L)), SCALE).sum(-1)
        for logit in (BASE, -30.0):
            module.set_prior(torch.full((T, 1), logit))
            kl.append(module.sample(1).kl[0] - exact)
    # an open mask: -log sigmoid(logit) nats; a closed one: -log sigmoid(-logit)
    for found, logit in zip(kl, (BASE, -30.0), strict=True):
        assert found[0].item() == pytest.approx(L * math.log1p(math.exp(-logit)), rel=1e-4)
        assert found[1].item() == pytest.approx(L * math.log1p(math.exp(logit)), abs=1e-4)


# ---------------------------------------------------------------------- rotation


@INFERENCE
def test_rotated_effects(inference: str) -> None:
    module, rotation = effects(inference), rotation_of()
    mean, sd = (v.detach().clone() for v in module.posterior(torch.ones(T, L)))
    module.rotate(rotation)
    turned, turned_sd = (v.detach() for v in module.posterior(torch.ones(T, L)))
    torch.testing.assert_close(turned, mean @ rotation)
    exact = (sd.square() @ rotation.square()).sqrt()
    assert (exact / sd - 1).abs().max() > 0.1
    if inference == "mean_field":
        torch.testing.assert_close(turned_sd, exact)
    else:  # the log variances are linear in the hidden layer, so exact near its mean only
        assert (turned_sd / exact - 1).abs().max() < 0.1 < (sd / exact - 1).abs().max()
        assert (turned_sd / exact - 1).abs().max() < 0.3 * (sd / exact - 1).abs().max()


def test_rotated_effects_may_be_sure() -> None:
    # standard deviations at their floor stay finite
    module = effects()
    with torch.no_grad():
        module.log_sd.fill_(-50.0)
        module.rotate(rotation_of())
        assert torch.isfinite(module.log_sd).all()
        torch.testing.assert_close(module.posterior(torch.ones(T, L))[1], torch.full((T, L), 1e-4), rtol=0, atol=2e-4)


def test_rotated_correlated_effects_do_not_read_the_mask() -> None:
    # what the columns of the mask said was true of all masks open and of nothing else
    module = effects("correlated")
    assert not torch.allclose(module.posterior(torch.ones(T, L))[0], module.posterior(torch.zeros(T, L))[0], atol=0.1)
    module.rotate(rotation_of())
    torch.testing.assert_close(module.posterior(torch.ones(T, L)), module.posterior(torch.zeros(T, L)))
    # and can learn to
    module.open = False
    sample = module.sample(2)
    sample.kl.sum().backward()
    assert module.from_mask.weight.grad is not None
    assert module.from_mask.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------- start of masks


def dense(mean: torch.Tensor, sd: torch.Tensor) -> SparseEffects:
    module = effects()
    with torch.no_grad():
        module.loc.copy_(mean)
        module.log_sd.copy_((sd - 1e-4).log())
    return module


def test_the_largest_effects_start_open() -> None:
    mean = torch.zeros(T, L)
    mean[range(4), [0, 1, 2, 3]] = torch.tensor([4.0, -3.0, 2.0, 1.0])  # squares 16, 9, 4, 1
    sd = torch.full((T, L), 0.05)
    for energy, n_open, smallest in ((0.5, 1, 4.0), (0.8, 2, 3.0), (0.85, 3, 2.0), (0.99, 4, 1.0)):
        module = dense(mean, sd)
        assert module.start_masks(energy) == pytest.approx(smallest)
        assert not module.open
        assert torch.equal(module.mask_logits > 0, mean.abs() >= smallest)
        assert int((module.mask_logits > 0).sum()) == n_open
        # closed ones start at the prior, open ones sure
        assert (module.mask_logits[mean.abs() < smallest] - BASE).abs().max() < 1e-6
        assert (module.mask_logits[mean.abs() >= smallest] - START_LOGIT).abs().max() < 1e-6


def test_open_masks_start_at_their_posterior_odds() -> None:
    mean, sd = torch.zeros(T, L), torch.full((T, L), 0.4)
    mean[0, 0], mean[1, 0], sd[1, 0] = 1.3, 1.3, 0.8
    module = dense(mean, sd)
    module.start_masks(0.99)
    # log odds of the prior and log N(0; 0, scale^2) - log N(0; mean, sd^2)
    normal = torch.distributions.Normal
    for row, open_ in ((0, True), (1, False)):
        bayes = normal(0.0, SCALE).log_prob(torch.tensor(0.0)) - normal(mean[row, 0], sd[row, 0]).log_prob(
            torch.tensor(0.0)
        )
        odds = BASE + bayes.item()
        assert (odds > 0) is open_  # as large, but not sure
        assert module.mask_logits[row, 0].item() == pytest.approx(odds if open_ else BASE, abs=1e-3)


def test_null_effects_start_closed() -> None:
    torch.manual_seed(0)
    sd = torch.full((T, L), 0.3)
    module = dense(sd * torch.randn(T, L), sd)
    module.start_masks(0.85)
    assert (module.mask_logits - BASE).abs().max() < 1e-6


def test_masks_of_correlated_effects_start_from_open_ones() -> None:
    module = effects("correlated")
    with torch.no_grad():
        module.head.mean.weight.zero_()
        module.head.mean.bias.copy_(torch.tensor([3.0, 0, 0, 0]))
        module.head.log_variance.bias.fill_(-5.0)
    assert module.start_masks(0.85) == pytest.approx(3.0)
    assert (module.mask_logits[:, 0] > 2).all()
    assert (module.mask_logits[:, 1:] - BASE).abs().max() < 1e-6


def test_no_effects_at_all() -> None:
    module = dense(torch.zeros(T, L), torch.full((T, L), 0.3))
    assert module.start_masks(0.85) == 0.0
    assert (module.mask_logits - BASE).abs().max() < 1e-6
