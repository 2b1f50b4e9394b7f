"""Metrics against independent computations."""

import itertools

import anndata as ad
import numpy as np
import ot
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
from scipy.spatial.distance import cdist

from pertvae.metrics import energy_distance, evaluate, mask_f1
from pertvae.metrics._profiles import jaccard, rowwise_pearson

KEY = "perturbation"


@pytest.fixture(scope="module")
def pair() -> tuple[ad.AnnData, ad.AnnData]:
    """Two screens of counts, 3 conditions and controls, group sizes all different, one empty cell."""
    rng = np.random.default_rng(0)
    result = []
    for side, sizes in (
        ("p", {"A": 7, "B": 11, "A+B": 5, "control": 9}),
        ("o", {"A": 6, "B": 4, "A+B": 8, "control": 13}),
    ):
        labels = np.repeat(list(sizes), list(sizes.values()))
        rates = {name: np.exp(rng.normal(0.5, 1, 60)) for name in sizes}
        x = np.stack([rng.poisson(rates[label]) for label in labels]).astype(np.float32)
        x[0] = 0
        obs = pd.DataFrame({KEY: labels}, index=[f"{side}{i}" for i in range(len(labels))])
        result.append(ad.AnnData(sp.csr_matrix(x), obs=obs))
    return result[0], result[1]


def group(adata: ad.AnnData, label: str) -> np.ndarray:
    return adata.X.toarray()[(adata.obs[KEY] == label).to_numpy()].astype(float)


def transformed(x: np.ndarray, log) -> np.ndarray:
    total = x.sum(axis=1, keepdims=True)
    return log(1 + 1e4 * np.where(total > 0, x / np.where(total > 0, total, 1), 0))


def scores(pair, metric: str, **arguments) -> pd.Series:
    table = evaluate(*pair, KEY, "control", metrics=metric, **arguments)
    return table.set_index("condition")["value"]


def test_pearson_against_scipy() -> None:
    rng = np.random.default_rng(1)
    p, o = rng.normal(3, 1, (6, 50)), rng.normal(-2, 4, (6, 50))
    expected = [scipy.stats.pearsonr(a, b).statistic for a, b in zip(p, o, strict=True)]
    np.testing.assert_allclose(rowwise_pearson(p, o), expected, rtol=1e-12)
    np.testing.assert_array_equal(rowwise_pearson(np.full((1, 5), 0.1), o[:1, :5]), [0.0])
    assert np.isnan(rowwise_pearson(p[:1, :5], np.full((1, 5), 0.1)))


def test_pearson_delta_against_scipy(pair) -> None:
    found = scores(pair, "pearson_delta")
    for label in ("A", "B", "A+B"):
        deltas = [
            transformed(group(side, label), np.log).mean(axis=0)
            - transformed(group(side, "control"), np.log).mean(axis=0)
            for side in pair
        ]
        assert found[label] == pytest.approx(scipy.stats.pearsonr(*deltas).statistic, abs=1e-12)


def test_average_treatment_effects_by_the_definition(pair) -> None:
    # log2, counts per 10,000, one correlation over the flattened matrices: as published
    def effects(side: ad.AnnData) -> np.ndarray:
        control = transformed(group(side, "control"), np.log2).mean(axis=0)
        return np.stack([transformed(group(side, c), np.log2).mean(axis=0) - control for c in ("A", "B", "A+B")])

    p, o = effects(pair[0]), effects(pair[1])
    expected = np.corrcoef(p.ravel(), o.ravel())[0, 1]
    assert scores(pair, "ate_correlation")["pooled"] == pytest.approx(expected, abs=1e-12)
    assert scores(pair, "pearson_delta")["pooled"] != pytest.approx(expected, abs=1e-3)
    r2 = 1 - ((o - p) ** 2).sum() / ((o - o.mean()) ** 2).sum()
    assert scores(pair, "ate_r2")["pooled"] == pytest.approx(r2, abs=1e-12)
    # 20 genes of each condition, chosen by the truth, then flattened together
    chosen = [sorted(range(60), key=lambda g, row=row: -abs(row[g]))[:20] for row in o]
    p_top, o_top = (np.concatenate([row[c] for row, c in zip(m, chosen, strict=True)]) for m in (p, o))
    assert scores(pair, "ate_correlation_top_20")["pooled"] == pytest.approx(np.corrcoef(p_top, o_top)[0, 1], abs=1e-12)
    r2_top = 1 - ((o_top - p_top) ** 2).sum() / ((o_top - o_top.mean()) ** 2).sum()
    assert scores(pair, "ate_r2_top_20")["pooled"] == pytest.approx(r2_top, abs=1e-12)
    assert len({round(v, 3) for v in (expected, r2, r2_top, np.corrcoef(p_top, o_top)[0, 1])}) == 4


def test_l2_closed_form() -> None:
    # profiles known in closed form: every cell of a group is the same
    def side(counts: dict[str, list[int]], prefix: str) -> ad.AnnData:
        x = np.repeat(np.array(list(counts.values()), dtype=np.float32), 3, axis=0)
        labels = np.repeat(list(counts), 3)
        obs = pd.DataFrame({KEY: labels}, index=[f"{prefix}{i}" for i in range(len(x))])
        return ad.AnnData(sp.csr_matrix(x), obs=obs)

    predicted = side({"A": [1, 3, 0, 0], "control": [2, 2, 0, 0]}, "p")
    observed = side({"A": [0, 2, 2, 0], "control": [1, 1, 1, 1]}, "o")
    log = np.log1p
    profile = np.sqrt(log(2500) ** 2 + (log(7500) - log(5000)) ** 2 + log(5000) ** 2)
    assert scores((predicted, observed), "l2_profile")["A"] == pytest.approx(profile)
    p = np.array([log(2500) - log(5000), log(7500) - log(5000), 0, 0])
    o = np.array([-log(2500), log(5000) - log(2500), log(5000) - log(2500), -log(2500)])
    assert scores((predicted, observed), "l2_delta")["A"] == pytest.approx(np.sqrt(((p - o) ** 2).sum()))
    assert scores((predicted, observed), "slope")["A"] == pytest.approx((p @ o) / (o @ o))


@pytest.mark.parametrize("unbiased", [True, False])
def test_energy_distance_by_brute_force(unbiased: bool) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(0, 1, (9, 4)), rng.normal(0.5, 2, (14, 4))

    def mean_distance(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        pairs = [
            np.sqrt(((a[i] - b[j]) ** 2).sum())
            for i, j in itertools.product(range(len(a)), range(len(b)))
            if not (same and unbiased and i == j)
        ]
        return float(np.mean(pairs))

    expected = 2 * mean_distance(x, y, False) - mean_distance(x, x, True) - mean_distance(y, y, True)
    assert energy_distance(x, y, unbiased=unbiased) == pytest.approx(expected, abs=1e-10)
    assert energy_distance(sp.csr_matrix(x), y, unbiased=unbiased) == pytest.approx(expected, abs=1e-10)
    shuffled = energy_distance(x[::-1], y[rng.permutation(14)], unbiased=unbiased, max_cells=50)
    assert shuffled == pytest.approx(expected, abs=1e-10)


def test_energy_distance_against_scipy_and_pot() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(0, 1, (30, 1)), rng.gamma(1, 2, (25, 1))
    # scipy integrates the squared difference of the distribution functions
    assert energy_distance(x, y, unbiased=False) == pytest.approx(scipy.stats.energy_distance(x[:, 0], y[:, 0]) ** 2)
    x, y = rng.normal(0, 1, (30, 5)), rng.normal(1, 1, (25, 5))
    between, within_x, within_y = (ot.dist(a, b, metric="euclidean") for a, b in ((x, y), (x, x), (y, y)))
    expected = 2 * between.mean() - within_x.mean() - within_y.mean()
    assert energy_distance(x, y, unbiased=False) == pytest.approx(expected)


def test_energy_distance_of_equal_distributions_does_not_depend_on_cells() -> None:
    rng = np.random.default_rng(4)
    for n in (5, 40):
        values = [energy_distance(rng.normal(size=(n, 6)), rng.normal(size=(n, 6))) for _ in range(200)]
        assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)
    biased = [energy_distance(rng.normal(size=(5, 6)), rng.normal(size=(5, 6)), unbiased=False) for _ in range(50)]
    assert np.mean(biased) > 0.5


def test_energy_distance_in_evaluate(pair) -> None:
    found = scores(pair, "energy_distance")
    for label in ("A", "B", "A+B"):
        x, y = (transformed(group(side, label), np.log) for side in pair)
        n, m = len(x), len(y)
        expected = 2 * cdist(x, y).mean() - cdist(x, x).sum() / (n * (n - 1)) - cdist(y, y).sum() / (m * (m - 1))
        assert found[label] == pytest.approx(expected, abs=1e-9)


def test_energy_distance_errors() -> None:
    with pytest.raises(ValueError, match="3 columns"):
        energy_distance(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="0 cells"):
        energy_distance(np.ones((0, 3)), np.ones((2, 3)))
    assert np.isnan(energy_distance(np.ones((1, 3)), np.ones((2, 3))))


def test_jaccard_with_sets() -> None:
    rng = np.random.default_rng(5)
    p, o = rng.normal(size=(8, 30)), rng.normal(size=(8, 30))
    for k in (3, 10):
        expected = []
        for a, b in zip(p, o, strict=True):
            first, second = (set(sorted(range(30), key=lambda i, v=v: -abs(v[i]))[:k]) for v in (a, b))
            expected.append(len(first & second) / len(first | second))
        np.testing.assert_allclose(jaccard(p, o, k), expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("columns", [(4, 4), (3, 5), (5, 3)])
def test_mask_f1_over_all_permutations(seed: int, columns: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    mask, truth = rng.random((12, columns[0])), rng.random((12, columns[1])) < 0.3
    width = max(columns)
    found = np.pad(mask > 0.5, ((0, 0), (0, width - columns[0])))
    wanted = np.pad(truth, ((0, 0), (0, width - columns[1])))
    best = (-1.0, 0.0, 0.0)
    for order in itertools.permutations(range(width)):
        hit = (found[:, order] & wanted).sum()
        precision, recall = hit / found.sum(), hit / wanted.sum()
        best = max(best, (2 * precision * recall / (precision + recall + 1e-300), precision, recall))
    score = mask_f1(mask, truth)
    np.testing.assert_allclose([score.f1, score.precision, score.recall], best, rtol=1e-12)
