"""Metrics of clouds of cells against sums over pairs, POT, scipy and closed forms."""

import itertools
from collections.abc import Sequence

import numpy as np
import ot
import pandas as pd
import pytest
import scipy.linalg
import scipy.sparse as sp

from pertvae.metrics import Comparison, registry
from pertvae.metrics import _clouds as module


def compare(
    predicted: Sequence[np.ndarray], observed: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None = None
) -> Comparison:
    """A comparison of cells alone."""
    return Comparison(
        conditions=tuple(f"P{i}" for i in range(len(observed))),
        genes=pd.Index([f"G{i}" for i in range(observed[0].shape[1])]),
        predicted_profiles=np.stack([x.mean(axis=0) for x in predicted]),
        observed_profiles=np.stack([x.mean(axis=0) for x in observed]),
        predicted_deltas=None,
        observed_deltas=None,
        reference_profile=None,
        predicted_cells=[sp.csr_matrix(x) for x in predicted],
        observed_cells=[sp.csr_matrix(x) for x in observed],
        observed_weights=None if weights is None else list(weights),
    )


def score(name: str, comparison: Comparison) -> np.ndarray:
    return np.asarray(registry[name].function(comparison))


@pytest.fixture
def clouds() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two conditions, sparse, all sizes different."""
    rng = np.random.default_rng(0)

    def cloud(cells: int, shift: float) -> np.ndarray:
        return np.maximum(rng.normal(shift, 1.0, (cells, 5)), 0)

    return [cloud(7, 0.3), cloud(4, 1.0)], [cloud(6, 0.0), cloud(9, 1.2)]


def mmd2_by_loops(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    def squared(a: np.ndarray, b: np.ndarray) -> float:
        return float(sum((u - v) ** 2 for u, v in zip(a, b, strict=True)))

    gamma = 1 / (2 * np.median([squared(a, b) for a, b in itertools.combinations(y, 2)]))
    within_x = np.mean([np.exp(-gamma * squared(a, b)) for a, b in itertools.combinations(x, 2)])
    total = count = 0.0
    for (i, a), (j, b) in itertools.permutations(enumerate(y), 2):
        total += weights[i] * weights[j] * np.exp(-gamma * squared(a, b))
        count += weights[i] * weights[j]
    between = sum(w * np.exp(-gamma * squared(a, b)) for a in x for w, b in zip(weights, y, strict=True))
    return float(within_x + total / count - 2 * between / (len(x) * weights.sum()))


def test_mmd2_by_loops(clouds) -> None:
    predicted, observed = clouds
    ones = [np.ones(len(y)) for y in observed]
    expected = [mmd2_by_loops(*c) for c in zip(predicted, observed, ones, strict=True)]
    np.testing.assert_allclose(score("mmd2", compare(predicted, observed)), expected, atol=1e-12)
    # a resampling: cells that count twice or not at all, the kernel unchanged
    weights = [np.array([2.0, 0, 1, 1, 2, 0]), np.array([0.0, 3, 1, 1, 1, 1, 0, 1, 1])]
    expected = [mmd2_by_loops(*c) for c in zip(predicted, observed, weights, strict=True)]
    np.testing.assert_allclose(score("mmd2", compare(predicted, observed, weights)), expected, atol=1e-12)


def test_mmd2_of_two_normals() -> None:
    # E exp(-g |X - Y|^2) of X ~ N(0, a I), Y ~ N(m, b I) is (1 + 2 g (a + b))^(-d/2) exp(-g |m|^2 / (1 + 2 g (a + b)))
    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 1.5, (2000, 4)), rng.normal(0.4, 1.0, (2000, 4))
    gamma = 1 / (2 * np.median(np.square(scipy.spatial.distance.pdist(y))))

    def mean_kernel(variances: float, squared_shift: float) -> float:
        wide = 1 + 2 * gamma * variances
        return float(wide**-2.0 * np.exp(-gamma * squared_shift / wide))

    expected = mean_kernel(4.5, 0) + mean_kernel(2.0, 0) - 2 * mean_kernel(3.25, 4 * 0.16)
    assert expected > 0.05
    assert score("mmd2", compare([x], [y]))[0] == pytest.approx(expected, abs=0.005)


def test_energy_and_mmd2_share_their_distances(clouds, monkeypatch) -> None:
    from pertvae.metrics import _distribution

    calls = []
    original = _distribution._distances
    monkeypatch.setattr(_distribution, "_distances", lambda *a, **k: calls.append(1) or original(*a, **k))
    comparison = compare(*clouds)
    for name in ("energy_distance", "mmd2", "energy_distance"):
        score(name, comparison)
    assert len(calls) == len(comparison.conditions)


def test_relative_rmse_over_all_pairs(clouds) -> None:
    predicted, observed = clouds
    weights = [np.array([2, 0, 1, 1, 2, 0]), np.array([0, 3, 1, 1, 1, 1, 0, 1, 1])]
    for w in (None, weights):
        # a cell that counts twice is a cell that stands there twice
        seen = observed if w is None else [np.repeat(y, n, axis=0) for y, n in zip(observed, w, strict=True)]
        expected = [
            np.sqrt(np.mean([(a - b) ** 2 for a, b in itertools.product(x, y)]) / np.mean(np.square(y)))
            for x, y in zip(predicted, seen, strict=True)
        ]
        np.testing.assert_allclose(score("relative_rmse", compare(predicted, observed, w)), expected, rtol=1e-12)


def test_relative_rmse_is_the_published_measure_on_average() -> None:
    # rows paired by chance, in batches of 32; the root is taken once here
    rng = np.random.default_rng(2)
    x, y = rng.gamma(1, 1, (320, 20)), rng.gamma(2, 1, (320, 20))
    squares = []
    for _ in range(200):
        a, b = (z[rng.permutation(320)].reshape(10, 32, 20) for z in (x, y))
        squares.append(((a - b) ** 2).mean() / np.square(y).mean())
    assert score("relative_rmse", compare([x], [y]))[0] ** 2 == pytest.approx(np.mean(squares), rel=2e-3)


def exact_sample(rng: np.random.Generator, mean: np.ndarray, root: np.ndarray, n: int) -> np.ndarray:
    """Rows whose sample mean and covariance (n - 1) are exactly these."""
    z = rng.normal(size=(n, len(mean)))
    z = z - z.mean(axis=0)
    z = z @ np.linalg.inv(scipy.linalg.sqrtm(np.cov(z, rowvar=False))).real
    return mean + z @ root


def test_frechet_of_diagonal_normals() -> None:
    rng = np.random.default_rng(3)
    a, b, shift = np.array([1.0, 2.0, 0.5]), np.array([1.5, 0.2, 3.0]), np.array([0.3, -1.0, 2.0])
    x = exact_sample(rng, np.zeros(3), np.diag(a), 50)
    y = exact_sample(rng, shift, np.diag(b), 80)
    assert module.frechet(x, y) == pytest.approx((shift**2).sum() + ((a - b) ** 2).sum(), abs=1e-10)
    assert module.frechet(x, x) == pytest.approx(0, abs=1e-10)


def test_frechet_against_the_matrix_root() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    x, y = rng.normal(size=(60, 4)) @ first, rng.normal(size=(70, 4)) @ second + 1.0
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(axis=0) - y.mean(axis=0)
    expected = gap @ gap + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert module.frechet(x, y) == pytest.approx(expected, rel=1e-9)


def components(cells: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    center = cells.mean(axis=0)
    return center, np.linalg.svd(cells - center, full_matrices=False)[2][:k]


@pytest.fixture(scope="module")
def screen() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Three conditions of 60 correlated genes with zeros, equally many cells of both sides."""
    rng = np.random.default_rng(5)
    loadings = rng.normal(size=(8, 60))

    def cloud(cells: int, shift: float) -> np.ndarray:
        return np.maximum(rng.normal(shift, 1, (cells, 8)) @ loadings + rng.normal(0, 0.5, (cells, 60)), 0)

    sizes = (40, 25, 55)
    return [cloud(n, 0.1 * i) for i, n in enumerate(sizes)], [cloud(n, 0.2 * i) for i, n in enumerate(sizes)]


def test_wasserstein_against_pot(screen) -> None:
    predicted, observed = screen
    center, axes = components(np.concatenate(observed), 30)
    expected = []
    for x, y in zip(predicted, observed, strict=True):
        cost = ot.dist((x - center) @ axes.T, (y - center) @ axes.T, metric="sqeuclidean")
        expected.append(np.sqrt(ot.emd2(ot.unif(len(x)), ot.unif(len(y)), cost)))
    np.testing.assert_allclose(score("wasserstein2", compare(*screen)), expected, rtol=1e-7)


def test_frechet_in_components_of_the_observed_cells(screen) -> None:
    predicted, observed = (np.concatenate(side) for side in screen)
    center, axes = components(observed, 30)
    x, y = (predicted - center) @ axes.T, (observed - center) @ axes.T
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(axis=0) - y.mean(axis=0)
    expected = gap @ gap + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert float(score("frechet_distance", compare(*screen))) == pytest.approx(expected, rel=1e-6)


def test_wasserstein_of_a_shifted_cloud() -> None:
    rng = np.random.default_rng(6)
    y = rng.gamma(2, 1, (50, 4))
    step = np.array([1.0, -0.5, 2.0, 0.25])
    # four genes: all components are there, and distances are those between cells
    found = score("wasserstein2", compare([(y + step)[rng.permutation(50)]], [y]))
    assert found[0] == pytest.approx(np.linalg.norm(step))
    assert float(score("frechet_distance", compare([y + step], [y]))) == pytest.approx(step @ step)
