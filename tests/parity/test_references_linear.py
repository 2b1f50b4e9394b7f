"""Linear, PCA-space Additive and shifts of any values, against dense solutions computed independently."""

import contextlib

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from sklearn.decomposition import PCA

from pertvae import reference
from pertvae._expression import log1p_cp10k
from pertvae._labels import LabelFormat
from pertvae.reference import _pca
from pertvae.reference._training import Training, collect


def counts(seed=0, genes=30):
    rng = np.random.default_rng(seed)
    cells = {"ctrl": 60, "A": 30, "B": 12, "C": 25, "D": 7, "A+B": 20, "B+C": 9, "C+D": 14, "D+E": 10}
    labels = np.repeat(list(cells), list(cells.values()))
    rate = {c: rng.lognormal(0, 0.7, genes) for c in [*"ABCDE"]} | {"ctrl": np.ones(genes)}
    means = [np.prod([rate[c] for c in v.split("+")], axis=0) * rng.lognormal(np.log(2), 0.3) for v in labels]
    x = rng.poisson(means)
    return ad.AnnData(
        sp.csr_matrix(x.astype(np.float32)),
        obs=pd.DataFrame(
            {"p": labels, "cell": rng.choice([*"xyz"], len(labels))}, index=[f"c{i}" for i in range(len(labels))]
        ),
        var=pd.DataFrame(index=[*"ABCDE", *(f"g{i}" for i in range(genes - 5))]),
    )


def normalised(adata):
    y = adata.copy()
    y.X = y.X.astype(np.float64)
    sc.pp.normalize_total(y, target_sum=1e4)
    sc.pp.log1p(y)
    return pd.DataFrame(y.X.toarray(), columns=y.var_names, index=y.obs_names)


def bilinear(y, g, p, penalty):
    """Return W of the ridge problem of both sides, as one least-squares problem on the Kronecker product.

    (G'G + a) W (P'P + a) = G'YP are the normal equations of rows G over sqrt(a) I, columns P over sqrt(a) I, and Y
    filled up with zeros.
    """
    k, features = g.shape[1], p.shape[1]
    tall_g = np.vstack([g, np.sqrt(penalty) * np.eye(k)])
    tall_p = np.vstack([p, np.sqrt(penalty) * np.eye(features)])
    filled = np.zeros((len(tall_g), len(tall_p)))
    filled[: y.shape[0], : y.shape[1]] = y
    # vec of columns: vec(G W P') = (P kron G) vec W
    w = np.linalg.lstsq(np.kron(tall_p, tall_g), filled.ravel(order="F"), rcond=None)[0]
    return w.reshape((k, features), order="F")


@pytest.mark.parametrize("kind", ["given", "own genes", "indicators"])
@pytest.mark.parametrize(("k", "penalty"), [(4, 0.1), (2, 3.0), (8, 1e-3)])
def test_linear_is_the_dense_solution(kind, k, penalty):
    adata = counts()
    profiles = normalised(adata).groupby(adata.obs["p"]).mean()
    control, conditions = profiles.loc["ctrl"].to_numpy(), profiles.drop(index="ctrl")
    y = conditions.to_numpy().T  # genes x conditions, profiles and not shifts
    b = y.mean(axis=1, keepdims=True)
    pca = PCA(k, svd_solver="full").fit((y - b).T)
    g = pca.components_.T * pca.singular_values_
    rng = np.random.default_rng(3)
    embedding = {
        "given": pd.DataFrame(rng.normal(0, 2, (6, 3)), index=[*"ABCDEZ"]),
        "own genes": pd.DataFrame(g, index=adata.var_names),
        "indicators": pd.DataFrame(np.eye(5), index=[*"ABCDE"]),
    }[kind]
    p = np.stack([embedding.loc[v.split("+")].sum(axis=0) for v in conditions.index])
    w = bilinear(y - b, g, p, penalty)

    features = embedding if kind == "given" else kind
    fitted = reference.Linear(features, n_components=k, penalty=penalty).fit(adata, "p", "ctrl")
    asked = [*conditions.index, "A+D", "C+E"] + (["Z", "A+Z"] if kind == "given" else [])
    rows = np.stack([embedding.loc[v.split("+")].sum(axis=0) for v in asked])
    expected = (g @ w @ rows.T + b).T - control
    np.testing.assert_allclose(fitted.predict_shift(asked), expected, atol=1e-8)
    assert fitted.params_["features"] == kind
    assert np.abs(g @ w @ rows.T).max() > 0.05  # something was learned


def test_linear_recovers_a_planted_model_exactly():
    """Without noise and with hardly a penalty the prediction of held-out perturbations is the truth; large, too.

    The mean of Y is b where the features have the mean zero.
    """
    rng = np.random.default_rng(0)
    for n, genes in ((25, 40), (620, 700)):  # in full, and by iteration
        features = pd.DataFrame(rng.normal(0, 1, (n + 5, 6)), index=[f"P{i}" for i in range(n + 5)])
        features -= features.iloc[:n].mean()
        truth = features.to_numpy() @ rng.normal(0, 1, (6, 3)) @ rng.normal(0, 1, (3, genes)) + rng.normal(0, 1, genes)
        parts = [(name,) for name in features.index[:n]]
        fitted = reference.Linear(features, n_components=10, penalty=1e-9)
        fitted.params_, fitted._var = {}, pd.DataFrame(index=[f"g{i}" for i in range(genes)])
        fitted._fit(Training(parts, np.ones(n), truth[:n], None))
        assert fitted.params_["n_components"] == 3
        got = np.stack([fitted._shift((name,)) for name in features.index[n:]])
        np.testing.assert_allclose(got, truth[n:], atol=1e-6)


def test_own_genes_predict_a_perturbation_that_was_never_done():
    """Every perturbation moves its own gene and, through the same factors, others: unseen ones follow from the gene."""
    rng = np.random.default_rng(1)
    genes = [f"g{i}" for i in range(120)]
    loading = rng.normal(0, 1, (120, 3))
    truth = loading @ np.diag([2.0, 1.0, 0.7]) @ loading.T  # gene x perturbation of that gene
    order = rng.permutation(120)
    seen, new = order[:60], order[60:]
    parts = [(genes[i],) for i in seen]
    observed = truth[:, seen].T + rng.normal(0, 0.3, (60, 120))
    fitted = reference.Linear(n_components=3)
    fitted.params_, fitted._var = {}, pd.DataFrame(index=genes)
    fitted._fit(Training(parts, np.ones(60), observed, None))
    assert fitted.params_["features"] == "own genes"
    got = np.stack([fitted._shift((genes[i],)) for i in new])
    mean = observed.mean(axis=0)
    assert np.linalg.norm(got - truth[:, new].T) < 0.2 * np.linalg.norm(mean - truth[:, new].T)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_additive_in_pca_space_adds_means_of_scores(k):
    """Scores of cells by a full decomposition; their means are subtracted and added, then taken back to genes."""
    adata = counts()
    y = normalised(adata)
    pca = PCA(k, svd_solver="full").fit(y)
    scores = pd.DataFrame(pca.transform(y)).groupby(adata.obs["p"].to_numpy()).mean()
    single = scores - scores.loc["ctrl"]
    asked = {"A+B": "AB", "A+D": "AD", "C": "C", "A+B+C": "ABC"}
    expected = np.stack([single.loc[list(v)].sum(axis=0) @ pca.components_ for v in asked.values()])
    fitted = reference.Additive("pca", n_components=k).fit(adata, "p", "ctrl")
    np.testing.assert_allclose(fitted.predict_shift(list(asked)), expected, atol=1e-8)
    assert fitted.params_ == {"n_singles": 4, "space": "pca", "n_components": k, "n_cells": adata.n_obs}
    raw = reference.Additive().fit(adata, "p", "ctrl").predict_shift(list(asked)).to_numpy()
    assert np.abs(raw - expected).max() > 0.1  # a projection that does something


def test_principal_components_denoise_singles():
    """Few cells of perturbations whose effects share three directions: truth is known."""
    rng = np.random.default_rng(0)
    base, programs = rng.normal(1, 0.7, 150), rng.normal(0, 0.6, (3, 150))
    weights = {f"P{i}": rng.normal(0, 1, 3) for i in range(20)}
    rates = {"ctrl": np.exp(base)} | {n: np.exp(base + w @ programs) for n, w in weights.items()}
    n_cells = {"ctrl": 400} | dict.fromkeys(weights, 15)
    labels = np.repeat(list(n_cells), list(n_cells.values()))
    x = sp.csr_matrix(rng.poisson(np.stack([rates[v] for v in labels])).astype(np.float32))
    adata = ad.AnnData(x, obs=pd.DataFrame({"p": labels}, index=[f"c{i}" for i in range(len(labels))]))

    def profile(rate):
        return log1p_cp10k(rng.poisson(rate, (4000, 150))).mean(axis=0)

    truth = np.stack([profile(rates[n]) for n in weights]) - profile(rates["ctrl"])
    errors = [
        np.linalg.norm(make.fit(adata, "p", "ctrl").predict_shift(list(weights)) - truth)
        for make in (reference.Additive("pca", n_components=4), reference.Additive())
    ]
    assert errors[0] < 0.75 * errors[1]


def test_the_number_of_components_is_capped(monkeypatch):
    adata = counts()
    fitted = reference.Additive("pca", n_components=500).fit(adata, "p", "ctrl")
    assert fitted.params_["n_components"] == 29  # of 30 genes
    monkeypatch.setattr("pertvae.reference._means.MAX_PCA_CELLS", 20)
    few = [reference.Additive("pca", n_components=5).fit(adata, "p", "ctrl", seed=s) for s in (0, 0, 1)]
    assert few[0].params_["n_cells"] == 20
    a, b, c = (f.predict_shift("A").to_numpy() for f in few)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    for bad in ({"space": "latent"}, {"space": "pca", "n_components": 0}):
        with pytest.raises(ValueError, match="pass"):
            reference.Additive(**bad)


def test_both_ways_to_principal_components_agree(monkeypatch):
    x = np.random.default_rng(0).normal(0, 1, (60, 8)) @ np.random.default_rng(1).normal(0, 1, (8, 40))
    axes, s = _pca.principal_components(x, 5, 0)
    monkeypatch.setattr(_pca, "SMALL", 10)
    for other in (x, sp.csr_matrix(x)):
        found, values = _pca.principal_components(other, 5, 0)
        np.testing.assert_allclose(values, s, rtol=1e-8)
        np.testing.assert_allclose(found.T @ found, axes.T @ axes, atol=1e-8)
        assert len(_pca.principal_components(other, 30, 0)[1]) == 8  # its rank


@pytest.mark.parametrize("labels_key", [None, "cell"])
def test_shifts_of_any_values_are_those_of_profiles(labels_key):
    """log1p CP10k of the cells, handed in as any values, gives the shifts of the profiles, contexts and all."""
    adata = counts()
    adata.obs["cell"] = np.where((adata.obs["p"] == "ctrl") & (adata.obs["cell"] == "z"), "x", adata.obs["cell"])
    rows = np.sort(np.random.default_rng(0).choice(adata.n_obs, 150, replace=False))
    with pytest.warns(UserWarning, match="'z'") if labels_key else contextlib.nullcontext():
        training, _ = collect(
            adata, "p", LabelFormat.create("ctrl"), rows, layer=None, labels_key=labels_key, covariates=[], seed=0,
            needs_perturbed=True, halves=False, cells=True,
        )  # fmt: skip
    values = log1p_cp10k(training.cells.read()).toarray()
    np.testing.assert_allclose(training.cells.shifts(values), training.shifts, atol=1e-12)
    # and by pandas
    obs, y = adata.obs.iloc[rows], normalised(adata).iloc[rows]
    controls = y[(obs["p"] == "ctrl").to_numpy()]
    if labels_key:
        by_context = controls.groupby(obs["cell"]).mean().reindex([*"xyz"]).fillna(controls.mean())
        y = y - by_context.loc[obs["cell"]].to_numpy()
    else:
        y = y - controls.mean()
    expected = y.groupby(obs["p"]).mean().loc[["+".join(p) for p in training.components]]
    np.testing.assert_allclose(training.shifts, expected, atol=1e-10)
