"""Effects of perturbations on the total counts of a cell.

log total = covariates + sum_t d_t b_t + noise, with b_t ~ N(0, tau^2) shrunken by an empirical-Bayes tau. Whether
predictions use the effects is decided by the log-normal likelihood of validation cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import lsmr

FIXED_SCALE = 1e3


@dataclass(frozen=True)
class LibraryEffects:
    """Fitted effects on log total counts.

    Parameters
    ----------
    effects
        Shrunken change of the natural log of total counts by one dose of each component.
    use
        Whether validation cells are better described with the effects.
    log_likelihood, log_likelihood_control
        Mean log-normal log-likelihood of the validation cells' totals with the effects, and without (around the
        controls' means, or those of all training cells if these do better), nats a cell; NaN without validation
        cells.
    control_median
        Median total counts of the training controls (of all training cells when no control trains).
    """

    effects: np.ndarray
    use: bool
    log_likelihood: float
    log_likelihood_control: float
    control_median: float


def fit_library_effects(
    totals: np.ndarray, doses: sp.csr_matrix, groups: np.ndarray, train: np.ndarray, valid: np.ndarray
) -> LibraryEffects:
    """Fit effects on library size from training cells and judge them on validation cells.

    Parameters
    ----------
    totals
        Library of every cell, counts.
    doses
        Cells x components.
    groups
        Code of each cell's covariates (each combination of the categorical ones), whose means are nuisance.
    train, valid
        Row indices.
    """
    n_components = doses.shape[1]
    usable = totals > 0
    train, valid = train[usable[train]], valid[usable[valid]]
    y = np.log(np.maximum(totals, 1e-12))
    control = np.diff(doses.indptr) == 0
    reference = train[control[train]]
    reference = train if len(reference) < 2 else reference
    median = float(np.median(totals[reference])) if len(reference) else float("nan")
    if len(train) < 3:
        return LibraryEffects(np.zeros(n_components), False, float("nan"), float("nan"), median)

    n_groups = int(groups.max()) + 1
    one_hot = sp.csr_matrix((np.ones(len(groups)), (np.arange(len(groups)), groups)), shape=(len(groups), n_groups))
    fixed, design = one_hot[train], doses[train].astype(np.float64)

    def solve(penalty: float) -> tuple[np.ndarray, np.ndarray]:
        # lsmr damps all columns alike: group means are scaled up so that they are hardly penalised
        joint = sp.hstack([fixed * FIXED_SCALE, design / np.sqrt(penalty)], format="csr")
        center = y[train].mean()
        solution = lsmr(joint, y[train] - center, damp=1.0, atol=1e-10, btol=1e-10, maxiter=2000)[0]
        return solution[:n_groups] * FIXED_SCALE + center, solution[n_groups:] / np.sqrt(penalty)

    means, raw = solve(1e-3)
    residual = y[train] - fixed @ means - design @ raw
    variance = max(float(residual.var()), 1e-12)
    information = np.asarray(design.multiply(design).sum(axis=0)).ravel()
    seen = information > 0
    excess = raw[seen] ** 2 - variance / information[seen]
    tau2 = max(float(np.average(excess, weights=np.minimum(information[seen], 100))), 0.0) if seen.any() else 0.0
    effects = np.zeros(n_components)
    if tau2 > 0:
        means, effects = solve(variance / tau2)
        residual = y[train] - fixed @ means - design @ effects
        variance = max(float(residual.var()), 1e-12)
    if not len(valid):
        return LibraryEffects(effects, False, float("nan"), float("nan"), median)
    with_effects = _log_normal(y[valid], one_hot[valid] @ means + doses[valid] @ effects, variance)
    alone = max(_without_effects(y, one_hot, train, valid, cells) for cells in (reference, train))
    return LibraryEffects(effects, bool(tau2 > 0 and with_effects > alone), with_effects, alone, median)


def _without_effects(
    y: np.ndarray, one_hot: sp.csr_matrix, train: np.ndarray, valid: np.ndarray, cells: np.ndarray
) -> float:
    """Return the log-likelihood of validation cells around the group means of some training cells.

    The spread is that of all training cells, so that few controls do not lose by their uncertain spread.
    """
    counts = np.asarray(one_hot[cells].sum(axis=0)).ravel()
    means = np.where(counts > 0, (one_hot[cells].T @ y[cells]) / np.maximum(counts, 1), y[cells].mean())
    spread = max(float(np.mean((y[train] - one_hot[train] @ means) ** 2)), 1e-12)
    return _log_normal(y[valid], one_hot[valid] @ means, spread)


def _log_normal(log_totals: np.ndarray, mean: np.ndarray, variance: float) -> float:
    """Return the mean log density of totals under a log-normal, nats a cell."""
    deviation = (log_totals - mean) ** 2 / variance
    return float((-0.5 * (deviation + np.log(2 * np.pi * variance)) - log_totals).mean())
