"""The measures of average treatment effects of the SAMS-VAE paper: all conditions and genes in one vector.

Effects are differences of means of log2(1 + 1e4 x / sum x); the shifts here are the same in natural logarithms, which
neither a correlation nor R2 sees. Strong perturbations and variable genes dominate.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import r2_score

from pertvae.metrics._comparison import Comparison
from pertvae.metrics._profiles import rowwise_pearson
from pertvae.metrics._registry import register

INF = float("inf")
SAMSVAE = "SAMS-VAE, arXiv 2311.02794"
TOP = 20


def r2(predicted: np.ndarray, observed: np.ndarray) -> float:
    """Return the coefficient of determination of vectors; NaN when the observed values are all equal."""
    return float(r2_score(observed, predicted)) if np.ptp(observed) > 0 else float("nan")


def strongest(predicted: np.ndarray, observed: np.ndarray, k: int = TOP) -> tuple[np.ndarray, np.ndarray]:
    """Return as vectors the entries of the ``k`` genes with the largest absolute observed effect in each row."""
    order = np.argsort(-np.abs(observed), axis=1, kind="stable")[:, :k]
    return tuple(np.take_along_axis(m, order, axis=1).ravel() for m in (predicted, observed))  # type: ignore[return-value]


@register(
    "ate_correlation",
    direction="higher",
    range=(-1.0, 1.0),
    source=SAMSVAE,
    level="pooled",
    needs=("deltas",),
    min_genes=2,
)
def ate_correlation(comparison: Comparison) -> float:
    """One Pearson correlation of the flattened condition x gene matrices of average treatment effects.

    Strong perturbations and variable genes dominate.
    """
    predicted, observed = comparison.deltas
    return float(rowwise_pearson(predicted.ravel(), observed.ravel()))


@register(
    "ate_r2", direction="higher", range=(-INF, 1.0), source=SAMSVAE, level="pooled", needs=("deltas",), min_genes=2
)
def ate_r2(comparison: Comparison) -> float:
    """One R2 of the flattened condition x gene matrices of average treatment effects; sees their size.

    The observed effects' sampling noise and the depth at which both sides were counted lower it for every method.
    """
    predicted, observed = comparison.deltas
    return r2(predicted.ravel(), observed.ravel())


@register(
    "ate_correlation_top_20",
    direction="higher",
    range=(-1.0, 1.0),
    source=SAMSVAE,
    level="pooled",
    needs=("deltas",),
    min_genes=TOP + 1,
)
def ate_correlation_top_20(comparison: Comparison) -> float:
    """Like ate_correlation, over the 20 genes of each condition with the largest observed effect."""
    return float(rowwise_pearson(*strongest(*comparison.deltas)))


@register(
    "ate_r2_top_20",
    direction="higher",
    range=(-INF, 1.0),
    source=SAMSVAE,
    level="pooled",
    needs=("deltas",),
    min_genes=TOP + 1,
)
def ate_r2_top_20(comparison: Comparison) -> float:
    """Like ate_r2, over the 20 genes of each condition with the largest observed effect."""
    return r2(*strongest(*comparison.deltas))
