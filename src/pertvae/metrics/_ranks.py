"""Is a prediction nearest to its own condition? Ranks among all observed conditions."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import pairwise_distances

from pertvae.metrics._comparison import Comparison
from pertvae.metrics._profiles import SYSTEMA
from pertvae.metrics._registry import register
from pertvae.metrics._shift_errors import CELL_EVAL


def nearer(predicted: np.ndarray, observed: np.ndarray, metric: str) -> np.ndarray:
    """Return how many other observed rows are nearer to each predicted row than its own; a tie counts as half."""
    distances = pairwise_distances(predicted, observed, metric=metric)
    own = np.diag(distances)[:, None]
    ties = (distances == own).sum(axis=1) - 1  # its own is not another
    return (distances < own).sum(axis=1) + 0.5 * ties


def discrimination(comparison: Comparison, metric: str) -> np.ndarray:
    """Return 1 - rank / P, the rank of the own observed shift (0 for the nearest) among those of all P conditions."""
    n = len(comparison.conditions)
    if n < 2:
        return np.full(n, np.nan)
    return 1.0 - nearer(*comparison.deltas, metric) / n


def _register_discrimination(name: str, metric: str, words: str, note: str) -> None:
    def discrimination_score(comparison: Comparison) -> np.ndarray:
        return discrimination(comparison, metric)

    discrimination_score.__doc__ = f"""Rank of the own observed shift among all, {words} distance: 1 is the nearest.

    1 - rank / P over the P scored conditions, rank 0 for the nearest, as cell-eval defines it; chance is
    (P + 1) / (2 P) and the worst is 1 / P. Ties count as half, so that a prediction that says nothing scores as
    chance, where sorting would rank it by the order of conditions. No target gene is excluded. {note} NaN with one
    condition."""
    register(
        name,
        direction="higher",
        range=(0.0, 1.0),
        source=f"{CELL_EVAL}, {name if '_l' in name else name + '_cosine'}; Wu et al. 2024, PerturBench",
        needs=("deltas",),
    )(discrimination_score)


for _name, _metric, _words, _note in (
    ("discrimination_score", "cosine", "cosine", "It does not see the size of shifts."),
    ("discrimination_score_l1", "l1", "Manhattan", "Larger shifts can raise it: read it beside ``mae_delta``."),
    ("discrimination_score_l2", "l2", "Euclidean", "Larger shifts can raise it: read it beside ``mse_delta``."),
):
    _register_discrimination(_name, _metric, _words, _note)


@register("centroid_accuracy", direction="higher", range=(0.0, 1.0), source=SYSTEMA)
def centroid_accuracy(comparison: Comparison) -> np.ndarray:
    """Share of the other conditions' observed mean profiles that are farther away than the own one (Euclidean).

    Ties count as half; 0.5 is chance. NaN with one condition.
    """
    n = len(comparison.conditions)
    if n < 2:
        return np.full(n, np.nan)
    return 1.0 - nearer(comparison.predicted_profiles, comparison.observed_profiles, "euclidean") / (n - 1)
