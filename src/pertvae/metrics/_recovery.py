"""Differential expression: are the genes found in the observed cells found in the predicted ones?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.stats import false_discovery_control, mannwhitneyu
from sklearn.metrics import average_precision_score

from pertvae.metrics._comparison import Comparison, mean_rows, stream
from pertvae.metrics._distribution import subsample
from pertvae.metrics._registry import register

INF = float("inf")
FDR = 0.05
SMALLEST = 1e-300


class Changes(NamedTuple):
    """Differential expression of one condition against controls, one value a gene.

    Parameters
    ----------
    p
        Two-sided p values, 1 for a gene that is the same in all cells.
    sign
        Sign of the difference of means.
    significant
        Below a false discovery rate of 0.05.
    """

    p: np.ndarray
    sign: np.ndarray
    significant: np.ndarray


def wilcoxon(cells: sp.csr_matrix, controls: sp.csr_matrix) -> Changes:
    """Return the Wilcoxon rank-sum test of each gene, with correction for ties, and Benjamini-Hochberg over genes."""
    both = sp.vstack([cells, controls], format="csc")
    nonzero = np.diff(both.indptr) > 0
    # a gene with one value in all cells has no ranks, and the test would divide by zero
    values = both[:, nonzero].toarray()
    varies = np.ptp(values, axis=0) > 0
    n, tested = cells.shape[0], np.flatnonzero(nonzero)[varies]
    p = np.ones(cells.shape[1])
    if len(tested):
        x, y = values[:n, varies], values[n:, varies]
        p[tested] = mannwhitneyu(x, y, alternative="two-sided", method="asymptotic", axis=0).pvalue
    return Changes(p, np.sign(mean_rows(cells) - mean_rows(controls)), false_discovery_control(p) < FDR)


def both_sides(comparison: Comparison) -> list[tuple[Changes, Changes] | None]:
    """Return of each condition the tests of predicted and of observed cells, each against its own object's controls.

    Both sides have the same numbers of cells and of controls, drawn where one has more: the number of cells decides how
    many genes are significant. ``None`` with fewer than two cells.
    """
    if "wilcoxon" in comparison.cache:
        return comparison.cache["wilcoxon"]
    controls = _equal("", comparison.predicted_controls, comparison.observed_controls)
    found: list[tuple[Changes, Changes] | None] = []
    for name, p, o in zip(comparison.conditions, comparison.predicted_cells, comparison.observed_cells, strict=True):
        predicted, observed = _equal(name, p, o)
        enough = min(predicted.shape[0], controls[0].shape[0]) > 1
        found.append((wilcoxon(predicted, controls[0]), wilcoxon(observed, controls[1])) if enough else None)
    comparison.cache["wilcoxon"] = found
    return found


def _equal(name: str, predicted: sp.csr_matrix | None, observed: sp.csr_matrix | None) -> list[sp.csr_matrix]:
    """Return equally many cells of both sides; which ones depends on the name and the numbers of cells only."""
    if predicted is None or observed is None:
        raise ValueError('There are no control cells: register the metric with needs=("cells", "controls").')
    n = min(predicted.shape[0], observed.shape[0])

    def draw(side: str, x: sp.csr_matrix) -> sp.csr_matrix:
        return x[subsample(stream(0, f"differential expression {side}", name), x.shape[0], n)]

    # the predicted cells of a condition are in random order already, those of distinct sources first
    return [predicted[:n] if name else draw("predicted", predicted), draw("observed", observed)]


@register(
    "de_recovery",
    direction="higher",
    range=(0.0, 1.0),
    source="area under precision and recall of significant genes, as pr_auc of cell-eval; signs are ours",
    needs=("cells", "controls"),
    min_genes=2,
    resampled=False,
)
def de_recovery(comparison: Comparison) -> np.ndarray:
    """Average precision with which predicted differential expression ranks the genes found in the observed cells.

    Wilcoxon rank-sum tests of the condition against its own object's controls, equal numbers of cells on both sides.
    Found are the genes below a Benjamini-Hochberg false discovery rate of 0.05 in the observed cells; they are ranked
    by the p value in the predicted cells, and a gene predicted in the other direction than observed is ranked last,
    with those without any change. A prediction without variance between cells fails, however right its mean: every
    gene that differs at all is significant then. Chance is the share of genes that were found. NaN where none was.
    """
    values = []
    for pair in both_sides(comparison):
        if pair is None or not pair[1].significant.any():
            values.append(np.nan)
            continue
        predicted, observed = pair
        score = np.where(predicted.sign == observed.sign, -np.log10(np.maximum(predicted.p, SMALLEST)), 0.0)
        values.append(float(average_precision_score(observed.significant, score)))
    return np.array(values)


@register(
    "de_count_ratio",
    direction="one",
    range=(0.0, INF),
    source="numbers of significant genes, as de_nsig_counts of cell-eval",
    needs=("cells", "controls"),
    min_genes=2,
    resampled=False,
)
def de_count_ratio(comparison: Comparison) -> np.ndarray:
    """Number of significant genes in the predicted cells over that in the observed ones; the tests of de_recovery.

    Far above 1 for cells that vary too little. NaN where no gene is significant in the observed cells.
    """
    counts = [
        (np.nan, 0) if pair is None else (pair[0].significant.sum(), pair[1].significant.sum())
        for pair in both_sides(comparison)
    ]
    return np.array([predicted / observed if observed else np.nan for predicted, observed in counts])
