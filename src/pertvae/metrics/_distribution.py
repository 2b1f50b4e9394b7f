"""Metrics of the distribution of cells."""

from __future__ import annotations

from typing import Any

import numpy as np
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


def weighted_within(distances: np.ndarray, weights: np.ndarray, unbiased: bool) -> float:
    """Return the mean distance within a sample whose cells count ``weights`` times.

    With ``unbiased`` a pair is two distinct cells, also where a cell counts twice: its distance to its own copy would
    make a resampled sample look narrower than it is.
    """
    total = float(weights @ distances @ weights)
    pairs = float(weights.sum() ** 2 - (weights**2).sum()) if unbiased else float(weights.sum() ** 2)
    return total / pairs if pairs > 0 else float("nan")


def _distances(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return Euclidean distances between, within x and within y."""
    x, y = (np.asarray(a.toarray() if sp.issparse(a) else a, dtype=np.float64) for a in (x, y))
    return euclidean_distances(x, y), euclidean_distances(x), euclidean_distances(y)


@register(
    "energy_distance",
    direction="lower",
    range=(-INF, INF),
    source="Szekely and Rizzo 2013, J. Stat. Plan. Inference",
    needs=("cells",),
)
def _energy_distance(comparison: Comparison) -> np.ndarray:
    """Energy distance of predicted and observed cells in log1p CP10k, unbiased; 0 for equal distributions."""
    if "energy_distance" not in comparison.cache:
        pairs = zip(comparison.predicted_cells, comparison.observed_cells, strict=True)
        # a resampling only changes weights: distances are computed once, and those within predictions averaged
        parts = [_distances(x, y) for x, y in pairs]
        comparison.cache["energy_distance"] = [
            (between.mean(axis=0), weighted_within(within_x, np.ones(len(within_x)), True), within_y)
            for between, within_x, within_y in parts
        ]
    values = []
    for i, (between, predicted, observed) in enumerate(comparison.cache["energy_distance"]):
        w = np.ones(len(observed)) if comparison.observed_weights is None else comparison.observed_weights[i]
        if not w.sum():
            values.append(np.nan)
            continue
        values.append(2 * float(between @ w) / w.sum() - predicted - weighted_within(observed, w, True))
    return np.array(values)
