"""References against independent formulas: scanpy's normalisation, scikit-learn's ridge, brute force, planted truth."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from sklearn.linear_model import Ridge

from pertvae import reference
from pertvae.reference._training import Training


def counts(seed=0):
    rng = np.random.default_rng(seed)
    cells = {"ctrl": 60, "A": 30, "B": 12, "C": 25, "D": 7, "A+B": 20, "B+C": 9, "C+D": 14, "D+E": 10}
    labels = np.repeat(list(cells), list(cells.values()))
    rate = {c: rng.lognormal(0, 0.7, 30) for c in [*"ABCDE"]}
    x = [
        rng.poisson(
            rng.lognormal(0, 0.3)
            * 2
            * np.prod([rate[c] for c in v.split("+") if c != "ctrl"] or [1], axis=0)
            * np.ones(30)
        )
        for v in labels
    ]
    return ad.AnnData(
        sp.csr_matrix(np.array(x, dtype=np.float32)),
        obs=pd.DataFrame({"p": labels}).set_index(pd.Index([f"c{i}" for i in range(len(labels))])),
    )


def scanpy_shifts(adata):
    y = adata.copy()
    y.X = y.X.astype(np.float64)
    sc.pp.normalize_total(y, target_sum=1e4)
    sc.pp.log1p(y)
    means = pd.DataFrame(y.X.toarray(), columns=y.var_names).groupby(adata.obs["p"].to_numpy()).mean()
    return means.drop(index="ctrl") - means.loc["ctrl"]


def test_additive_is_the_sum_of_scanpy_means():
    adata = counts()
    shifts = scanpy_shifts(adata)
    got = reference.Additive().fit(adata, "p", "ctrl").predict_shift(["A+B", "A+D", "C"])
    expected = np.stack([shifts.loc["A"] + shifts.loc["B"], shifts.loc["A"] + shifts.loc["D"], shifts.loc["C"]])
    np.testing.assert_allclose(got, expected, atol=1e-10)


@pytest.fixture(scope="module")
def problem():
    adata = counts()
    shifts = scanpy_shifts(adata)
    components = sorted({c for v in shifts.index for c in v.split("+")})
    x = np.array([[c in v.split("+") for c in components] for v in shifts.index], dtype=float)
    n = adata.obs["p"].value_counts()[shifts.index].to_numpy(dtype=float)
    return adata, shifts, components, x, n / n.mean()


@pytest.mark.parametrize("penalty", [0.01, 0.5, 5.0])
def test_ridge_is_the_ridge_of_scikit_learn(problem, penalty):
    adata, shifts, components, x, weight = problem
    fitted = reference.RidgeAdditive(penalty).fit(adata, "p", "ctrl")
    theirs = Ridge(alpha=penalty, fit_intercept=False).fit(x, shifts, sample_weight=weight)
    np.testing.assert_allclose(fitted.predict_shift(components), theirs.coef_.T, atol=1e-10)
    np.testing.assert_allclose(fitted.predict_shift(list(shifts.index)), theirs.predict(x), atol=1e-10)
    normal = np.linalg.solve(
        x.T @ (weight[:, None] * x) + penalty * np.eye(len(components)), x.T @ (weight[:, None] * shifts)
    )
    np.testing.assert_allclose(fitted.predict_shift(components), normal, atol=1e-10)


def test_ridge_of_conditions_that_share_nothing():
    adata = counts()
    adata = adata[~adata.obs["p"].isin(["B", "A+B", "B+C", "D"])].copy()  # A alone, C and C+D and D+E tied
    adata.obs["p"] = adata.obs["p"].replace({"A": "X+Y"})  # alone, and a combination
    shifts = scanpy_shifts(adata)
    components = sorted({c for v in shifts.index for c in v.split("+")})
    x = np.array([[c in v.split("+") for c in components] for v in shifts.index], dtype=float)
    n = adata.obs["p"].value_counts()[shifts.index].to_numpy(dtype=float)
    theirs = Ridge(alpha=0.7, fit_intercept=False).fit(x, shifts, sample_weight=n / n.mean())
    got = reference.RidgeAdditive(0.7).fit(adata, "p", "ctrl").predict_shift(components)
    np.testing.assert_allclose(got, theirs.coef_.T, atol=1e-10)


def test_the_penalty_is_that_of_brute_force_leave_one_out(problem):
    adata, shifts, _, x, weight = problem
    penalties = np.geomspace(1e-3, 1e2, 26)

    def error(penalty):
        total = 0.0
        for i in range(len(x)):
            rest = np.arange(len(x)) != i
            model = Ridge(alpha=penalty, fit_intercept=False).fit(
                x[rest], shifts.iloc[rest], sample_weight=weight[rest]
            )
            total += weight[i] * ((model.predict(x[[i]]) - shifts.iloc[i].to_numpy()) ** 2).sum()
        return total

    errors = [error(p) for p in penalties]
    fitted = reference.RidgeAdditive().fit(adata, "p", "ctrl")
    assert fitted.params_["penalty"] == pytest.approx(penalties[int(np.argmin(errors))])
    assert fitted.params_["loo_error"] == pytest.approx(min(errors), rel=1e-5)
    assert 0 < int(np.argmin(errors)) < 25


def planted(scale, rank, n_doubles, seed=0, genes=300, noise=0.15):
    """Shifts of 30 singles of the given rank, doubles at ``scale`` times the sum, all with noise."""
    rng = np.random.default_rng(seed)
    names = [f"g{i:02d}" for i in range(30)]
    signal = rng.normal(0, 1, (30, rank)) @ rng.normal(0, 0.5, (rank, genes))
    pairs = [tuple(sorted(rng.choice(names, 2, replace=False))) for _ in range(n_doubles)]
    place = {n: i for i, n in enumerate(names)}
    doubles = [scale * (signal[place[a]] + signal[place[b]]) for a, b in pairs]
    truth = np.concatenate([signal, np.reshape(doubles, (-1, genes))])
    halves = tuple(truth + rng.normal(0, noise * np.sqrt(2), truth.shape) for _ in range(2))
    parts = [(n,) for n in names] + pairs
    return Training(parts, np.full(len(parts), 100), (halves[0] + halves[1]) / 2, halves), signal


def fit_on(training, **kwargs):
    fitted = reference.CalibratedAdditive(**kwargs)
    fitted.params_ = {}
    fitted._fit(training)
    return fitted


@pytest.mark.parametrize(("scale", "rank"), [(0.8, 3), (1.0, 6), (0.6, 5)])
def test_planted_scale_and_rank_are_recovered(scale, rank):
    training, signal = planted(scale, rank, 25)
    fitted = fit_on(training)
    assert fitted.params_["chosen_by"] == "combinations"
    assert fitted.params_["rank"] == pytest.approx(rank, abs=1)
    assert fitted.params_["scale"] == pytest.approx(scale, abs=0.03)
    raw = training.shifts[:30]
    denoised = np.stack([fitted._shift((f"g{i:02d}",)) for i in range(30)])
    assert ((denoised - signal) ** 2).sum() < 0.5 * ((raw - signal) ** 2).sum()
    both = fitted._shift(("g00", "g01"))
    np.testing.assert_allclose(both, fitted.params_["scale"] * (denoised[0] + denoised[1]))


@pytest.mark.parametrize("rank", [2, 6])
def test_planted_rank_from_split_halves(rank):
    fitted = fit_on(planted(0.8, rank, 2)[0])
    assert fitted.params_["chosen_by"] == "split halves"
    assert fitted.params_["rank"] == pytest.approx(rank, abs=1)
    assert fitted.params_["scale"] == 1.0


def test_calibration_is_that_of_brute_force_leave_one_out():
    training, _ = planted(0.7, 4, 8, noise=0.5)
    singles, doubles = training.shifts[:30], training.shifts[30:]
    pairs = [[int(c[1:]) for c in parts] for parts in training.components[30:]]
    axes = np.linalg.svd(singles)[2]
    errors, scales = [], []
    for rank in range(1, 31):
        low = singles @ axes[:rank].T @ axes[:rank]
        sums = np.stack([low[a] + low[b] for a, b in pairs])
        error = 0.0
        for i in range(len(pairs)):
            rest = np.arange(len(pairs)) != i
            scale = (sums[rest] * doubles[rest]).sum() / (sums[rest] ** 2).sum()
            error += ((doubles[i] - scale * sums[i]) ** 2).sum()
        errors.append(error)
        scales.append((sums * doubles).sum() / (sums**2).sum())
    fitted = fit_on(training)
    assert fitted.params_["rank"] == int(np.argmin(errors)) + 1
    assert fitted.params_["scale"] == pytest.approx(scales[int(np.argmin(errors))])
    assert fit_on(training, max_rank=1).params_["rank"] == 1
