"""Metrics of cells against scipy, scikit-learn and numpy, gene by gene."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import mannwhitneyu, ttest_ind
from sklearn.metrics import r2_score

from pertvae.metrics import Comparison, registry
from pertvae.metrics._comparison import stream
from pertvae.metrics._interactions import rowwise_auroc
from pertvae.metrics._recovery import wilcoxon

SIZES = {"A": (9, 12), "B": (14, 7), "A+B": (6, 10)}
G = 25


def values(rng: np.random.Generator, rates: np.ndarray, n: int) -> np.ndarray:
    """Sparse positive values, gene 0 silent."""
    x = np.log1p(rng.poisson(rates, (n, len(rates))) * rng.lognormal(0, 0.3, (n, 1)))
    x[:, 0] = 0
    return x


def compare(controls: bool = True, weights: list[np.ndarray] | None = None, **changes) -> Comparison:
    rng = np.random.default_rng(0)
    rates = {name: np.exp(rng.normal(0, 1, G)) for name in (*SIZES, "control")}
    sides = [[values(rng, rates[name], SIZES[name][i]) for name in SIZES] for i in (0, 1)]
    rest = [values(rng, rates["control"], n) for n in (15, 11)]
    fields = {
        "conditions": tuple(SIZES),
        "genes": pd.RangeIndex(G),
        "predicted_profiles": np.stack([x.mean(axis=0) for x in sides[0]]),
        "observed_profiles": np.stack([x.mean(axis=0) for x in sides[1]]),
        "predicted_deltas": None,
        "observed_deltas": None,
        "reference_profile": None,
        "predicted_cells": [sp.csr_matrix(x) for x in sides[0]],
        "observed_cells": [sp.csr_matrix(x) for x in sides[1]],
        "observed_weights": weights,
        "predicted_controls": sp.csr_matrix(rest[0]) if controls else None,
        "observed_controls": sp.csr_matrix(rest[1]) if controls else None,
    }
    return Comparison(**(fields | changes))


def draw(seed: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.multinomial(n, np.full(n, 1 / n)).astype(float) for _, n in SIZES.values()]


def copies(comparison: Comparison, weights: list[np.ndarray] | None) -> list[np.ndarray]:
    """Observed cells, each as often as it counts."""
    cells = [c.toarray() for c in comparison.observed_cells]
    return (
        cells if weights is None else [np.repeat(c, w.astype(int), axis=0) for c, w in zip(cells, weights, strict=True)]
    )


# --------------------------------------------------------------------------------------------------- weighted_mse


def by_hand(comparison: Comparison, weights: list[np.ndarray] | None = None) -> np.ndarray:
    halves = []
    names = [*comparison.conditions, ""] if comparison.observed_controls is not None else [*comparison.conditions]
    blocks = [c.toarray() for c in comparison.observed_cells]
    if comparison.observed_controls is not None:
        blocks.append(comparison.observed_controls.toarray())
    for i, (name, x) in enumerate(zip(names, blocks, strict=True)):
        order = stream(0, "halves of observed cells", name).permutation(len(x))
        w = np.ones(len(x)) if weights is None or i == len(comparison.conditions) else weights[i]
        parts = (order[: len(x) // 2], order[len(x) // 2 :])
        halves.append([np.repeat(x[p], w[p].astype(int), axis=0) for p in parts])
    result = []
    for i, profile in enumerate(comparison.predicted_profiles):
        errors = []
        for a, b in ((0, 1), (1, 0)):
            others = np.concatenate([h[a] for j, h in enumerate(halves) if j != i])
            varies = np.ptp(np.concatenate([halves[i][a], others]), axis=0) > 0
            t = np.zeros(G)
            t[varies] = ttest_ind(halves[i][a][:, varies], others[:, varies], equal_var=False).statistic
            weight = np.abs(t) / np.abs(t).sum()
            errors.append(weight @ (profile - halves[i][b].mean(axis=0)) ** 2)
        result.append(np.mean(errors))
    return np.array(result)


@pytest.mark.parametrize("controls", [True, False])
def test_weighted_mse_against_welch(controls: bool) -> None:
    comparison = compare(controls)
    found = registry["weighted_mse"].function(comparison)
    np.testing.assert_allclose(found, by_hand(comparison), rtol=1e-9)
    # resampled cells are copies of cells, and what was kept of the first call does not stay
    for seed in (3, 4):
        weights = draw(seed)
        again = compare(controls, weights, cache=comparison.cache)
        np.testing.assert_allclose(registry["weighted_mse"].function(again), by_hand(comparison, weights), rtol=1e-9)
    np.testing.assert_allclose(registry["weighted_mse"].function(comparison), found, rtol=1e-12)


def test_weighted_mse_needs_a_rest() -> None:
    one = {name: getattr(compare(), name)[:1] for name in ("conditions", "observed_cells", "predicted_profiles")}
    assert np.isfinite(registry["weighted_mse"].function(compare(**one))).all()
    assert np.isnan(registry["weighted_mse"].function(compare(False, **one))).all()
    few = compare().observed_cells
    few[1] = few[1][:3]
    found = registry["weighted_mse"].function(compare(observed_cells=few))
    assert np.isnan(found).tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------------ variances


@pytest.mark.parametrize("weights", [None, draw()])
def test_variances_against_numpy(weights: list[np.ndarray] | None) -> None:
    comparison = compare(weights=weights)
    ratio, agreement = (registry[n].function(comparison) for n in ("variance_ratio", "gene_variance_agreement"))
    for i, o in enumerate(copies(comparison, weights)):
        p, o = comparison.predicted_cells[i].toarray().var(axis=0, ddof=1), o.var(axis=0, ddof=1)
        assert ratio[i] == pytest.approx(p.sum() / o.sum(), rel=1e-10)
        assert agreement[i] == pytest.approx(r2_score(o, p), rel=1e-10)


def test_variances_that_are_not_there() -> None:
    cells = compare().predicted_cells
    for predicted, expected in ((cells[0][:1], np.nan), (cells[0][[0, 0, 0]], 0.0)):
        found = registry["variance_ratio"].function(compare(predicted_cells=[predicted, *cells[1:]]))
        np.testing.assert_allclose(found[0], expected, atol=1e-12)
        assert np.isfinite(found[1:]).all()
    still = compare().observed_cells
    still[0] = still[0][[0, 0, 0]]
    for name in ("variance_ratio", "gene_variance_agreement"):
        assert np.isnan(registry[name].function(compare(observed_cells=still))).tolist() == [True, False, False]
    assert np.isnan(
        registry["gene_variance_agreement"].function(compare(predicted_cells=[cells[0][:1], *cells[1:]]))[0]
    )


# -------------------------------------------------------------------------------------------------- DE recovery


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p)
    adjusted = p[order] * len(p) / np.arange(1, len(p) + 1)
    result = np.empty(len(p))
    result[order] = np.minimum.accumulate(adjusted[::-1])[::-1].clip(max=1)
    return result


def average_precision(label: np.ndarray, score: np.ndarray) -> float:
    """Sum over thresholds of the gain of recall times precision."""
    total, before = 0.0, 0.0
    for threshold in np.unique(score)[::-1]:
        taken = score >= threshold
        recall = (label & taken).sum() / label.sum()
        total += (recall - before) * (label & taken).sum() / taken.sum()
        before = recall
    return total


def one_by_one(cells: np.ndarray, controls: np.ndarray) -> np.ndarray:
    p = np.ones(G)
    for g in range(G):
        if np.ptp(np.r_[cells[:, g], controls[:, g]]) > 0:
            p[g] = mannwhitneyu(cells[:, g], controls[:, g], method="asymptotic").pvalue
    return p


def test_de_recovery_gene_by_gene() -> None:
    rng = np.random.default_rng(5)
    base = np.exp(rng.normal(1, 1, G))
    moved = base * np.exp(np.where(np.arange(G) < 12, rng.choice([-1.5, 0.4, 1.5], G), 0))
    turned = np.where(np.arange(G) < 3, base**2 / moved, moved)  # three genes go the other way
    n = 25
    observed, predicted = values(rng, moved, n), values(rng, turned, n)
    controls = values(rng, base, n), values(rng, base, n)
    comparison = compare(
        conditions=("A",),
        predicted_cells=[sp.csr_matrix(predicted)],
        observed_cells=[sp.csr_matrix(observed)],
        predicted_controls=sp.csr_matrix(controls[0]),
        observed_controls=sp.csr_matrix(controls[1]),
    )
    p_observed, p_predicted = one_by_one(observed, controls[1]), one_by_one(predicted, controls[0])
    np.testing.assert_allclose(wilcoxon(*map(sp.csr_matrix, (observed, controls[1]))).p, p_observed, rtol=1e-10)
    label = benjamini_hochberg(p_observed) < 0.05
    np.testing.assert_array_equal(wilcoxon(*map(sp.csr_matrix, (observed, controls[1]))).significant, label)
    assert (label != (p_observed < 0.05)).any()
    sign = [np.sign(x.mean(axis=0) - c.mean(axis=0)) for x, c in ((predicted, controls[0]), (observed, controls[1]))]
    score = np.where(sign[0] == sign[1], -np.log10(p_predicted), 0)
    assert label[:3].any()
    assert (score[label] == 0).any()
    expected = average_precision(label, score)
    assert registry["de_recovery"].function(comparison)[0] == pytest.approx(expected, rel=1e-10)
    assert average_precision(label, -np.log10(p_predicted)) > expected + 0.02
    ratio = (benjamini_hochberg(p_predicted) < 0.05).sum() / label.sum()
    assert registry["de_count_ratio"].function(comparison)[0] == pytest.approx(ratio)


def test_de_numbers_of_cells_are_made_equal() -> None:
    rng = np.random.default_rng(6)
    numbers = ((3.1, 400), (3.1, 20), (2.0, 300), (2.0, 25))
    blocks = [sp.csr_matrix(np.log1p(rng.poisson(rate, (n, 1000)))) for rate, n in numbers]
    found = [wilcoxon(blocks[i], blocks[i + 2]).significant.sum() for i in (0, 1)]
    assert found[0] > 1.8 * found[1] > 400
    for order in ((0, 1, 2, 3), (1, 0, 3, 2), (0, 1, 3, 2), (1, 0, 2, 3)):
        predicted, observed, ours, theirs = (blocks[i] for i in order)
        comparison = compare(
            conditions=("A",),
            predicted_cells=[predicted],
            observed_cells=[observed],
            predicted_controls=ours,
            observed_controls=theirs,
        )
        assert 0.6 < registry["de_count_ratio"].function(comparison)[0] < 1.7


def test_de_where_there_is_nothing() -> None:
    cells = compare().observed_controls
    same = [cells, *compare().observed_cells[1:]]
    for name in ("de_recovery", "de_count_ratio"):
        found = registry[name].function(compare(observed_cells=same, predicted_cells=same))
        assert np.isnan(found[0])
        one = [cells[:1], *compare().predicted_cells[1:]]
        assert np.isnan(registry[name].function(compare(predicted_cells=one))[0])
        with pytest.raises(ValueError, match="controls"):
            registry[name].function(compare(False))


def test_auroc_by_counting_pairs() -> None:
    rng = np.random.default_rng(7)
    positive, score = rng.random((5, 30)) < 0.3, rng.integers(0, 6, (5, 30)).astype(float)
    expected = []
    for label, row in zip(positive, score, strict=True):
        pairs = row[label][:, None] - row[~label][None]
        expected.append(np.mean((pairs > 0) + 0.5 * (pairs == 0)))
    np.testing.assert_allclose(rowwise_auroc(positive, score), expected)
    assert np.isnan(rowwise_auroc(np.zeros((1, 4), dtype=bool), score[:1, :4])).all()
