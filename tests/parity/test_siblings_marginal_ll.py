"""Importance-weighted log-likelihoods of SVAE+ and the conditional VAE against exact ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import stats
from scipy.special import logsumexp

import pertvae as pv

LABELS = ["control"] * 4 + ["A"] * 3 + ["B"] * 2 + ["A+B"] * 3
GENES, LATENT, BIAS, SIGMA = 6, 2, 20.0, 0.8


def put(parameter: torch.Tensor | None, value: Any) -> None:
    assert parameter is not None
    parameter.data.copy_(torch.as_tensor(np.asarray(value), dtype=torch.float32).expand_as(parameter))


def linear_gaussian(cls: Any, **arguments: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """A model that is linear and Gaussian: ``x = baseline + W z + doses`` and the doses' own loadings.

    The perceptrons become linear by a bias that keeps every hidden unit positive; hidden units 0 and 1 are the latents,
    2 and 3 are free. With orthogonal loadings and one noise variance the posterior has a diagonal covariance, as the
    encoder's has; the encoder is the exact posterior of a cell without perturbation.
    """
    rng = np.random.default_rng(0)
    loadings = np.linalg.qr(rng.standard_normal((GENES, LATENT)))[0] * [1.5, 0.7]
    free = rng.standard_normal((GENES, 2))
    baseline = rng.standard_normal(GENES)
    adata = AnnData(rng.standard_normal((len(LABELS), GENES)).astype(np.float32) * 2)
    adata.obs["perturbation"] = LABELS
    cls.setup_anndata(adata, perturbation_key="perturbation", control="control", is_count_data=False)
    model = cls(adata, n_latent=LATENT, n_hidden=4, gene_likelihood="normal", **arguments)
    m = model.module
    variance = 1 / (1 + (loadings**2).sum(0) / SIGMA**2)
    gain = (variance / SIGMA**2)[:, None] * loadings.T
    both = np.concatenate([loadings, free], 1)
    put(m.decoder.mlp.first.weight[:, :LATENT], np.eye(4)[:, :LATENT])
    put(m.decoder.mlp.first.bias, BIAS)
    put(m.decoder.out.weight, both)
    put(m.decoder.out.bias, baseline - both @ np.full(4, BIAS))
    put(m.decoder.log_scale, np.log(SIGMA))
    put(m.encoder.first.weight[:, :GENES], np.concatenate([gain, np.zeros((2, GENES))]))
    put(m.encoder.first.bias, BIAS - np.concatenate([gain @ baseline, [0, 0]]))
    put(m.head.mean.weight, np.eye(4)[:LATENT])
    put(m.head.mean.bias, -BIAS)
    put(m.head.log_variance.weight, 0.0)
    put(m.head.log_variance.bias, np.log(variance - 1e-4))
    model.is_trained_ = True
    return model, loadings, baseline, both


def covariance(loadings: np.ndarray) -> np.ndarray:
    return loadings @ loadings.T + SIGMA**2 * np.eye(GENES)


def data(model: Any) -> tuple[np.ndarray, np.ndarray]:
    return model.adata.X.astype(float), model.adata.obsm["_scvi_perturbation"].toarray().astype(float)


@pytest.mark.parametrize("combinations", ["sum", "unique"])
@pytest.mark.parametrize("mask_draws", ["component", "cell"])
def test_svaeplus_has_its_exact_likelihood(combinations: str, mask_draws: str) -> None:
    model, loadings, baseline, _ = linear_gaussian(pv.SVAEPlus, combinations=combinations, mask_draws=mask_draws)
    rng = np.random.default_rng(1)
    rows = len(model.module.mu)
    inclusion, mu = rng.uniform(0.1, 0.9, (rows, LATENT)), rng.normal(0, 1.5, (rows, LATENT))
    put(model.module.mask_logits, np.log(inclusion / (1 - inclusion)))
    put(model.module.mu, mu)
    x, doses = data(model)
    if combinations == "unique":
        conditions = list(model.get_perturbation_programs(key_added=None).effects.index)
        doses = np.array([[float(label == c) for c in conditions] for label in LABELS])
    exact = []
    for cell, d in zip(x, doses, strict=True):
        terms = []
        for bits in np.ndindex(*(2,) * (rows * LATENT)):
            mask = np.array(bits, dtype=float).reshape(rows, LATENT)
            mean = baseline + loadings @ (d @ (mask * mu))
            log_p = stats.multivariate_normal.logpdf(cell, mean, covariance(loadings))
            terms.append(np.log(np.where(mask == 1, inclusion, 1 - inclusion)).sum() + log_p)
        exact.append(logsumexp(terms))
    control = np.asarray(LABELS) == "control"
    # with the exact posterior every weight of a control is p(x): one draw is enough
    one = model.get_marginal_ll(n_mc_samples=1, return_mean=False).numpy()
    np.testing.assert_allclose(one[control], np.array(exact)[control], atol=1e-3)
    many = model.get_marginal_ll(n_mc_samples=20_000, n_mc_samples_per_pass=1000, return_mean=False).numpy()
    np.testing.assert_allclose(many, exact, atol=0.15)
    assert np.abs(one[~control] - np.array(exact)[~control]).max() > 0.3


def test_conditional_vae_has_its_exact_likelihood() -> None:
    """Its posterior reads the doses: exact for every cell, so one draw is enough."""
    model, loadings, baseline, both = linear_gaussian(pv.ConditionalVAE)
    m = model.module
    rng = np.random.default_rng(1)
    effects = rng.normal(0, 1.5, (2, 4))  # of doses on hidden units: through the latents' loadings and the free ones
    put(m.decoder.mlp.first.weight[:, LATENT:], np.eye(4))
    put(m.decoder_doses, effects)
    variance = 1 / (1 + (loadings**2).sum(0) / SIGMA**2)
    gain = (variance / SIGMA**2)[:, None] * loadings.T
    put(m.encoder.first.weight[:, GENES:], np.eye(4))
    put(m.encoder_doses, np.concatenate([-(effects @ both.T) @ gain.T, np.zeros((2, 2))], 1))
    x, doses = data(model)
    exact = [
        stats.multivariate_normal.logpdf(cell, baseline + both @ (d @ effects), covariance(loadings))
        for cell, d in zip(x, doses, strict=True)
    ]
    one = model.get_marginal_ll(n_mc_samples=1, return_mean=False).numpy()
    np.testing.assert_allclose(one, exact, atol=2e-3)
    # a worse posterior tends to the same
    m.head.log_variance.bias.data.fill_(0.7)
    many = model.get_marginal_ll(n_mc_samples=20_000, n_mc_samples_per_pass=1000, return_mean=False).numpy()
    np.testing.assert_allclose(many, exact, atol=0.1)


@pytest.mark.parametrize("cls", [pv.SVAEPlus, pv.ConditionalVAE])
def test_bound_tightens_and_starts_at_the_elbo(cls: Any) -> None:
    model, *_ = linear_gaussian(cls)
    model.module.head.log_variance.bias.data.fill_(0.7)
    one = [model.get_marginal_ll(n_mc_samples=1, seed=s) for s in range(200)]
    error = np.std(one) / np.sqrt(len(one))
    assert model.get_marginal_ll(n_mc_samples=300) > np.mean(one) + 4 * error
    torch.manual_seed(0)
    elbo = [float(model.get_elbo()) for _ in range(200)]
    assert np.mean(elbo) == pytest.approx(np.mean(one), abs=4 * (error + np.std(elbo) / np.sqrt(200)))
