"""Importance-weighted log-likelihoods against exact ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from scipy import stats
from scipy.special import logsumexp

import pertvae as pv

LABELS = ["control"] * 4 + ["A"] * 3 + ["B"] * 2 + ["A+B"] * 3


def linear_gaussian(basal_inference: str = "correlated") -> tuple[pv.SAMSVAE, dict[str, Any]]:
    """A SAMS-VAE that is linear and Gaussian, with the exact posterior of the basal state in its encoder.

    The perceptrons become linear by a bias that keeps every hidden unit positive; with orthogonal loadings and one
    noise variance the posterior has a diagonal covariance, as the encoder's has.
    """
    rng = np.random.default_rng(0)
    n_genes, n_latent, bias, sigma = 6, 2, 20.0, 0.8
    loadings = np.linalg.qr(rng.standard_normal((n_genes, n_latent)))[0] * [1.5, 0.7]
    baseline = rng.standard_normal(n_genes)
    adata = AnnData(rng.standard_normal((len(LABELS), n_genes)).astype(np.float32) * 2)
    adata.obs["perturbation"] = LABELS
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", is_count_data=False)
    model = pv.SAMSVAE(
        adata,
        n_latent=n_latent,
        n_hidden=n_latent,
        gene_likelihood="normal",
        embedding_inference="mean_field",
        basal_inference=basal_inference,  # type: ignore[arg-type]
    )
    m = model.module
    variance = 1 / (1 + (loadings**2).sum(0) / sigma**2)
    gain = (variance / sigma**2)[:, None] * loadings.T
    truth = {
        "inclusion": np.array([[0.8, 0.1], [0.3, 0.6]]),
        "loc": np.array([[1.5, -1.0], [0.5, 2.0]]),
        "sd": np.array([[0.4, 0.9], [0.2, 0.5]]),
        "loadings": loadings,
        "baseline": baseline,
        "sigma": sigma,
    }

    def put(parameter: torch.Tensor | None, value: Any) -> None:
        assert parameter is not None
        parameter.data.copy_(torch.as_tensor(np.asarray(value), dtype=torch.float32).expand_as(parameter))

    put(m.decoder.mlp.first.weight, np.eye(n_latent))
    put(m.decoder.mlp.first.bias, bias)
    put(m.decoder.out.weight, loadings)
    put(m.decoder.out.bias, baseline - loadings @ np.full(n_latent, bias))
    put(m.decoder.log_scale, np.log(sigma))
    reads_offset = basal_inference == "correlated"
    put(m.encoder.first.weight, np.concatenate([gain, -gain @ loadings], 1) if reads_offset else gain)
    put(m.encoder.first.bias, bias - gain @ baseline)
    put(m.basal.mean.weight, np.eye(n_latent))
    put(m.basal.mean.bias, -bias)
    put(m.basal.log_variance.weight, 0.0)
    put(m.basal.log_variance.bias, np.log(variance - 1e-4))
    put(m.effects.mask_logits, np.log(truth["inclusion"] / (1 - truth["inclusion"])))
    put(m.effects.loc, truth["loc"])
    put(m.effects.log_sd, np.log(truth["sd"] - 1e-4))
    model.is_trained_ = True
    return model, truth


def exact_log_likelihood(x: np.ndarray, doses: np.ndarray, truth: dict[str, Any]) -> float:
    """Log p(x) by enumeration of the masks of two components and two latents."""
    terms = []
    for bits in np.ndindex(2, 2, 2, 2):
        mask = np.array(bits, dtype=float).reshape(2, 2)
        p = truth["inclusion"]
        log_weight = np.log(np.where(mask == 1, p, 1 - p)).sum()
        shift = doses @ (mask * truth["loc"])
        variance = 1 + doses**2 @ (mask * truth["sd"] ** 2)
        w = truth["loadings"]
        covariance = w @ np.diag(variance) @ w.T + truth["sigma"] ** 2 * np.eye(len(w))
        terms.append(log_weight + stats.multivariate_normal.logpdf(x, truth["baseline"] + w @ shift, covariance))
    return float(logsumexp(terms))


def test_linear_gaussian_model_has_its_exact_likelihood() -> None:
    model, truth = linear_gaussian()
    adata = model.adata
    doses = adata.obsm["_scvi_perturbation"].toarray().astype(float)
    exact = np.array([exact_log_likelihood(x, d, truth) for x, d in zip(adata.X.astype(float), doses, strict=True)])
    control = np.asarray(LABELS) == "control"
    # with the exact posterior every weight of a control is p(x): one draw is enough
    one = model.get_marginal_ll(n_mc_samples=1, return_mean=False).numpy()
    np.testing.assert_allclose(one[control], exact[control], atol=1e-3)
    many = model.get_marginal_ll(n_mc_samples=20_000, n_mc_samples_per_pass=500, return_mean=False).numpy()
    np.testing.assert_allclose(many, exact, atol=0.1)
    assert np.abs(one[~control] - exact[~control]).max() > 0.3  # so that the draws of M and E are needed


def test_a_worse_posterior_gives_the_same_likelihood() -> None:
    model, truth = linear_gaussian("mean_field")
    with torch.no_grad():
        model.module.basal.log_variance.bias.fill_(0.7)
    doses = model.adata.obsm["_scvi_perturbation"].toarray().astype(float)
    exact = [exact_log_likelihood(x, d, truth) for x, d in zip(model.adata.X.astype(float), doses, strict=True)]
    many = model.get_marginal_ll(n_mc_samples=30_000, n_mc_samples_per_pass=1000, return_mean=False).numpy()
    np.testing.assert_allclose(many[:4], exact[:4], atol=0.1)


@pytest.fixture(scope="module")
def counts_model() -> pv.SAMSVAE:
    """One latent, counts, weights as initialised but larger."""
    rng = np.random.default_rng(1)
    adata = AnnData(sp.csr_matrix(rng.poisson(4.0, (len(LABELS), 7)).astype(np.float32)))
    adata.obs["perturbation"] = LABELS
    adata.obs["batch"] = pd.Categorical(np.where(np.arange(len(LABELS)) % 2, "x", "y"))
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", batch_key="batch")
    torch.manual_seed(0)
    model = pv.SAMSVAE(adata, n_latent=1, n_hidden=6, embedding_inference="mean_field")
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.3 * torch.randn(p.shape))
        model.module.basal.log_variance.bias.fill_(0.3)
    model.is_trained_ = True
    return model


def test_counts_match_quadrature(counts_model: pv.SAMSVAE) -> None:
    """Controls: integral over z. Perturbed: also over each effect, and a sum over masks."""
    module = counts_model.module
    x = torch.as_tensor(counts_model.adata.X.toarray())
    doses = counts_model.adata.obsm["_scvi_perturbation"].toarray()
    batch = torch.as_tensor(counts_model.adata.obs["_scvi_batch"].to_numpy().copy())
    grid = np.linspace(-14.0, 14.0, 2001)
    covariates = torch.nn.functional.one_hot(batch.long(), 2).float()
    p = torch.sigmoid(module.effects.mask_logits).detach().numpy().ravel()
    loc = module.effects.loc.detach().numpy().ravel()
    sd = np.exp(module.effects.log_sd.detach().numpy().ravel()) + 1e-4
    exact = []
    for i in range(len(x)):
        z = torch.as_tensor(grid, dtype=torch.float32)[:, None, None]
        with torch.no_grad():
            px = module.decoder(z, covariates[i : i + 1], x[i].sum().reshape(1, 1))
            mean, theta = px.mean[:, 0].double().numpy(), module.decoder.scale.double().numpy()
        log_p = stats.nbinom.logpmf(x[i].numpy(), theta, theta / (theta + mean)).sum(-1)
        # z is Gaussian given the mask: N(sum m d loc, 1 + sum m d^2 sd^2)
        terms = []
        for mask in np.ndindex(2, 2):
            used = np.asarray(mask) * (doses[i] != 0)
            weight = np.prod(np.where(np.asarray(mask) == 1, p, 1 - p))
            variance = 1 + (used * (doses[i] * sd) ** 2).sum()
            prior = stats.norm.logpdf(grid, (used * doses[i] * loc).sum(), np.sqrt(variance))
            terms.append(np.log(weight) + logsumexp(log_p + prior) + np.log(grid[1] - grid[0]))
        exact.append(logsumexp(terms))
    estimate = counts_model.get_marginal_ll(n_mc_samples=30_000, n_mc_samples_per_pass=1000, return_mean=False)
    np.testing.assert_allclose(estimate.numpy(), exact, atol=0.05)


def test_mean_batch_size_and_seed(counts_model: pv.SAMSVAE) -> None:
    each = counts_model.get_marginal_ll(n_mc_samples=25, return_mean=False)
    assert each.shape == (len(LABELS),)
    assert counts_model.get_marginal_ll(n_mc_samples=25) == pytest.approx(float(each.mean()), rel=1e-6)
    assert torch.equal(each, counts_model.get_marginal_ll(n_mc_samples=25, return_mean=False, batch_size=1))
    assert torch.equal(each, counts_model.get_marginal_ll(n_mc_samples=25, return_mean=False, batch_size=3))
    assert not torch.equal(each, counts_model.get_marginal_ll(n_mc_samples=25, return_mean=False, seed=1))


def test_cells_come_back_in_the_order_asked(counts_model: pv.SAMSVAE) -> None:
    order = np.random.default_rng(0).permutation(len(LABELS))
    each = counts_model.get_marginal_ll(n_mc_samples=25, return_mean=False)
    assert torch.equal(counts_model.get_marginal_ll(indices=order, n_mc_samples=25, return_mean=False), each[order])


def test_batches_of_many_blocks(counts_model: pv.SAMSVAE) -> None:
    # more than one inner block of 128 cells: the ragged last batch weighs as many cells as it has
    rows = np.arange(300) % len(LABELS)
    obs = counts_model.adata.obs.iloc[rows].set_axis([f"cell{i}" for i in range(300)])
    adata = AnnData(counts_model.adata.X[rows], obs=obs)
    each = counts_model.get_marginal_ll(adata, n_mc_samples=5, return_mean=False)
    for size in (1, 128, 256, 10_000):
        again = counts_model.get_marginal_ll(adata, n_mc_samples=5, return_mean=False, batch_size=size)
        assert torch.equal(each, again)
        mean = counts_model.get_marginal_ll(adata, n_mc_samples=5, batch_size=size)
        assert mean == pytest.approx(float(each.mean()))


def test_bound_tightens_and_starts_at_the_elbo(counts_model: pv.SAMSVAE) -> None:
    def mean(n: int, seeds: int) -> tuple[float, float]:
        values = [counts_model.get_marginal_ll(n_mc_samples=n, seed=s) for s in range(seeds)]
        return float(np.mean(values)), float(np.std(values) / np.sqrt(seeds))

    one, error_one = mean(1, 150)
    ten, error_ten = mean(10, 40)
    many, _ = mean(300, 5)
    assert one + 2 * error_one < ten - 2 * error_ten
    assert ten + error_ten < many
    # with one draw the expectation is the ELBO without its global term, which is what scvi-tools' get_elbo is
    torch.manual_seed(0)
    elbo = [float(counts_model.get_elbo()) for _ in range(150)]
    assert np.mean(elbo) == pytest.approx(one, abs=4 * (error_one + np.std(elbo) / np.sqrt(150)))
