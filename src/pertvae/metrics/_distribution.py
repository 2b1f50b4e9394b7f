"""Metrics of the distribution of cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.metrics.pairwise import euclidean_distances

from pertvae.metrics._comparison import Comparison
from pertvae.metrics._registry import register

INF = float("inf")


def energy_distance(x: Any, y: Any, *, unbiased: bool = True, max_cells: int | None = None, seed: int = 0) -> float:
    """Return the energy distance of two samples of cells, ``2 E|X - Y| - E|X - X'| - E|Y - Y'|``.

    Székely and Rizzo (2013), Euclidean norm over all columns given, no PCA.

    Parameters
    ----------
    x, y
        Cells x genes on the scale to be compared (log1p CP10k in :func:`pertvae.metrics.evaluate`), dense or sparse.
    unbiased
        ``True``: means within a sample go over pairs of distinct cells. The estimate does not depend on the number of
        cells on average, and may be slightly negative when the distributions are equal. ``False``: over all pairs,
        each cell with itself included; never negative, larger for smaller samples.
    max_cells
        At most this many cells of each sample are used, drawn without replacement; ``None`` for all.
    seed
        Of that draw.

    Returns
    -------
    float
        The distance, in units of the columns; NaN for ``unbiased`` with a single cell on a side.

    Raises
    ------
    ValueError
        If a sample is empty or the numbers of columns differ.
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"energy_distance: x has {x.shape[1]} columns, y has {y.shape[1]}: pass the same genes.")
    if not x.shape[0] or not y.shape[0]:
        raise ValueError(f"energy_distance: x has {x.shape[0]} cells, y has {y.shape[0]}: both need at least one.")
    rng = np.random.default_rng(seed)
    x, y = (a[subsample(rng, a.shape[0], max_cells)] for a in (x, y))
    between, within_x, within_y = _distances(x, y)
    ones_x, ones_y = np.ones(x.shape[0]), np.ones(y.shape[0])
    return (
        2 * float(between.mean())
        - weighted_within(within_x, ones_x, unbiased)
        - weighted_within(within_y, ones_y, unbiased)
    )


def subsample(rng: np.random.Generator, n: int, most: int | None) -> np.ndarray:
    """Return sorted row numbers, at most ``most`` of ``n``."""
    return np.arange(n) if most is None or n <= most else np.sort(rng.choice(n, size=most, replace=False))


def spread(rng: np.random.Generator, sources: np.ndarray, most: int) -> np.ndarray:
    """Return row numbers in random order, at most ``most``, the first cell of every source before any second one."""
    order = rng.permutation(len(sources))
    turn = pd.Series(sources[order]).groupby(sources[order]).cumcount().to_numpy()  # how many of its source came before
    return order[np.argsort(turn, kind="stable")][:most]


def apart(distances: np.ndarray, sources: np.ndarray) -> float:
    """Return the mean over pairs of cells of different sources; NaN without any.

    Cells made from one source cell resemble each other: as pairs they would make a sample look narrower than the law it
    was drawn from.
    """
    pairs = sources[:, None] != sources[None, :]
    return float(distances[pairs].mean()) if pairs.any() else float("nan")


def weighted_within(distances: np.ndarray, weights: np.ndarray, unbiased: bool) -> float:
    """Return the mean distance within a sample whose cells count ``weights`` times.

    With ``unbiased`` a pair is two distinct cells, also where a cell counts twice: its distance to its own copy would
    make a resampled sample look narrower than it is.
    """
    total = float(weights @ distances @ weights)
    pairs = float(weights.sum() ** 2 - (weights**2).sum()) if unbiased else float(weights.sum() ** 2)
    return total / pairs if pairs > 0 else float("nan")


def _distances(x: Any, y: Any, *, squared: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return Euclidean distances between, within x and within y, or their squares."""
    x, y = (np.asarray(a.toarray() if sp.issparse(a) else a, dtype=np.float64) for a in (x, y))
    between = euclidean_distances(x, y, squared=squared)
    return between, euclidean_distances(x, squared=squared), euclidean_distances(y, squared=squared)


class _Means(NamedTuple):
    """What is left of a matrix of all pairs of cells when only the weights of the observed cells may change.

    Parameters
    ----------
    between
        Mean over predicted cells for each observed cell.
    predicted
        Mean over pairs of predicted cells that were not made from the same source cell.
    observed
        The value of each pair of observed cells, zero for a cell with itself.
    """

    between: np.ndarray
    predicted: float
    observed: np.ndarray

    def contrast(self, weights: np.ndarray | None) -> float:
        """Return twice the mean between minus the means within the two sides, observed cells weighted."""
        w = np.ones(len(self.observed)) if weights is None else weights
        if not w.sum():
            return float("nan")
        within = self.predicted + weighted_within(self.observed, w, True)
        return 2 * float(self.between @ w) / float(w.sum()) - within


def _means(between: np.ndarray, predicted: np.ndarray, observed: np.ndarray, sources: np.ndarray) -> _Means:
    return _Means(between.mean(axis=0), apart(predicted, sources), observed)


def _kernel(squared: np.ndarray, gamma: float, *, within: bool) -> np.ndarray:
    """Return the radial kernel of squared distances; within a sample a cell and itself are no pair."""
    kernel = np.exp(-gamma * squared)
    if within:
        np.fill_diagonal(kernel, 0.0)
    return kernel


def _pairs(comparison: Comparison) -> list[tuple[_Means, _Means]]:
    """Return of each condition the means of distances and those of the kernel, from one matrix of distances.

    A resampling only changes weights: this is computed once.
    """
    if "pairs of cells" not in comparison.cache:
        found = []
        for i, (x, y) in enumerate(zip(comparison.predicted_cells, comparison.observed_cells, strict=True)):
            codes = comparison.predicted_sources
            sources = np.arange(x.shape[0]) if codes is None else codes[i]
            between, predicted, observed = _distances(x, y, squared=True)
            distances = _means(np.sqrt(between), np.sqrt(predicted), np.sqrt(observed), sources)
            others = observed[~np.eye(len(observed), dtype=bool)]
            width = float(np.median(others)) if len(others) else 0.0
            gamma = 0.5 / width if width > 0 else float("nan")
            across, inside, outside = (
                _kernel(d, gamma, within=d is not between) for d in (between, predicted, observed)
            )
            found.append((distances, _means(across, inside, outside, sources)))
        comparison.cache["pairs of cells"] = found
    return comparison.cache["pairs of cells"]


def _weights(comparison: Comparison) -> Sequence[np.ndarray | None]:
    """Return the weights of the observed cells of each condition."""
    weights = comparison.observed_weights
    return [None] * len(comparison.conditions) if weights is None else weights


@register(
    "energy_distance",
    direction="lower",
    range=(-INF, INF),
    source="Szekely and Rizzo 2013, J. Stat. Plan. Inference",
    needs=("cells",),
)
def _energy_distance(comparison: Comparison) -> np.ndarray:
    """Energy distance of predicted and observed cells in log1p CP10k, unbiased; 0 for equal distributions.

    Means within a side go over pairs of distinct cells, within the prediction over pairs with different source cells.
    """
    each = zip(_pairs(comparison), _weights(comparison), strict=True)
    return np.array([distances.contrast(w) for (distances, _), w in each])


@register(
    "mmd2",
    direction="lower",
    range=(-2.0, 2.0),
    source="Gretton et al. 2012, JMLR 13",
    needs=("cells",),
)
def mmd2(comparison: Comparison) -> np.ndarray:
    """Squared maximum mean discrepancy of predicted and observed cells, unbiased; 0 for equal distributions.

    One radial kernel exp(-gamma d^2) a condition, gamma = 1 / (2 m) with m the median squared distance of two distinct
    observed cells of that condition: every prediction meets the same kernel, also in resamplings. Means within a side
    go over pairs of distinct cells (of different source cells), so the estimate may be slightly negative. NaN with a
    single cell on a side, or where more than half of the pairs of observed cells are equal.
    """
    each = zip(_pairs(comparison), _weights(comparison), strict=True)
    return np.array([-kernel.contrast(w) for (_, kernel), w in each])
