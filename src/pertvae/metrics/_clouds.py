"""Metrics of clouds of cells: over all pairs of cells, and in principal components of the observed cells."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA

from pertvae.metrics._comparison import Comparison, mean_rows, stream
from pertvae.metrics._distribution import subsample
from pertvae.metrics._registry import register

INF = float("inf")
COMPONENTS = 30
MOST_CELLS = 500
PROJECTED = "cells in principal components"


@register(
    "relative_rmse",
    direction="lower",
    range=(0.0, INF),
    source="discrepancy-VAE (Zhang et al. 2023, NeurIPS); mean over all pairs of cells",
    needs=("cells",),
)
def relative_rmse(comparison: Comparison) -> np.ndarray:
    """Root of E (p - o)^2 / E o^2 over all pairs of a predicted and an observed cell; punishes realistic variance.

    The published measure pairs rows of batches of cells arbitrarily: this is its expectation (before the root), in
    log1p CP10k, from moments. Its square is mean error plus the variance of the observed and that of the predicted
    cells, over E o^2: a perfect mean copied into every cell scores better than a second draw of real cells, so it must
    not be read without ``energy_distance`` or ``mmd2``. NaN where nothing is observed.
    """
    if "moments of cells" not in comparison.cache:
        pairs = zip(comparison.predicted_cells, comparison.observed_cells, strict=True)
        comparison.cache["moments of cells"] = [(mean_rows(p), _squares(p).mean(), _squares(o)) for p, o in pairs]
    values = []
    for i, (mean, square, observed_squares) in enumerate(comparison.cache["moments of cells"]):
        cells = comparison.observed_cells[i]
        w = np.ones(cells.shape[0]) if comparison.observed_weights is None else comparison.observed_weights[i]
        scale = float(observed_squares @ w)
        if scale <= 0:
            values.append(np.nan)
            continue
        # sums over genes throughout: the number of genes cancels
        total = square * w.sum() - 2 * float(mean @ (cells.T @ w)) + scale
        values.append(np.sqrt(max(total, 0.0) / scale))
    return np.array(values)


def _squares(cells: sp.csr_matrix) -> np.ndarray:
    """Return the sum of squares of each cell."""
    return np.asarray(cells.multiply(cells).sum(axis=1), dtype=np.float64).ravel()


def _projected(comparison: Comparison) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """Return predicted and observed cells of each condition in principal components, fitted once a comparison.

    The components are those of all observed cells together, so that every prediction is measured along the same axes;
    ``None`` when the observed cells do not vary.
    """
    if PROJECTED not in comparison.cache:
        observed = sp.vstack(comparison.observed_cells, format="csr")
        fitted = _fit(observed)
        sides = (comparison.predicted_cells, comparison.observed_cells)
        comparison.cache[PROJECTED] = (
            None if fitted is None else tuple([_project(fitted, c) for c in side] for side in sides)
        )
    return comparison.cache[PROJECTED]


def _fit(cells: sp.csr_matrix) -> PCA | None:
    """Return the first principal components of sparse cells, at most as many as the cells span."""
    n, genes = cells.shape
    k = min(COMPONENTS, n - 1, genes)
    center = mean_rows(cells)
    # without variance there are no axes, and Lanczos iterations have nowhere to start
    if k < 1 or _squares(cells).mean() - center @ center <= 1e-12 * max(float(center @ center), 1e-300):
        return None
    # Lanczos iterations keep the matrix sparse but cannot find all components there are
    solver = "arpack" if k < min(n, genes) else "covariance_eigh"
    return PCA(k, svd_solver=solver, random_state=0).fit(cells)


def _project(fitted: PCA, cells: sp.csr_matrix) -> np.ndarray:
    """Return cells in the components that hold variance; directions without any are arbitrary."""
    kept = fitted.explained_variance_ > 1e-10 * fitted.explained_variance_[0]
    axes = fitted.components_[kept]
    return np.asarray(cells @ axes.T) - fitted.mean_ @ axes.T


def _equal_numbers(comparison: Comparison, name: str, most: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return of each condition equally many projected cells of both sides, at most ``most``.

    Where a side has more they are drawn; the draw depends on the metric, the condition and the numbers of cells only.
    """
    projected = _projected(comparison)
    if projected is None:
        return []
    drawn = []
    for label, p, o in zip(comparison.conditions, *projected, strict=True):
        n = min(len(p), len(o)) if most is None else min(len(p), len(o), most)
        # predicted cells are in random order already, those of distinct sources first
        drawn.append((p[:n], o[subsample(stream(0, f"{name} observed", label), len(o), n)]))
    return drawn


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Return |mu_x - mu_y|^2 + Tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of two samples, NaN with fewer than two rows.

    The trace of the root is that of the symmetric (C_x^(1/2) C_y C_x^(1/2))^(1/2), whose eigenvalues are real and not
    negative but for rounding.
    """
    if min(len(x), len(y)) < 2:
        return float("nan")
    first, second = (np.atleast_2d(np.cov(a, rowvar=False)) for a in (x, y))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0.0, None)).sum()
    difference = x.mean(axis=0) - y.mean(axis=0)
    return max(0.0, float(difference @ difference + np.trace(first) + np.trace(second) - 2 * shared))


@register(
    "frechet_distance",
    direction="lower",
    range=(0.0, INF),
    source="Dowson and Landau 1982, J. Multivar. Anal. 12; Heusel et al. 2017, NeurIPS",
    level="pooled",
    needs=("cells",),
    resampled=False,
)
def frechet_distance(comparison: Comparison) -> float:
    """Frechet distance (not its root) of Gaussians fitted to all conditions' cells in 30 principal components.

    |mu_p - mu_o|^2 + Tr(C_p + C_o - 2 (C_p C_o)^(1/2)), in the first 30 components of the observed cells (fewer where
    there are fewer cells or genes), the predicted cells projected. Of every condition equally many cells of both sides
    are pooled, drawn where one side has more: otherwise a different mixture of conditions would count as an error.
    Estimated covariances differ between two samples of one distribution, so it stays above 0 for few cells. It says
    nothing of which condition is which.
    """
    drawn = _equal_numbers(comparison, "frechet_distance", None)
    if not drawn:
        return float("nan")
    return frechet(np.concatenate([p for p, _ in drawn]), np.concatenate([o for _, o in drawn]))


def wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """Return the 2-Wasserstein distance of two samples of equal size: an optimal transport plan is a matching."""
    cost = cdist(x, y, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


@register(
    "wasserstein2",
    direction="lower",
    range=(0.0, INF),
    source="exact optimal transport; Peyre and Cuturi 2019, Found. Trends Mach. Learn. 11",
    needs=("cells",),
    resampled=False,
)
def wasserstein2(comparison: Comparison) -> np.ndarray:
    """2-Wasserstein distance of predicted and observed cells of a condition in 30 principal components.

    The root of the exact transport cost, squared Euclidean, between equally many cells of both sides (the smaller
    number, at most 500; drawn where there are more), in the first 30 components of the observed cells of all
    conditions. Two samples of one distribution are not at 0: that floor falls slowly with the number of cells, and a
    prediction that varies a little less than the observed cells may lie below it. Compare predictions of equal numbers
    of cells, and with a technical duplicate.
    """
    drawn = _equal_numbers(comparison, "wasserstein2", MOST_CELLS)
    return np.array([wasserstein(p, o) for p, o in drawn]) if drawn else np.full(len(comparison.conditions), np.nan)
