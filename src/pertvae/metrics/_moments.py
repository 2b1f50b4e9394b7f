"""Means and variances of genes over observed cells, in two halves: weighted error, and agreement of variances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from pertvae.metrics._comparison import Comparison, stream
from pertvae.metrics._registry import register
from pertvae.metrics._shift_errors import rowwise_r2

INF = float("inf")
SHIFT_BIOSCIENCE = "DEG-weighted MSE of Shift Bioscience 2025 (calibrated metrics of perturbation models)"


@dataclass(frozen=True)
class Moments:
    """Sums over cells, from which means and variances follow and which add up over groups of cells.

    Parameters
    ----------
    n
        Cells of each group, any shape.
    first, second
        Sums of values and of squares, the shape of ``n`` and a last axis of genes.
    """

    n: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, cells: sp.csr_matrix, squares: sp.csr_matrix, weights: np.ndarray | None = None) -> Moments:
        """Return the moments of some cells, each counted ``weights`` times."""
        w = np.ones(cells.shape[0]) if weights is None else weights
        return cls(np.array(w.sum()), np.asarray(cells.T @ w), np.asarray(squares.T @ w))

    @classmethod
    def stack(cls, groups: Sequence[Moments]) -> Moments:
        """Return the moments of many groups, along a new first axis."""
        return cls(*(np.stack([getattr(g, name) for g in groups]) for name in ("n", "first", "second")))

    def sum(self, axis: int) -> Moments:
        """Return the moments of groups pooled along an axis of ``n`` (counted from its front)."""
        return Moments(self.n.sum(axis), self.first.sum(axis), self.second.sum(axis))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.n + other.n, self.first + other.first, self.second + other.second)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.n - other.n, self.first - other.first, self.second - other.second)

    def half(self, i: int) -> Moments:
        """Return one half, where the second axis of ``n`` counts halves."""
        return Moments(self.n[:, i], self.first[:, i], self.second[:, i])

    @property
    def mean(self) -> np.ndarray:
        """Means, NaN without cells."""
        n = np.broadcast_to(self.n[..., None], self.first.shape)
        return np.divide(self.first, n, out=np.full(n.shape, np.nan), where=n > 0)

    @property
    def variance(self) -> np.ndarray:
        """Unbiased variances, NaN with fewer than two cells."""
        n = np.broadcast_to(self.n[..., None], self.first.shape)
        squares = np.maximum(self.second - n * np.where(n > 0, self.mean, 0.0) ** 2, 0.0)
        return np.divide(squares, n - 1, out=np.full(n.shape, np.nan), where=n > 1)


def squared(cells: sp.csr_matrix) -> sp.csr_matrix:
    """Return the squares of a sparse matrix; the places of its values are shared, not copied."""
    return sp.csr_matrix((cells.data**2, cells.indices, cells.indptr), shape=cells.shape)


def _divide(name: str, cells: sp.csr_matrix) -> list[tuple[np.ndarray, sp.csr_matrix, sp.csr_matrix]]:
    """Return rows, values and squares of two random halves of some cells, the same ones whatever was predicted."""
    order = stream(0, "halves of observed cells", name).permutation(cells.shape[0])
    halves = [np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])]
    return [(rows, cells[rows], squared(cells[rows])) for rows in halves]


def observed_moments(comparison: Comparison) -> Moments:
    """Return the moments of the observed cells, conditions x halves, computed once a resampling."""
    cache, weights = comparison.cache, comparison.observed_weights
    if "observed halves" not in cache:
        pairs = zip(comparison.conditions, comparison.observed_cells, strict=True)
        cache["observed halves"] = [_divide(name, cells) for name, cells in pairs]
    # the weights are kept beside what was computed from them: the same list means the same resampling
    if "observed moments" not in cache or cache["observed moments"][0] is not weights:
        groups = [
            Moments.stack([Moments.of(x, xx, None if weights is None else weights[i][rows]) for rows, x, xx in halves])
            for i, halves in enumerate(cache["observed halves"])
        ]
        cache["observed moments"] = (weights, Moments.stack(groups))
    return cache["observed moments"][1]


def _predicted_variances(comparison: Comparison) -> np.ndarray:
    """Return the variances of genes over predicted cells, conditions x genes."""
    if "predicted variances" not in comparison.cache:
        found = Moments.stack([Moments.of(cells, squared(cells)) for cells in comparison.predicted_cells])
        comparison.cache["predicted variances"] = found.variance
    return comparison.cache["predicted variances"]


def _control_moments(comparison: Comparison) -> Moments | None:
    """Return the moments of both halves of the observed controls, ``None`` without any."""
    if comparison.observed_controls is None:
        return None
    if "control moments" not in comparison.cache:
        halves = _divide("", comparison.observed_controls)
        comparison.cache["control moments"] = Moments.stack([Moments.of(x, xx) for _, x, xx in halves])
    return comparison.cache["control moments"]


def welch(group: Moments, rest: Moments) -> np.ndarray:
    """Return Welch's t of each gene; 0 where a gene does not vary, NaN with fewer than two cells on a side."""
    error = np.sqrt(group.variance / group.n[..., None] + rest.variance / np.maximum(rest.n, 1)[..., None])
    difference = group.mean - rest.mean
    t = np.divide(difference, error, out=np.zeros(error.shape), where=error > 0)
    return np.where(np.isnan(error), np.nan, t)


@register("weighted_mse", direction="lower", range=(0.0, INF), source=SHIFT_BIOSCIENCE, needs=("observed_cells",))
def weighted_mse(comparison: Comparison) -> np.ndarray:
    """Squared error of the mean profile, genes weighted by how clearly the condition moves them in other cells.

    The observed cells of each condition are divided into two halves A and B. Weights are |t| over its sum, t Welch's
    statistic of half A against half A of all other conditions and the controls together ("score against the rest");
    the error is that from the mean profile of half B. No noise stands in both, so genes are not chosen for their noise.
    The mean over both roles of the halves. As published: weights by expression against the rest from the other half of
    the cells. Ours: Welch's t, its absolute value to the power 1, both roles, controls in the rest where there are
    some. Resampling counts the observed cells of the conditions, not the controls of the rest. NaN without any rest,
    or with fewer than two cells in a half.
    """
    halves, controls = observed_moments(comparison), _control_moments(comparison)
    everything = halves.sum(0)
    if controls is not None:
        everything = everything + controls
    errors = []
    for a, b in ((0, 1), (1, 0)):
        group = halves.half(a)
        total = Moments(everything.n[a], everything.first[a], everything.second[a])
        size = np.abs(welch(group, total - group))
        scale = size.sum(axis=1, keepdims=True)
        weights = np.divide(size, scale, out=np.full(size.shape, np.nan), where=scale > 0)
        errors.append((weights * (comparison.predicted_profiles - halves.half(b).mean) ** 2).sum(axis=1))
    return (errors[0] + errors[1]) / 2


@register(
    "variance_ratio",
    direction="one",
    range=(0.0, INF),
    source="sum of gene variances, predicted over observed (log1p CP10k, unbiased)",
    needs=("cells",),
)
def variance_ratio(comparison: Comparison) -> np.ndarray:
    """Total variance of the predicted cells over that of the observed ones: below 1 cells are too alike.

    Sums over genes, so variable genes dominate. NaN with fewer than two cells, or none that vary.
    """
    observed = observed_moments(comparison).sum(1).variance.sum(axis=1)
    predicted = _predicted_variances(comparison).sum(axis=1)
    return np.divide(predicted, observed, out=np.full(len(observed), np.nan), where=observed > 0)


@register(
    "gene_variance_agreement",
    direction="higher",
    range=(-INF, 1.0),
    source="CPA (Lotfollahi et al. 2023, Mol. Syst. Biol.), r2_var",
    needs=("cells",),
    min_genes=2,
)
def gene_variance_agreement(comparison: Comparison) -> np.ndarray:
    """Coefficient of determination over genes of predicted for observed variances over cells, log1p CP10k.

    0 for the mean variance in every gene. NaN with fewer than two cells, or when all genes vary alike.
    """
    observed = observed_moments(comparison).sum(1).variance
    predicted = _predicted_variances(comparison)
    found = np.full(len(observed), np.nan)
    known = ~np.isnan(observed).any(axis=1) & ~np.isnan(predicted).any(axis=1)
    found[known] = rowwise_r2(predicted[known], observed[known])
    return found
