"""Metrics of mean profiles and of shifts."""

from __future__ import annotations

import numpy as np

from pertvae.metrics._comparison import Comparison
from pertvae.metrics._registry import register

INF = float("inf")
AHLMANN = "Ahlmann-Eltze, Huber and Anders 2025, Nature Methods"
SYSTEMA = "Systema, Nature Biotechnology 2025"


def rowwise_pearson(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of each pair of rows.

    A constant prediction says nothing about direction and scores 0, so that it is neither rewarded nor left out of a
    mean over conditions; a constant truth gives NaN.
    """
    p = predicted - predicted.mean(axis=-1, keepdims=True)
    o = observed - observed.mean(axis=-1, keepdims=True)
    # relative to the values: centring a constant row leaves rounding errors, not zeros
    flat_p = np.linalg.norm(p, axis=-1) <= 1e-12 * np.linalg.norm(predicted, axis=-1)
    flat_o = np.linalg.norm(o, axis=-1) <= 1e-12 * np.linalg.norm(observed, axis=-1)
    scale = np.linalg.norm(p, axis=-1) * np.linalg.norm(o, axis=-1)
    r = np.divide((p * o).sum(axis=-1), scale, out=np.zeros(np.shape(scale)), where=scale > 0)
    return np.where(flat_o, np.nan, np.where(flat_p, 0.0, np.clip(r, -1.0, 1.0)))


@register("l2_profile", direction="lower", range=(0.0, INF), source=f"{AHLMANN}; on profiles, not shifts")
def l2_profile(comparison: Comparison) -> np.ndarray:
    """Euclidean distance between the mean log1p CP10k profiles of predicted and observed cells."""
    return np.linalg.norm(comparison.predicted_profiles - comparison.observed_profiles, axis=1)


@register(
    "pearson_delta_perturbed",
    direction="higher",
    range=(-1.0, 1.0),
    source=SYSTEMA,
    needs=("reference_profile",),
    min_genes=2,
)
def pearson_delta_perturbed(comparison: Comparison) -> np.ndarray:
    """Pearson correlation of profiles centred on the mean of the training perturbed conditions."""
    center = comparison.reference_profile
    predicted = comparison.predicted_profiles - center
    # the mean itself, computed another way, differs by rounding: that is no direction
    same = np.linalg.norm(predicted, axis=1) <= 1e-9 * np.linalg.norm(comparison.predicted_profiles, axis=1)
    return rowwise_pearson(np.where(same[:, None], 0.0, predicted), comparison.observed_profiles - center)


@register("l2_delta", direction="lower", range=(0.0, INF), source=AHLMANN, needs=("deltas",))
def l2_delta(comparison: Comparison) -> np.ndarray:
    """Euclidean distance between the predicted and the observed shift."""
    predicted, observed = comparison.deltas
    return np.linalg.norm(predicted - observed, axis=1)


@register("pearson_delta", direction="higher", range=(-1.0, 1.0), source=AHLMANN, needs=("deltas",), min_genes=2)
def pearson_delta(comparison: Comparison) -> np.ndarray:
    """Pearson correlation over genes of the predicted and the observed shift."""
    return rowwise_pearson(*comparison.deltas)


@register("slope", direction="one", range=(-INF, INF), source="least squares through the origin", needs=("deltas",))
def slope(comparison: Comparison) -> np.ndarray:
    """Size of the predicted shift along the observed one: 1 is right, below 1 is under-predicted.

    The regression through the origin of the predicted on the observed shift, <p, o> / <o, o>. Sampling noise of the
    observed shift stands in the denominator and lowers the slope of every prediction alike: read it beside that of a
    technical duplicate or an oracle. NaN when nothing is observed.
    """
    predicted, observed = comparison.deltas
    norm = (observed**2).sum(axis=1)
    return np.divide((predicted * observed).sum(axis=1), norm, out=np.full(len(norm), np.nan), where=norm > 0)


def _top(deltas: np.ndarray, k: int) -> np.ndarray:
    """Return which genes are among the ``k`` with the largest absolute shift; genes that do not move never are."""
    size = np.abs(deltas)
    order = np.argsort(-size, axis=1, kind="stable")[:, :k]
    top = np.zeros(size.shape, dtype=bool)
    np.put_along_axis(top, order, True, axis=1)
    return top & (size > 0)


def jaccard(predicted: np.ndarray, observed: np.ndarray, k: int) -> np.ndarray:
    """Return the Jaccard index of the ``k`` genes with the largest absolute shift, one value a row."""
    p, o = _top(predicted, k), _top(observed, k)
    union = (p | o).sum(axis=1).astype(float)
    return np.divide((p & o).sum(axis=1), union, out=np.full(len(union), np.nan), where=o.any(axis=1))


def _register_jaccard(k: int) -> None:
    def jaccard_top(comparison: Comparison) -> np.ndarray:
        return jaccard(*comparison.deltas, k)

    jaccard_top.__doc__ = f"Jaccard index of the {k} genes with the largest absolute predicted and observed shift."
    register(
        f"jaccard_top_{k}",
        direction="higher",
        range=(0.0, 1.0),
        source="CRADLE-VAE, arXiv 2409.05484",
        needs=("deltas",),
        min_genes=k + 1,
    )(jaccard_top)


for _k in (20, 50):
    _register_jaccard(_k)
