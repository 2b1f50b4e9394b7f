"""Positive controls: what a repeat of the experiment would score.

The technical duplicate lets one random half of the held-out cells predict the other. The interpolated duplicate of
Shift Bioscience's calibrated metrics (2025) takes from the half only what it knows for sure: (1 - p) times the half's
mean plus p times the mean of the training perturbed conditions, p being the p-value, gene by gene, of the difference
between the two (one-sample t test).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scipy import stats

from pertvae._expression import log1p_cp10k, mean_profile
from pertvae.metrics import evaluate, registry

if TYPE_CHECKING:
    from pertvae.benchmark._score import Scorer

DUPLICATE, INTERPOLATED, ORACLE = "duplicate", "interpolated duplicate", "oracle"
N_HALVES = 3


def duplicate(scorer: Scorer, interpolated: bool = False) -> pd.DataFrame:
    """Score one random half of the held-out cells against the other, mean over a few divisions.

    Parameters
    ----------
    scorer
        Held-out cells of a fold.
    interpolated
        Shrink what the half says towards the mean of the training perturbed conditions. There are no cells with such a
        mean, so metrics of cells are left out.
    """
    metrics = [m for m in scorer.usable if not (interpolated and registry[m].needs & {"cells", "controls"})]
    tables = []
    for i in range(N_HALVES):
        for context, observed in scorer.observed.items():
            first, second = halves(observed, scorer, seed=i)
            arguments = scorer.arguments(context)
            if interpolated:
                first = interpolate(first, scorer, context)
            tables.append(scorer.named(evaluate(first, second, **arguments, metrics=metrics), context))
    joined = scorer.joined(tables)
    return joined.groupby(["unit", "metric"], sort=False, as_index=False)[["value", "lower", "upper"]].mean()


def halves(observed: AnnData, scorer: Scorer, seed: int) -> tuple[AnnData, AnnData]:
    """Return two random halves of the cells of every condition."""
    rng = np.random.default_rng([seed, 7])
    codes = np.unique(scorer.canonical(observed.obs[scorer.perturbation_key]), return_inverse=True)[1]
    order = rng.permutation(observed.n_obs)
    order = order[np.argsort(codes[order], kind="stable")]
    place = np.arange(observed.n_obs) - np.searchsorted(codes[order], codes[order])
    first = np.zeros(observed.n_obs, dtype=bool)
    first[order[place % 2 == 0]] = True
    return observed[first].copy(), observed[~first].copy()


def interpolate(half: AnnData, scorer: Scorer, context: str) -> AnnData:
    """Return the interpolated profiles of a half as a prediction without cells."""
    labels = scorer.canonical(half.obs[scorer.perturbation_key])
    center = scorer.training[context].center.loc[half.var_names].to_numpy(dtype=float)
    controls = np.flatnonzero(labels == scorer.control[0])
    if len(controls):
        base = mean_profile(half.X, controls)
    else:
        base = mean_profile(scorer.adata.X, scorer.control_rows(context, "train"))
    units = [u.label for u in scorer.units(context)]
    profiles = np.stack([_interpolated(half.X[np.flatnonzero(labels == u)], center) for u in units])
    shifts = pd.DataFrame(profiles - base, index=units, columns=half.var_names)
    return scorer.as_prediction(shifts, base, "interpolated duplicate")


def _interpolated(x: sp.csr_matrix, center: np.ndarray) -> np.ndarray:
    """Return (1 - p) mean + p center, gene by gene, p from a one-sample t test against the center."""
    y = log1p_cp10k(sp.csr_matrix(x))
    n = y.shape[0]
    mean = np.asarray(y.mean(axis=0)).ravel()
    if n < 2:
        return center
    variance = np.maximum(np.asarray(y.multiply(y).mean(axis=0)).ravel() - mean**2, 0.0) * n / (n - 1)
    error = np.sqrt(variance / n)
    # a gene that is silent in the half has no variance, and no evidence against the center
    t = np.divide(mean - center, error, out=np.zeros_like(mean), where=error > 0)
    p = 2 * stats.t.sf(np.abs(t), n - 1)
    return (1 - p) * mean + p * center
