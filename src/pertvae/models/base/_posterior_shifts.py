"""Mean shifts of a posterior by perturbations, and how surely they are not zero.

For methods whose latents are not told apart by the model itself: what a perturbation does to a latent is read from the
posterior means of the training cells.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu
from scipy.stats import false_discovery_control

RIDGE = 1e-6
NULL_CONTROLS = 2000
MIN_NULL_CELLS = 20
NULL_DRAWS = 20_000
_COLUMNS = 512


def posterior_shifts(
    latent: np.ndarray, doses: sp.csr_matrix, groups: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean shifts of latents by one dose of each component, and their inclusion, both components x latents.

    Shifts are the least-squares fit of ``latent = group mean + sum_t d_t shift_t``. Where every cell has at most one
    component, at dose 1, and there is one group, that is the mean of the cells with the component minus that of the
    controls; a cell with a combination counts for all its components, whose shifts add up. What the design cannot tell
    apart (components that only occur together) is split evenly.

    Inclusion is ``1 - q``: q is the false discovery rate (Benjamini & Hochberg 1995, over all entries) at which the
    entry would be called, from a permutation null of the controls. In each permutation the controls are cut into halves
    at random; the difference of the halves' means over its standard error is a draw of what a shift over its standard
    error is when nothing happens. Draws are pooled over latents (about 20,000). Inclusion above 0.95 thus means: among
    all entries so far from zero less than 5% are expected to be chance. A component without cells has inclusion near 0.

    Parameters
    ----------
    latent
        Posterior means of training cells, cells x latents.
    doses
        Cells x components.
    groups
        Code of each cell's covariates (each combination of the categorical ones), whose means are nuisance.
    seed
        Of the permutations.
    """
    shift, variance, residual = least_squares_shifts(latent, doses, groups)
    control = np.diff(doses.tocsr().indptr) == 0
    cells = np.flatnonzero(control if control.sum() >= MIN_NULL_CELLS else np.ones(len(residual), dtype=bool))
    rng = np.random.default_rng(seed)
    if len(cells) > NULL_CONTROLS:
        cells = np.sort(rng.choice(cells, NULL_CONTROLS, replace=False))
    null = residual[cells] - residual[cells].mean(axis=0)
    sd = null.std(axis=0, ddof=1) if len(cells) > 1 else np.zeros(residual.shape[1])
    usable = sd > 1e-12
    inclusion = np.zeros_like(shift)
    if not usable.any():
        return shift, inclusion
    draws = np.sort(_null_draws(null[:, usable] / sd[usable], rng))
    observed = np.abs(shift[:, usable]) / (sd[usable] * np.sqrt(variance)[:, None])
    # share of draws at least as large, interpolated; never below one draw
    rank = np.interp(observed, draws, np.arange(1, len(draws) + 1), left=0.0)
    p = np.clip((len(draws) + 1 - rank) / (len(draws) + 1), None, 1.0)
    inclusion[:, usable] = 1 - false_discovery_control(p, axis=None).reshape(p.shape)
    return shift, inclusion


def least_squares_shifts(
    latent: np.ndarray, doses: sp.csr_matrix, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit ``latent = group mean + sum_t d_t shift_t`` by least squares.

    Parameters
    ----------
    latent, doses, groups
        See :func:`posterior_shifts`.

    Returns
    -------
    Shifts, components x latents; their variance in units of a cell's, one a component; residuals, cells x latents.
    """
    n_components = doses.shape[1]
    z, design = np.asarray(latent, dtype=np.float64), doses.astype(np.float64).tocsr()
    _, group = np.unique(groups, return_inverse=True)
    n_groups = int(group.max()) + 1
    one_hot = sp.csr_matrix((np.ones(len(group)), (np.arange(len(group)), group)), shape=(len(group), n_groups))
    joint = sp.hstack([one_hot, design], format="csr")
    gram = (joint.T @ joint).tocsc()
    information = gram.diagonal()[n_groups:]
    # so small that it decides only what the data leave open; relative to each component's doses, whatever their unit
    ridge = RIDGE * np.where(information > 0, information, 1.0)
    penalty = np.concatenate([np.zeros(n_groups), ridge])
    solver = splu((gram + sp.diags(penalty)).tocsc())
    solution = solver.solve(np.asarray(joint.T @ z))
    shift = solution[n_groups:]
    variance = np.empty(n_components)  # of a shift, in units of a cell's variance
    for start in range(0, n_components, _COLUMNS):
        n = min(_COLUMNS, n_components - start)
        rows = n_groups + start + np.arange(n)
        unit = np.zeros((len(penalty), n))
        unit[rows, np.arange(n)] = 1.0
        variance[start : start + n] = solver.solve(unit)[rows, np.arange(n)]

    return shift, variance, z - joint @ solution


def shrunken_shifts(latent: np.ndarray, doses: sp.csr_matrix, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return shifts, each component's shrunken to zero by its noise, and their posterior standard deviation.

    Of a least-squares shift with standard error s under a normal prior the posterior has mean ``f shift`` and variance
    ``f s^2``, with the factor f of the component estimated over its L latents (positive-part James-Stein):
    ``1 - max(L - 2, 1) / sum_l (shift_l / s_l)^2``, at least 0. A perturbation without a shift gets none, or a small
    one with a standard deviation that says so.

    Parameters
    ----------
    latent, doses, groups
        See :func:`posterior_shifts`.
    """
    shift, variance, residual = least_squares_shifts(latent, doses, groups)
    freedom = max(len(residual) - shift.shape[0] - len(np.unique(groups)), 1)
    sd = np.sqrt((residual**2).sum(axis=0) / freedom)
    usable = sd > 1e-12
    error = sd * np.sqrt(variance)[:, None]
    signal = ((shift[:, usable] / np.maximum(error[:, usable], 1e-12)) ** 2).sum(axis=1)
    factor = np.clip(1 - max(usable.sum() - 2, 1) / np.maximum(signal, 1e-12), 0.0, None)
    factor *= np.asarray((doses != 0).sum(axis=0)).ravel() > 0
    return np.where(usable, shift, 0.0) * factor[:, None], np.where(usable, error, 0.0) * np.sqrt(factor)[:, None]


def _null_draws(null: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return differences of the means of random halves over their standard error, absolute, of all latents."""
    n, n_latent = null.shape
    signs = np.tile(
        np.where(np.arange(n) < n // 2, -1.0 / (n // 2), 1.0 / (n - n // 2)), (-(-NULL_DRAWS // n_latent), 1)
    )
    difference = rng.permuted(signs, axis=1) @ null
    return np.abs(difference / np.sqrt(1 / (n // 2) + 1 / (n - n // 2))).ravel()
