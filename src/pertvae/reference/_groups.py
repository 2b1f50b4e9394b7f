"""Training cells in groups: means of any values of theirs, and shifts between these means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.sparse as sp


@dataclass
class Groups:
    """Every (condition, context, half) that has training cells is a group; coarser means are weighted sums of theirs.

    Parameters
    ----------
    member
        Group of each training cell.
    counts
        Cells of each group.
    condition, context, half
        Of each group, numbers from 0.
    control
        Number of the control condition.
    n_conditions, n_contexts
        How many there are, control included.
    """

    member: np.ndarray
    counts: np.ndarray
    condition: np.ndarray
    context: np.ndarray
    half: np.ndarray
    control: int
    n_conditions: int
    n_contexts: int

    @classmethod
    def create(
        cls,
        conditions: np.ndarray,
        contexts: np.ndarray,
        *,
        control: int,
        n_conditions: int,
        n_contexts: int,
        seed: int | None,
    ) -> Self:
        """Group cells by the codes of their condition and context, and by a random half unless ``seed`` is None."""
        strata = conditions * n_contexts + contexts
        half = np.zeros_like(strata) if seed is None else _halves(strata, seed)
        groups, member, counts = np.unique(strata * 2 + half, return_inverse=True, return_counts=True)
        condition, context = np.divmod(groups // 2, n_contexts)
        return cls(member, counts, condition, context, groups % 2, control, n_conditions, n_contexts)

    def control_means(self, means: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean of all controls, and contexts x values: the mean of the controls of each, NaN without any.

        Parameters
        ----------
        means
            Groups x values.
        weights
            Of the groups; ``None`` for the number of their cells.
        """
        weights = (self.counts if weights is None else weights) * (self.condition == self.control)
        pooled = _weighted(means, weights, np.zeros_like(self.context), 1)[0]
        return pooled, _weighted(means, weights, self.context, self.n_contexts)

    def shifts(self, means: np.ndarray, halves: Sequence[int] = (0, 1)) -> np.ndarray:
        """Return perturbed conditions x values: mean of the cells minus that of the controls of their context.

        Contexts are averaged by the cells of the condition in each; where a context has no controls, the mean of all
        controls stands in.

        Parameters
        ----------
        means
            Groups x values.
        halves
            Halves of the cells to use.
        """
        weights = np.where(np.isin(self.half, halves), self.counts, 0).astype(np.float64)
        pooled, control = self.control_means(means, weights)
        control = np.where(np.isnan(control), pooled, control)
        moved = means - control[self.context]
        perturbed = np.arange(self.n_conditions) != self.control
        return _weighted(moved, weights, self.condition, self.n_conditions)[perturbed]


def _halves(strata: np.ndarray, seed: int) -> np.ndarray:
    """Return 0 or 1 for each cell: two random halves of every stratum."""
    order = np.random.default_rng([seed, 0]).permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    _, first, member = np.unique(strata[order], return_index=True, return_inverse=True)
    half = np.empty(len(strata), dtype=np.int64)
    half[order] = (np.arange(len(strata)) - first[member]) % 2
    return half


def _weighted(values: np.ndarray, weights: np.ndarray, codes: np.ndarray, n: int) -> np.ndarray:
    """Return the weighted mean of the rows of each code; NaN where the weights sum to zero."""
    member = sp.csr_matrix((weights, (codes, np.arange(len(codes)))), shape=(n, len(codes)))
    total = np.bincount(codes, weights=weights, minlength=n)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total[:, None] > 0, (member @ values) / total[:, None], np.nan)
