"""Sizes of held-out conditions, controls of the scores, and what is read off them."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

import pertvae as pv
from pertvae.benchmark._duplicate import _interpolated
from pertvae.benchmark._strata import stratified

ARGUMENTS = ("unseen_combination", "perturbation", "control")
N_GENES = 80


def drawn(rng, rate, n):
    return rng.poisson(800 * np.exp(rate) / np.exp(rate).sum(), size=(n, N_GENES))


def log_mean(x):
    x = np.asarray(x.toarray() if sp.issparse(x) else x, dtype=float)
    return np.log1p(x / x.sum(axis=1, keepdims=True) * 1e4).mean(axis=0)


@pytest.fixture(scope="module")
def doubles():
    """Poisson cells whose log rates say by how much each double moves, and by how much it is not additive."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.3, N_GENES)
    names = [f"P{i}" for i in range(6)]
    effects = {p: np.where(rng.random(N_GENES) < 0.3, rng.normal(0, 0.8, N_GENES), 0.0) for p in names}
    extra = np.where(rng.random(N_GENES) < 0.3, rng.normal(0, 1.5, N_GENES), 0.0)
    rates = {"control": base, **{p: base + e for p, e in effects.items()}}
    for i, (a, b) in enumerate([(0, 1), (2, 3), (4, 5), (0, 2), (1, 4), (3, 5)]):
        apart = extra if i >= 3 else 0.0
        rates[f"P{a}+P{b}"] = base + effects[f"P{a}"] + effects[f"P{b}"] + apart
    x, labels = [], []
    for label, rate in rates.items():
        n = 600 if label == "control" else 150
        x.append(drawn(rng, rate, n))
        labels += [label] * n
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    adata = AnnData(
        sp.csr_matrix(np.concatenate(x), dtype=np.float32), obs, pd.DataFrame(index=map(str, range(N_GENES)))
    )
    adata.uns["expected"] = {label: log_mean(drawn(rng, rate, 20_000)) for label, rate in rates.items()}
    return adata


@pytest.fixture(scope="module")
def result(doubles):
    references = ["NoChange", "Mean", "MatchingMean", "Additive"]
    return pv.benchmark.run(doubles, [], *ARGUMENTS, n_folds=1, progress=False, references=references)


def test_sizes_are_those_of_the_truth(result, doubles):
    units = result.units.set_index("condition")
    assert list(units.index) == sorted(c for c in doubles.obs["perturbation"].unique() if "+" in c)
    observed = {c: log_mean(doubles.X[(doubles.obs["perturbation"] == c).to_numpy()]) for c in doubles.uns["expected"]}
    for label, row in units.iterrows():
        a, b = label.split("+")
        length = {}
        for name, mean in (("expected", doubles.uns["expected"]), ("observed", observed)):
            shift = {c: mean[c] - mean["control"] for c in (label, a, b)}
            length[name] = [np.linalg.norm(shift[label]), np.linalg.norm(shift[label] - shift[a] - shift[b])]
        assert row["effect_size"] == pytest.approx(length["expected"][0], rel=0.04)
        # where the truth is nearly additive most of the plain length is sampling noise, and that is not counted
        assert row["non_additivity"] == pytest.approx(length["expected"][1], abs=0.35)
        if label not in ("P0+P2", "P1+P4", "P3+P5"):
            assert length["observed"][1] > length["expected"][1] + 0.05
    assert (units["n_observed"] == 150).all()


def test_strata_follow_non_additivity(result):
    table = result.strata("l2_profile", by="non_additivity")
    additive = table[table["model"] == "Additive"].set_index("stratum")
    assert list(additive.index) == ["small", "large"]
    assert (additive["n_conditions"] == 3).all()
    assert additive.loc["large", "value"] > 3 * additive.loc["small", "value"]
    matrix = result.by_condition("l2_profile")["Additive"]
    assert additive.loc["large", "value"] == pytest.approx(matrix[["P0+P2", "P1+P4", "P3+P5"]].mean())
    assert additive.loc["small", "largest"] <= additive.loc["large", "smallest"]
    with pytest.raises(ValueError, match="'effect_size'"):
        result.strata(by="effect")


def test_few_conditions_are_not_divided():
    values = pd.DataFrame({"a": range(5)}, index=list("abcde"), dtype=float)
    assert stratified(values, pd.Series(range(5), index=list("abcde"))).empty
    nine = pd.DataFrame({"a": np.arange(10.0)}, index=list("abcdefghij"))
    table = stratified(nine, pd.Series([*np.arange(9.0)[::-1], np.nan], index=nine.index))
    assert list(table["stratum"]) == ["small", "medium", "large"]
    assert list(table["value"]) == [7.0, 4.0, 1.0]


def test_interpolated_duplicate_is_the_formula():
    rng = np.random.default_rng(1)
    x = sp.csr_matrix(rng.poisson(3, size=(40, 5)).astype(np.float32))
    y = np.log1p(x.toarray() / x.sum(axis=1) * 1e4)
    center = np.asarray(y.mean(axis=0)).ravel() + [0.0, 0.05, 0.5, -2.0, 0.1]
    from scipy import stats

    p = stats.ttest_1samp(np.asarray(y), center, axis=0).pvalue
    np.testing.assert_allclose(_interpolated(x, center), (1 - p) * np.asarray(y.mean(axis=0)).ravel() + p * center)
    silent = sp.csr_matrix((10, 5), dtype=np.float32)
    np.testing.assert_array_equal(_interpolated(silent, center), center)


def test_interpolated_duplicate_beats_the_plain_one_where_effects_are_small(doubles):
    """With many genes that do not move, what is not certain is better taken from the mean."""
    rng = np.random.default_rng(2)
    weak = AnnData(doubles.X.copy(), doubles.obs.copy(), doubles.var.copy())
    control = np.flatnonzero(doubles.obs["perturbation"] == "control")
    x = weak.X.toarray()
    x[600:] = x[rng.choice(control, size=len(x) - 600)]
    weak.X = sp.csr_matrix(x)
    result = pv.benchmark.run(weak, [], *ARGUMENTS, n_folds=1, progress=False, references=["Mean", "NoChange"])
    means = result.summary().query("metric == 'l2_profile'").set_index("model")["value"]
    assert means["interpolated duplicate"] < 0.95 * means["duplicate"]
    cells = result.table[result.table["metric"] == "energy_distance"]
    assert "interpolated duplicate" not in set(cells["model"])


def test_dynamic_range(result):
    table = result.dynamic_range().set_index(["metric", "model"])
    assert (table.loc[(slice(None), "Mean"), "normalised"] == 0).all()
    l2 = table.loc["l2_profile"]
    assert l2.loc["interpolated duplicate", "normalised"] == 1
    assert table.loc[("energy_distance", "duplicate"), "normalised"] == 1
    mean, floor, additive = (l2.loc[m, "value"] for m in ("Mean", "interpolated duplicate", "Additive"))
    assert l2.loc["Additive", "normalised"] == pytest.approx((additive - mean) / (floor - mean))
    assert l2.loc["Additive", "dynamic_range"] == pytest.approx((floor - mean) / (0 - mean))
    slope = table.loc["slope"]
    raw = result.summary().query("metric == 'slope'").set_index("model")["value"]
    assert slope.loc["Additive", "value"] == pytest.approx(abs(raw["Additive"] - 1))
    direction = table.loc["pearson_delta_perturbed"]
    assert 0 < direction.loc["Additive", "dynamic_range"] <= 1
    assert np.isnan(table.loc[("energy_distance", "Mean"), "dynamic_range"])
