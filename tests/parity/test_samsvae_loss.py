"""The training loss of SAMS-VAE against the formula, term by term."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scvi.module.base import LossOutput

from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae.models.base import ModuleShape, TrainingStatistics
from pertvae.models.samsvae import SAMSVAEModule
from pertvae.nn import EffectSample

GENES, LATENT = 12, 3
# rows: controls, singles, doubles, a triple dose; the last component has no cell
DOSES = torch.tensor(
    [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [0, 2.5, 0, 0],
    ]
).float()
N = len(DOSES)
CELLS_PER_COMPONENT = np.array([4, 3, 2, 0])


def module(n_particles: int = 1, **settings: Any) -> SAMSVAEModule:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "n_latent": LATENT,
        "n_hidden": 8,
        "n_layers": 2,
        "gene_likelihood": "nb",
        "mask_prior": 0.05,
        "effect_prior_scale": 1.5,
        "embedding_inference": "correlated",
        "basal_inference": "correlated",
    }
    made = SAMSVAEModule(
        ModuleShape(GENES, DOSES.shape[1], n_batch=2, n_continuous_cov=1),
        n_particles=n_particles,
        **(arguments | settings),
    )
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    made.set_training_statistics(
        TrainingStatistics(
            input_mean=np.linspace(0.5, 1.5, GENES),
            input_sd=np.linspace(0.8, 1.9, GENES),
            output_bias=np.zeros(GENES),
            output_log_scale=np.zeros(GENES),
            cells_per_component=CELLS_PER_COMPONENT,
            n_cells=N,
        )
    )
    return made.eval()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return {
        "X": torch.poisson(torch.rand(N, GENES, generator=g) * 9, generator=g),
        PERTURBATION_REGISTRY_KEY: DOSES,
        "batch": (torch.arange(N) % 2)[:, None].float(),
        "labels": torch.zeros(N, 1),
        "extra_continuous_covs": torch.randn(N, 1, generator=g),
    }


def loss_of(
    model: SAMSVAEModule,
    tensors: dict[str, torch.Tensor],
    cells: Any,
    sample: EffectSample,
    noise: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    **loss: Any,
) -> LossOutput:
    """Loss of some cells with the global draw and each cell's basal noise given."""
    part = {k: v[cells] for k, v in tensors.items()}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: noise[:, cells])
        _, _, out = model(part, inference_kwargs={"globals_": sample}, loss_kwargs={"n_obs": N, **loss})
    return out


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "normal"])
@pytest.mark.parametrize("global_kl", ["full", "plate"])
@pytest.mark.parametrize("n_particles", [1, 3])
def test_single_cell_batches_average_to_the_full_batch(
    tensors: dict, global_kl: str, n_particles: int, likelihood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = module(n_particles, global_kl=global_kl, gene_likelihood=likelihood)
    with torch.no_grad():
        sample, noise = model.effects.sample(n_particles), torch.randn(n_particles, N, LATENT)
        whole = loss_of(model, tensors, slice(None), sample, noise, monkeypatch)
        single = [loss_of(model, tensors, [i], sample, noise, monkeypatch) for i in range(N)]
    torch.testing.assert_close(torch.stack([s.loss for s in single]).mean(), whole.loss, rtol=1e-5, atol=1e-5)
    seen = slice(None) if global_kl == "full" else slice(0, 3)
    expected = sample.kl.mean(0)[seen].sum()
    torch.testing.assert_close(whole.kl_global_sum, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack([s.kl_global_sum for s in single]).mean(), expected, rtol=1e-5, atol=1e-5)


def test_both_global_terms_have_the_same_expectation(tensors: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    # over all minibatches of three of the cells, with every component seen
    tensors[PERTURBATION_REGISTRY_KEY] = torch.cat([DOSES[:, :3], torch.eye(N)[:, 8:]], 1)
    values = {}
    for global_kl in ("full", "plate"):
        model = module(global_kl=global_kl)
        model.cells_per_component[3] = 1.0
        torch.manual_seed(3)
        with torch.no_grad():
            sample, noise = model.effects.sample(1), torch.randn(1, N, LATENT)
            out = [loss_of(model, tensors, list(c), sample, noise, monkeypatch) for c in combinations(range(N), 3)]
        local = [(o.reconstruction_loss_sum + o.kl_local_sum) / 3 for o in out]
        values[global_kl] = torch.stack([o.loss - part for o, part in zip(out, local, strict=True)])
    torch.testing.assert_close(values["full"].mean(), values["plate"].mean(), rtol=1e-4, atol=1e-5)
    assert values["full"].std() < 1e-4
    assert values["plate"].std() > 0.1


@pytest.mark.parametrize("basal", ["mean_field", "correlated"])
@pytest.mark.parametrize("embedding", ["mean_field", "correlated"])
@pytest.mark.parametrize("global_kl", ["full", "plate"])
def test_loss_is_the_formula(
    tensors: dict, basal: str, embedding: str, global_kl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every term written out with scipy, cell by cell, component by component, in double precision."""
    model = module(2, basal_inference=basal, embedding_inference=embedding, global_kl=global_kl)
    with torch.no_grad():
        torch.manual_seed(9)
        sample, noise = model.effects.sample(2), torch.randn(2, N, LATENT)
        out = loss_of(model, tensors, slice(None), sample, noise, monkeypatch, kl_weight=0.3)
    w = {k: v.double().numpy() for k, v in model.state_dict().items()}
    x, doses = tensors["X"].double().numpy(), DOSES.double().numpy()
    one_hot = np.eye(2)[tensors["batch"][:, 0].long().numpy()]
    covariates = np.concatenate([one_hot, tensors["extra_continuous_covs"].double().numpy()], 1)

    def perceptron(name: str, v: np.ndarray) -> np.ndarray:
        def leaky(h: np.ndarray) -> np.ndarray:
            return np.where(h > 0, h, 0.01 * h)

        h = leaky(w[f"{name}.first.weight"] @ v + w[f"{name}.first.bias"])
        return h + leaky(w[f"{name}.rest.0.weight"] @ h + w[f"{name}.rest.0.bias"])

    reconstruction, local = np.zeros(N), np.zeros(N)
    for k in range(2):
        effect = sample.effect[k].double().numpy()
        for i in range(N):
            offset = sum(doses[i, t] * effect[t] for t in range(4))
            genes = (np.log1p(x[i]) - w["input_mean"]) / w["input_sd"]
            h = perceptron("encoder", np.concatenate([genes, offset if basal == "correlated" else [], covariates[i]]))
            mean = w["basal.mean.weight"] @ h + w["basal.mean.bias"]
            sd = np.sqrt(np.exp(w["basal.log_variance.weight"] @ h + w["basal.log_variance.bias"]) + 1e-4)
            z = mean + sd * noise[k, i].double().numpy() + offset
            logits = w["decoder.out.weight"] @ perceptron("decoder.mlp", np.concatenate([z, covariates[i]]))
            logits = logits + w["decoder.out.bias"]
            rho = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            mu, theta = x[i].sum() * rho + 1e-4, np.exp(w["decoder.log_scale"])
            reconstruction[i] -= stats.nbinom.logpmf(x[i], theta, theta / (theta + mu)).sum() / 2
            local[i] += (0.5 * (sd**2 + mean**2 - 1) - np.log(sd)).sum() / 2
    component = sample.kl.double().numpy().mean(0)
    counted = component if global_kl == "full" else component[:3]  # the component without cells
    np.testing.assert_allclose(out.reconstruction_loss_sum, reconstruction.sum(), rtol=1e-5)
    np.testing.assert_allclose(out.kl_local_sum, local.sum(), rtol=1e-5)
    np.testing.assert_allclose(out.kl_global_sum, counted.sum(), rtol=1e-5)
    kl = local.mean() + counted.sum() / N
    np.testing.assert_allclose(out.loss, reconstruction.mean() + 0.3 * kl, rtol=1e-5)
    np.testing.assert_allclose(out.extra_metrics["objective"], reconstruction.mean() + kl, rtol=1e-5)


@pytest.mark.parametrize("basal", ["mean_field", "correlated"])
def test_particles_equal_separate_draws(tensors: dict, basal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = module(4, basal_inference=basal)
    torch.manual_seed(2)
    sample, noise = model.effects.sample(4), torch.randn(4, N, LATENT)

    def gradient(out: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(out, list(model.parameters()), retain_graph=True))

    joint = loss_of(model, tensors, slice(None), sample, noise, monkeypatch).loss
    separate = torch.stack(
        [
            loss_of(
                model,
                tensors,
                slice(None),
                EffectSample(sample.effect[k : k + 1], sample.kl[k : k + 1]),
                noise[k : k + 1],
                monkeypatch,
            ).loss
            for k in range(4)
        ]
    ).mean()
    torch.testing.assert_close(joint, separate, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradient(joint), gradient(separate), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_components_without_cells_get_gradients_only_from_the_full_term(tensors: dict) -> None:
    for global_kl in ("full", "plate"):
        model = module(global_kl=global_kl, embedding_inference="mean_field")
        _, _, out = model(tensors, loss_kwargs={"n_obs": N})
        out.loss.backward()
        assert model.effects.mask_logits.grad is not None
        moved = model.effects.mask_logits.grad.abs().sum(1) > 0
        assert moved.tolist() == [True, True, True, global_kl == "full"]
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_dose_size_does_not_weigh_the_global_term(tensors: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = module(global_kl="plate")
    with torch.no_grad():
        sample, noise = model.effects.sample(1), torch.randn(1, N, LATENT)
        once = loss_of(model, tensors, [8], sample, noise, monkeypatch)
        tensors[PERTURBATION_REGISTRY_KEY] = (DOSES > 0).float()
        again = loss_of(model, tensors, [8], sample, noise, monkeypatch)
    torch.testing.assert_close(once.kl_global_sum, again.kl_global_sum)
    assert once.reconstruction_loss_sum != again.reconstruction_loss_sum
