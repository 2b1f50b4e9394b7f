"""Metrics in plain words, and which way is better."""

from __future__ import annotations

from typing import Any

from pertvae.metrics import registry

_PLAIN = {
    "l2_profile": (
        "error of mean expression",
        "Distance between predicted and observed mean expression of a condition (Euclidean, log1p of counts per "
        "10,000). The main score: no control cell stands on the side of the truth.",
    ),
    "pearson_delta_perturbed": (
        "direction beyond the common effect",
        "Correlation of predicted and observed mean expression after the mean of all training perturbations is "
        "subtracted: what is special to the condition. What every perturbation does alike earns nothing here.",
    ),
    "l2_delta": (
        "error of the shift",
        "Distance between predicted and observed shift from control cells. Small control groups add noise to the "
        "truth of this score.",
    ),
    "pearson_delta": (
        "direction of the shift",
        "Correlation of predicted and observed shift from control cells. An effect that all perturbations share "
        "raises it, and it does not see the size of an effect.",
    ),
    "slope": (
        "size of the shift",
        "Size of the predicted shift along the observed one. 1 is the right size, below 1 too weak, above 1 too "
        "strong. Noise in the truth lowers it for every method alike.",
    ),
    "energy_distance": (
        "error of the cell distribution",
        "Energy distance between predicted and observed cells: 0 when the clouds of cells are alike, not only their "
        "means.",
    ),
    "ate_correlation": (
        "correlation of all shifts together",
        "One correlation over all conditions and genes at once; strong perturbations dominate it.",
    ),
    "ate_r2": (
        "agreement of all shifts together",
        "Share of the variation of all observed shifts that the predicted ones explain, over all conditions and genes "
        "at once; it sees their size, and noise in the truth lowers it for every method alike.",
    ),
    "ate_correlation_top_20": (
        "correlation of the largest shifts",
        "One correlation over the 20 genes of each condition that moved most.",
    ),
    "ate_r2_top_20": (
        "agreement of the largest shifts",
        "Share of variation explained over the 20 genes of each condition that moved most. They are chosen by the "
        "truth, noise included.",
    ),
    "jaccard_top_20": ("overlap of the 20 most changed genes", "Shared genes among the 20 with the largest shift."),
    "jaccard_top_50": ("overlap of the 50 most changed genes", "Shared genes among the 50 with the largest shift."),
    "mae_delta": ("mean absolute error of the shift", "Mean over genes of the absolute difference of the shifts."),
    "mse_delta": ("mean squared error of the shift", "Mean over genes of the squared difference of the shifts."),
    "weighted_mse": (
        "error in the genes that change",
        "Squared error of mean expression, genes weighted by how much they differ from other conditions in cells that "
        "the error is not measured on.",
    ),
    "r2_delta": (
        "explained shift",
        "Share of the variation of the observed shift over genes that the predicted shift explains.",
    ),
    "variance_ratio": (
        "spread of the cells",
        "Variance of predicted cells over that of observed cells, all genes together. Copies of a mean score 0.",
    ),
    "gene_variance_agreement": (
        "agreement of gene variances",
        "Share of the differences between genes in cell-to-cell variance that the predicted cells have.",
    ),
    "discrimination_score": (
        "telling conditions apart (cosine)",
        "Is the predicted shift nearer to the observed shift of its own condition than to those of the others? Chance "
        "is (P + 1) / 2P with P conditions in a fold, near 0.5 with many. It saturates where effects are strong.",
    ),
    "discrimination_score_l1": (
        "telling conditions apart (L1)",
        "The same by L1 distance; larger shifts score better here, whatever their direction.",
    ),
    "discrimination_score_l2": ("telling conditions apart (L2)", "The same by Euclidean distance."),
    "centroid_accuracy": (
        "own condition nearest",
        "Share of the other observed conditions that lie farther from the predicted mean expression than its own.",
    ),
    "mmd2": (
        "difference of the cell distribution",
        "Squared maximum mean discrepancy between predicted and observed cells, Gaussian kernel; 0 when alike.",
    ),
    "frechet_distance": (
        "Fr\N{LATIN SMALL LETTER E WITH ACUTE}chet distance of cells",
        "Distance between the means and covariances of all predicted and all observed cells, in principal components.",
    ),
    "wasserstein2": (
        "transport distance of cells",
        "Least cost of moving predicted cells onto observed ones, in principal components. Never 0 for few cells.",
    ),
    "de_recovery": (
        "recovery of changed genes",
        "How well a differential expression test on the predicted cells ranks the genes that the same test finds in "
        "the observed cells (average precision). It needs cells that vary as real ones do.",
    ),
    "de_count_ratio": (
        "number of changed genes",
        "Genes found changed in predicted cells over those found in observed cells.",
    ),
    "relative_rmse": (
        "error of single cells",
        "Root mean squared difference of a predicted and an observed cell, relative to the size of expression. Cells "
        "that vary as real ones do are punished for it: read it beside the spread of the cells.",
    ),
    "interaction_auroc": (
        "finding interactions",
        "Do predicted deviations from the sum of single shifts find the genes that deviate? 0.5 is chance.",
    ),
}


def plain_name(metric: str) -> str:
    """Return a few plain words for a metric, its name when there are none."""
    return _PLAIN[metric][0] if metric in _PLAIN else metric


def explain(metric: str) -> str:
    """Return what a metric measures, with its name in tables and its source."""
    text = _PLAIN[metric][1] if metric in _PLAIN else ""
    if metric in registry:
        text = text or registry[metric].description
        text += f" Source: {registry[metric].source}."
    return f"{text} In the tables: {metric}.".strip()


def rising(metric: str) -> bool | None:
    """Return whether higher is better; ``None`` when 1 is best. Unknown metrics count as higher is better."""
    direction = registry[metric].direction if metric in registry else "higher"
    return {"higher": True, "lower": False, "one": None}[direction]


def comparable(metric: str, values: Any) -> Any:
    """Return values whose differences have a direction: as they are, or the distance from 1 where 1 is best."""
    return abs(values - 1.0) if rising(metric) is None else values


def loss(metric: str, values: Any, difference: bool = False) -> Any:
    """Return values for which lower is better; with ``difference`` they are differences of comparable values."""
    if rising(metric):
        return -values
    return values if difference else comparable(metric, values)


def best_value(metric: str) -> float:
    """Return the best possible comparable value of a metric; infinite where there is none."""
    if metric not in registry or rising(metric) is None:
        return 0.0
    low, high = registry[metric].range
    return high if rising(metric) else low
