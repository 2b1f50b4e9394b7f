"""Random streams that belong to a cell."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pertvae.models.base._streams import CellStreams, cell_keys, purpose_seed

NAMES = pd.Index([f"cell{i}" for i in range(3000)])


def streams(n: int = 3000, seed: int = 0, purpose: str = "A") -> CellStreams:
    return CellStreams(seed, purpose, cell_keys(NAMES, np.arange(n)))


def test_keys_belong_to_the_name() -> None:
    keys = cell_keys(NAMES, np.array([5, 9, 5, 5]))
    assert keys.dtype == np.uint64
    assert len(set(keys.tolist())) == 4  # a repeated cell gets another key each time
    assert keys[0] == cell_keys(NAMES, np.array([5]))[0]
    assert keys[1] == cell_keys(NAMES[[9, 0]], np.array([0]))[0]
    assert keys[2] == cell_keys(NAMES, np.array([5, 5]))[1]
    assert len(set(cell_keys(NAMES, np.arange(3000)).tolist())) == 3000


def test_seeds_of_purposes() -> None:
    values = {purpose_seed(seed, p) for seed in range(20) for p in ("A", "B", "A+B", "basal", "")}
    assert len(values) == 100
    assert all(0 <= v < 2**56 for v in values)
    assert purpose_seed(1, "A") == purpose_seed(1, "A")
    assert purpose_seed(1, "1A") != purpose_seed(11, "A")


@pytest.mark.parametrize("kind", ["normal", "uniform", "counts"])
def test_a_cell_does_not_depend_on_the_others(kind: str) -> None:
    mean, theta = np.random.default_rng(0).gamma(2.0, 3.0, (8, 5)), np.array([0.5, 1.0, 2.0, 9.0, 80.0])
    keys = cell_keys(NAMES, np.arange(8))

    def draw(rows: np.ndarray, purpose: str = "A") -> np.ndarray:
        chosen = CellStreams(3, purpose, keys[rows])
        return chosen.counts(mean[rows], theta) if kind == "counts" else getattr(chosen, kind)(5)

    whole = draw(np.arange(8))
    order = np.array([6, 2, 7])
    np.testing.assert_array_equal(draw(order), whole[order])
    assert (draw(order, "B") != whole[order]).any(axis=1).all()
    assert whole.dtype == np.float32


def test_the_global_state_is_untouched() -> None:
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    streams(5).normal(4)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_normal_and_uniform_draws_follow_their_distributions() -> None:
    assert stats.kstest(streams().normal(3).ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(streams().uniform(3).ravel(), "uniform").pvalue > 1e-3
    u = streams().uniform(2, 2)
    assert u.shape == (3000, 2, 2)
    assert u.min() >= 0
    assert u.max() < 1


def test_neighbouring_cells_and_purposes_are_uncorrelated() -> None:
    a, b = streams().normal(1)[:, 0], streams(purpose="B").normal(1)[:, 0]
    bound = 4 / np.sqrt(3000)
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < bound
    assert abs(np.corrcoef(a, b)[0, 1]) < bound
    assert abs(np.corrcoef(a, streams(seed=1).normal(1)[:, 0])[0, 1]) < bound


def test_moments_of_counts() -> None:
    mean, theta = np.array([0.05, 1.0, 6.0, 50.0]), np.array([0.5, 1.0, 4.0, 30.0])
    for inverse_dispersion, variance in ((theta, mean + mean**2 / theta), (None, mean)):
        counts = streams().counts(np.tile(mean, (3000, 1)), inverse_dispersion)
        assert (counts == np.round(counts)).all()
        assert counts.min() >= 0
        error = np.sqrt(variance / 3000)
        assert (np.abs(counts.mean(0) - mean) < 4 * error).all()
        np.testing.assert_allclose(counts.var(0), variance, rtol=0.25)
        assert np.abs(np.corrcoef(counts.T)[np.triu_indices(4, 1)]).max() < 4 / np.sqrt(3000)


def test_distribution_of_counts() -> None:
    theta, mu = 1.7, 3.0
    counts = streams().counts(np.full((3000, 1), mu), np.array([theta]))[:, 0]
    values = np.arange(8)
    observed = np.r_[[(counts == v).sum() for v in values], (counts >= 8).sum()]
    p = stats.nbinom.pmf(values, theta, theta / (theta + mu))
    assert stats.chisquare(observed, 3000 * np.r_[p, 1 - p.sum()]).pvalue > 1e-3


def test_no_mean_no_counts() -> None:
    assert (streams(50).counts(np.zeros((50, 3)), np.ones(3)) == 0).all()
