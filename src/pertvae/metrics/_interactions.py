"""Interactions: does a prediction deviate from the sum of single shifts where the truth does?"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from pertvae.metrics._comparison import Comparison
from pertvae.metrics._moments import Moments, squared
from pertvae.metrics._profiles import AHLMANN
from pertvae.metrics._registry import register

TOP_SHARE = 0.05
FEWEST = 5
HALVINGS = 6


def rowwise_auroc(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each row, from ranks with ties shared; NaN without both classes."""
    ranks = rankdata(scores, axis=1)
    n = positive.sum(axis=1).astype(np.float64)
    pairs = n * (positive.shape[1] - n)
    above = (ranks * positive).sum(axis=1) - n * (n + 1) / 2
    return np.divide(above, pairs, out=np.full(len(n), np.nan), where=pairs > 0)


def noise_share(predicted: np.ndarray, observed: np.ndarray, noise: np.ndarray) -> float:
    """Return the share of the training cells' noise that stands in a prediction, 0 to 1.

    Parameters
    ----------
    predicted
        Prediction minus the sum of one half of the training cells; any shape.
    observed
        Truth minus the sum of the other half.
    noise
        The first sum minus the second, in which only noise is left.

    Notes
    -----
    Signs of ``predicted`` and of ``observed - share / 2 * noise`` agree in as many genes as they disagree. Signs, so
    that neither large effects nor the few genes with interactions decide.
    """
    sign = np.sign(predicted)

    def agreement(share: float) -> float:
        return float((sign * np.sign(observed - share / 2 * noise)).sum())

    low, high = 0.0, 1.0
    if agreement(low) >= 0:
        return low
    if agreement(high) <= 0:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if agreement(middle) < 0 else (low, middle)
    return (low + high) / 2


def interaction_scores(
    predicted: np.ndarray, observed: np.ndarray, additive: tuple[np.ndarray, np.ndarray], scale: np.ndarray
) -> np.ndarray:
    """Return the area under the ROC curve of each condition; see :func:`interaction_auroc`.

    Parameters
    ----------
    predicted, observed
        Deltas, conditions x genes.
    additive
        Sums of single shifts from two halves of the training cells, conditions x genes.
    scale
        Noise of each gene.
    """
    first, second = additive
    # both roles of the halves
    ours = np.stack([predicted - first, predicted - second])
    theirs = np.stack([observed - second, observed - first])
    noise = np.stack([first - second, second - first])
    theirs = (theirs - noise_share(ours, theirs, noise) / 2 * noise) / scale
    score = ours / scale * np.sign(theirs)
    genes = score.shape[-1]
    most = max(FEWEST, int(np.ceil(TOP_SHARE * genes)))
    order = np.argsort(-np.abs(theirs), axis=-1, kind="stable")[..., :most]
    positive = np.zeros(theirs.shape, dtype=bool)
    np.put_along_axis(positive, order, True, axis=-1)
    found = rowwise_auroc(positive.reshape(-1, genes), score.reshape(-1, genes))
    return found.reshape(2, -1).mean(axis=0)


def _scale(comparison: Comparison) -> np.ndarray:
    """Return the standard deviation of each gene within observed conditions, plus its median over genes.

    The median keeps genes that hardly vary from standing out by tiny differences (as in SAM, Tusher et al. 2001, PNAS).
    """
    if "noise of genes" not in comparison.cache:
        groups = Moments.stack([Moments.of(cells, squared(cells)) for cells in comparison.observed_cells])
        known = groups.n > 1
        within = (groups.variance[known] * (groups.n[known] - 1)[:, None]).sum(axis=0)
        sd = np.sqrt(within / max(float((groups.n[known] - 1).sum()), 1.0))
        floor = np.median(sd) or sd.mean()
        comparison.cache["noise of genes"] = sd + floor if floor > 0 else np.ones(len(sd))
    return comparison.cache["noise of genes"]


@register(
    "interaction_auroc",
    direction="higher",
    range=(0.0, 1.0),
    source=f"ours: signed, with noise kept apart by halves of cells; the question of {AHLMANN}",
    needs=("deltas", "additive", "observed_cells"),
    min_genes=2 * FEWEST,
)
def interaction_auroc(comparison: Comparison) -> np.ndarray:
    """How well deviations from the sum of single shifts are predicted, in the genes that deviate most; 0.5 is chance.

    Positive are the 5% of genes (at least 5) in which the observed shift deviates most from the sum of the shifts of
    the single perturbations, in units of the noise of each gene. Genes are ranked by the predicted deviation in the
    observed direction (negative where it points the other way), and the area under the ROC curve is that of the
    positive ones. The mean over both roles of two halves A and B of the training cells of singles and controls: the
    predicted deviation is that from the sum of half A, the observed one that from the sum of half B.

    Why so. With one sum on both sides its noise stands in both, and even no change scores high. With absolute
    deviations, noisy genes deviate most on both sides without any interaction, and predictions of no change or of the
    plain sum score 0.7 to 0.9 where there is none; signs are right as often as wrong then, and score 0.5. A prediction
    was trained on both halves, though, and the noise of B that it holds has the opposite sign in the observed
    deviation: the plain sum would score 0.2. So the base of the truth is moved from the sum of B towards that of both
    halves by the share of the training noise that the prediction holds (0 for no change, 1 for the plain sum of all
    cells), which is estimated over all genes and conditions: signs must agree as often as they disagree. A prediction
    that holds true interactions in most genes has that share underestimated, and scores lower than it could.

    What remains: where interactions mostly weaken the sum, no change and a shrunken sum deviate in the right direction
    and score above 0.5. Read it beside the row of no change. NaN for conditions without such sums: singles, and
    combinations of which a component has too few training cells.
    """
    if comparison.additive is None:
        raise ValueError('There are no sums of single shifts: register the metric with needs=("additive",).')
    predicted, observed = comparison.deltas
    found = np.full(len(predicted), np.nan)
    known = ~np.isnan(comparison.additive[0]).any(axis=1) & ~np.isnan(comparison.additive[1]).any(axis=1)
    if known.any():
        halves = (comparison.additive[0][known], comparison.additive[1][known])
        found[known] = interaction_scores(predicted[known], observed[known], halves, _scale(comparison))
    return found
