"""Errors of shifts, gene by gene, one value a condition."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import r2_score

from pertvae.metrics._comparison import Comparison
from pertvae.metrics._registry import register

INF = float("inf")
CELL_EVAL = "cell-eval (Arc Institute, Virtual Cell Challenge 2025)"


def rowwise_r2(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return the coefficient of determination of each pair of rows; NaN where the observed row is constant."""
    found = np.full(len(observed), np.nan)
    varies = np.ptp(observed, axis=1) > 0
    if varies.any():
        found[varies] = r2_score(observed[varies].T, predicted[varies].T, multioutput="raw_values")
    return found


@register("mae_delta", direction="lower", range=(0.0, INF), source=CELL_EVAL, needs=("deltas",))
def mae_delta(comparison: Comparison) -> np.ndarray:
    """Mean over genes of the absolute difference of the predicted and the observed shift.

    Where most genes do not move, predicting no change is hard to beat: read it beside ``weighted_mse``.
    """
    predicted, observed = comparison.deltas
    return np.abs(predicted - observed).mean(axis=1)


@register("mse_delta", direction="lower", range=(0.0, INF), source=CELL_EVAL, needs=("deltas",))
def mse_delta(comparison: Comparison) -> np.ndarray:
    """Mean over genes of the squared difference of the predicted and the observed shift: l2_delta squared over genes.

    Where most genes do not move, predicting no change is hard to beat: read it beside ``weighted_mse``.
    """
    predicted, observed = comparison.deltas
    return ((predicted - observed) ** 2).mean(axis=1)


@register(
    "r2_delta",
    direction="higher",
    range=(-INF, 1.0),
    source="coefficient of determination over genes (PerturBench, arXiv 2408.10609)",
    needs=("deltas",),
    min_genes=2,
)
def r2_delta(comparison: Comparison) -> np.ndarray:
    """Coefficient of determination over genes of the predicted for the observed shift; sees their size.

    1 - sum (o - p)^2 / sum (o - mean o)^2, so 0 for the observed shift's own mean and below 0 for worse. The observed
    shift's sampling noise lowers it for every prediction alike. NaN when all genes move alike.
    """
    return rowwise_r2(*comparison.deltas)
