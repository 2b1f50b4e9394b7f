"""The importance-weighted objective against its formula, and against the bounds it lies between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scvi
import torch
from scipy import stats
from scipy.special import logsumexp

import pertvae as pv
from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae.models.base import ModuleShape
from pertvae.models.samsvae import SAMSVAEModule
from pertvae.nn import EffectSample

GENES, LATENT, K = 9, 3, 4
DOSES = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [0, 2.5], [1, 0]]).float()
N, TOTAL = len(DOSES), 80


def module(objective: str = "iwae", n_particles: int = K, **settings: Any) -> SAMSVAEModule:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "n_latent": LATENT,
        "n_hidden": 8,
        "n_layers": 1,
        "gene_likelihood": "nb",
        "mask_prior": 0.2,
        "effect_prior_scale": 1.0,
        "embedding_inference": "mean_field",
        "basal_inference": "correlated",
    }
    made = SAMSVAEModule(
        ModuleShape(GENES, 2),
        n_particles=n_particles,
        objective=objective,  # type: ignore[arg-type]
        **(arguments | settings),
    )
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return made.eval()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    x = torch.poisson(torch.full((N, GENES), 4.0), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(N, 1)
    return {"X": x, PERTURBATION_REGISTRY_KEY: DOSES, "batch": zeros, "labels": zeros}


@pytest.mark.parametrize("basal", ["mean_field", "correlated"])
@pytest.mark.parametrize("global_kl", ["full", "plate"])
def test_loss_is_the_formula(tensors: dict, basal: str, global_kl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """-mean_i log (1/K) sum_k p(x | z_k) p(z_k) / q(z_k), K basal states for one draw of the globals, and KL / N."""
    model = module(basal_inference=basal, global_kl=global_kl)
    model.cells_per_component.copy_((DOSES > 0).sum(0))
    n_obs = TOTAL if global_kl == "full" else N
    with torch.no_grad():
        sample, noise = model.effects.sample(1), torch.randn(K, N, LATENT)
        losses = []
        for kl_weight in (1.0, 0.3):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randn", lambda *_, **__: noise)
                _, _, out = model(
                    tensors, inference_kwargs={"globals_": sample}, loss_kwargs={"n_obs": n_obs, "kl_weight": kl_weight}
                )
            losses.append(float(out.loss))
    w = {k: v.double().numpy() for k, v in model.state_dict().items()}
    x, effect = tensors["X"].double().numpy(), sample.effect[0].double().numpy()

    def perceptron(name: str, v: np.ndarray) -> np.ndarray:
        h = w[f"{name}.first.weight"] @ v + w[f"{name}.first.bias"]
        return np.where(h > 0, h, 0.01 * h)

    fit, ratio = np.zeros((K, N)), np.zeros((K, N))
    for i in range(N):
        shift = DOSES[i].double().numpy() @ effect
        genes = (np.log1p(x[i]) - w["input_mean"]) / w["input_sd"]
        h = perceptron("encoder", np.concatenate([genes, shift if basal == "correlated" else []]))
        mean = w["basal.mean.weight"] @ h + w["basal.mean.bias"]
        sd = np.sqrt(np.exp(w["basal.log_variance.weight"] @ h + w["basal.log_variance.bias"]) + 1e-4)
        for k in range(K):
            z = mean + sd * noise[k, i].double().numpy()
            logits = w["decoder.out.weight"] @ perceptron("decoder.mlp", z + shift) + w["decoder.out.bias"]
            mu = x[i].sum() * np.exp(logits) / np.exp(logits).sum() + 1e-4
            theta = np.exp(w["decoder.log_scale"])
            fit[k, i] = stats.nbinom.logpmf(x[i], theta, theta / (theta + mu)).sum()
            ratio[k, i] = stats.norm.logpdf(z, mean, sd).sum() - stats.norm.logpdf(z).sum()
    bound = logsumexp(fit - ratio, axis=0) - np.log(K)
    kl = float(sample.kl.sum()) / n_obs
    np.testing.assert_allclose(losses[0], -bound.mean() + kl, rtol=1e-5)
    np.testing.assert_allclose(out.extra_metrics["objective"], -bound.mean() + kl, rtol=1e-5)
    np.testing.assert_allclose((out.reconstruction_loss_sum + out.kl_local_sum) / N, -bound.mean(), rtol=1e-5)
    np.testing.assert_allclose(out.reconstruction_loss_sum, -fit.mean(0).sum(), rtol=1e-5)
    tempered = logsumexp(fit - 0.3 * ratio, axis=0) - np.log(K)
    np.testing.assert_allclose(losses[1], -tempered.mean() + 0.3 * kl, rtol=1e-5)


def local_bound(model: SAMSVAEModule, tensors: dict, sample: EffectSample, repeats: int) -> tuple[float, float]:
    """Mean and standard error of the local bound, nats a cell, over draws of the basal states."""
    values = []
    with torch.no_grad():
        for r in range(repeats):
            torch.manual_seed(r)
            _, _, out = model(tensors, inference_kwargs={"globals_": sample}, loss_kwargs={"n_obs": TOTAL})
            values.append(-float(out.reconstruction_loss_sum + out.kl_local_sum) / N)
    return float(np.mean(values)), float(np.std(values) / np.sqrt(repeats))


@pytest.mark.parametrize("posterior", ["gaussian", "flow"])
def test_one_draw_has_the_expectation_of_the_elbo(tensors: dict, posterior: str) -> None:
    sample = module().effects.sample(1)
    settings = {"n_particles": 1, "basal_posterior": posterior}
    (one, error), (elbo, other) = (
        local_bound(module(objective, **settings), tensors, sample, 1500) for objective in ("iwae", "elbo")
    )
    assert abs(one - elbo) < 4 * np.hypot(error, other)
    assert error < 0.1


def test_bound_rises_with_draws_towards_the_likelihood(tensors: dict) -> None:
    sample = module().effects.sample(1)
    bounds = [local_bound(module(n_particles=n), tensors, sample, 300) for n in (1, 2, 8, 64)]
    for (low, a), (high, b) in zip(bounds, bounds[1:], strict=False):
        assert low + 2 * np.hypot(a, b) < high
    many = EffectSample(sample.effect.expand(20_000, -1, -1), torch.zeros(20_000, 2))
    with torch.no_grad():
        w = module().log_weights(tensors, many, torch.Generator().manual_seed(0))
    exact = float((torch.logsumexp(w, 0) - np.log(len(w))).mean())
    assert bounds[-1][0] < exact + 0.02
    assert exact - bounds[-1][0] < 0.5 * (exact - bounds[0][0])


def test_particles_share_one_draw_of_masks_and_effects(tensors: dict) -> None:
    model = module()
    inputs = model._get_inference_input(tensors)
    out = model.inference(**inputs)
    assert out["globals"].effect.shape[0] == 1
    shift = (out["z"] - out["z_basal"]).detach()
    assert shift.shape == (K, N, LATENT)
    torch.testing.assert_close(shift, shift[:1].expand_as(shift))
    assert len(torch.unique(out["z_basal"].detach(), dim=0)) == K
    # draws that a getter asks for are draws of everything
    assert model.inference(**inputs, n_samples=3)["globals"].effect.shape[0] == 3
    assert model.inference(**inputs, n_samples=1)["z"].shape == (N, LATENT)
    # an importance weight belongs to a draw of everything
    for n in (1, 3):
        assert model.log_weights(tensors, model.draw_globals(n), torch.Generator()).shape == (n, N)


@pytest.mark.parametrize("posterior", ["gaussian", "flow"])
def test_gradients_reach_every_parameter(tensors: dict, posterior: str) -> None:
    model = module(basal_posterior=posterior, embedding_inference="correlated")
    _, _, out = model(tensors, loss_kwargs={"n_obs": TOTAL})
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


@pytest.fixture
def trained() -> Callable[..., pv.SAMSVAE]:
    def build(**settings: Any) -> pv.SAMSVAE:
        scvi.settings.seed = 0
        adata = pv.datasets.simulate_screen(
            n_genes=40, n_perturbations=4, n_doubles=2, cells_per_perturbation=30, cells_per_double=20, n_controls=60,
            n_latent=3, n_oracle=10, seed=0,
        )  # fmt: skip
        pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
        model = pv.SAMSVAE(adata, n_latent=4, n_hidden=16, **settings)
        model.train(max_epochs=30, batch_size=64, accelerator="cpu", enable_progress_bar=False)
        return model

    return build


def test_trained_bound_is_below_the_marginal_likelihood(trained: Callable[..., pv.SAMSVAE]) -> None:
    model = trained(objective="iwae", n_particles=5)
    assert np.isfinite(model.history["objective_validation"].to_numpy(dtype=float)).all()
    model.module.eval()
    loader = model._make_data_loader(adata=model.adata, batch_size=model.adata.n_obs)
    tensors = next(iter(loader))
    values = []
    with torch.no_grad():
        for seed in range(20):
            torch.manual_seed(seed)
            _, _, out = model.module(tensors, loss_kwargs={"n_obs": 1})
            values.append(-float(out.reconstruction_loss_sum + out.kl_local_sum) / model.adata.n_obs)
    assert np.mean(values) < model.get_marginal_ll(n_mc_samples=1000) + 0.01
    # scvi-tools' number is the bound too
    elbo = float(torch.as_tensor(model.get_elbo()))
    assert abs(abs(elbo) - abs(np.mean(values))) < 1.0


def test_one_particle_is_an_error_that_says_what_to_do(trained: Callable[..., pv.SAMSVAE]) -> None:
    with pytest.raises(ValueError, match=r"n_particles=1: pass n_particles=5"):
        trained(objective="iwae")
    with pytest.raises(ValueError, match=r"objective='iwea' is not one of \['elbo', 'iwae'\]"):
        trained(objective="iwea")
