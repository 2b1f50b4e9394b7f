"""Latents against true latents, for simulated screens, and what basal latents still say of the perturbation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import balanced_accuracy_score, r2_score
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pertvae.metrics._distribution import subsample
from pertvae.metrics._known_truth import match_rows

Latents = pd.DataFrame | np.ndarray


@dataclass(frozen=True)
class MCCScore:
    """How well latents were recovered one by one.

    Parameters
    ----------
    mcc
        Mean of ``correlations``: 1 when every true latent was found, up to order, sign and scale.
    correlations
        Absolute Pearson correlation of each true latent with the latent matched to it; 0 where it has none.
    matching
        Column of the latents for each column of the truth; -1 where there are too few latents.
    """

    mcc: float
    correlations: tuple[float, ...]
    matching: tuple[int, ...]


def mcc(latents: Latents, truth: Latents) -> MCCScore:
    """Return the mean correlation coefficient of latents and true latents, matched one to one.

    The mean absolute Pearson correlation over true latents, after the matching that makes it largest (Hungarian
    method): what identifiability up to permutation and scaling promises (PerturbedVAE, arXiv 2605.19343, its Table 1;
    Khemakhem et al. 2020). Matching is done on the same cells, so with few cells, or many more latents than true ones,
    it is well above 0 for latents that know nothing: compare with shuffled rows.

    Parameters
    ----------
    latents
        Learned latents, cells x latents. More latents than true ones are allowed, and as few as one.
    truth
        True latents, cells x true latents (``obsm["X_truth_latent"]`` of a simulated screen). With two DataFrames,
        cells are matched by name.

    Returns
    -------
    MCCScore
        ``mcc``, the ``correlations`` behind it, and the ``matching``. A true latent without a partner counts as 0, and
        so does a learned latent that is constant.

    Raises
    ------
    KeyError
        If a cell of the truth has no latents.
    ValueError
        If the numbers of cells differ, there are fewer than two, values are missing, or a true latent is constant.
    """
    z, t = _checked(latents, truth)
    correlation = np.abs(_standardised(t).T @ _standardised(z)) / len(z)
    rows, columns = linear_sum_assignment(correlation, maximize=True)
    matching, found = np.full(t.shape[1], -1), np.zeros(t.shape[1])
    matching[rows] = columns
    found[rows] = np.minimum(correlation[rows, columns], 1.0)
    return MCCScore(float(found.mean()), tuple(float(c) for c in found), tuple(int(m) for m in matching))


def block_r2(latents: Latents, truth: Latents, *, n_splits: int = 5, seed: int = 0) -> float:
    """Return how much of a block of true latents a linear map of a block of learned ones explains.

    The identifiability of PerturbedVAE (arXiv 2605.19343, section 7) leaves an invertible linear map open within the
    block of invariant latents, and a permutation with scales, which is linear, within the responsive one: 1 says that
    the block was found. Least squares on the other folds, R2 of the cells left out, mean over the true latents, so a
    block of many latents gains nothing by fitting noise.

    What one block says of the other is not leakage by itself: where the truth makes responsive latents depend on
    invariant ones, compare ``block_r2(learned_invariant, true_responsive)`` with
    ``block_r2(true_invariant, true_responsive)``.

    Parameters
    ----------
    latents
        Learned block, cells x latents.
    truth
        True block, cells x true latents. With two DataFrames, cells are matched by name.
    n_splits
        Folds, of cells in random order.
    seed
        Of that order.

    Returns
    -------
    float
        At most 1; 0 for a block that knows nothing, a little below with few cells.

    Raises
    ------
    KeyError
        If a cell of the truth has no latents.
    ValueError
        If the numbers of cells differ, there are fewer than ``2 * n_splits``, values are missing, or a true latent is
        constant.
    """
    z, t = _checked(latents, truth)
    _check_folds(n_splits)
    if len(z) < 2 * n_splits:
        raise ValueError(f"There are {len(z)} cells: {n_splits} folds need at least {2 * n_splits}.")
    folds = KFold(n_splits, shuffle=True, random_state=seed)
    # scales far apart would make least squares take a small latent for a numerical zero
    model = make_pipeline(StandardScaler(), LinearRegression())
    predicted = cross_val_predict(model, z, t, cv=folds)
    return float(r2_score(t, predicted.reshape(t.shape), multioutput="uniform_average"))


@dataclass(frozen=True)
class LeakageScore:
    """How much of the perturbation can be read from a basal latent.

    Parameters
    ----------
    score
        ``(accuracy - chance) / (1 - chance)``: 0 none, 1 all of it; around 0 it may be slightly negative.
    accuracy
        Balanced accuracy of the classifier on cells left out: the mean over labels of the share found.
    chance
        That of guessing, 1 / number of labels.
    """

    score: float
    accuracy: float
    chance: float


def leakage(
    basal: Latents,
    labels: Sequence[str] | pd.Series | np.ndarray,
    *,
    n_splits: int = 5,
    max_cells: int = 1000,
    seed: int = 0,
) -> LeakageScore:
    """Return how much of the perturbation can be read from basal latents that should be free of it.

    Multinomial logistic regression from standardised latents to labels, each label with the same weight, balanced
    accuracy on the cells left out of the fit, rescaled so that guessing is 0. It asks whether cells can be told apart,
    not how far they are: a small shift of every cell of one label in a latent of little spread counts as much as a
    large one, and one leaking label among a hundred counts little. How large the share of a perturbation's shift is
    that stays in the basal latent is another question, that of condition means. In a real screen a perturbation that
    changes the basal state itself, as the cell cycle, leaks rightly.

    Parameters
    ----------
    basal
        Basal latents, cells x latents, for example from ``get_latent_representation(kind="basal")``.
    labels
        Perturbation of each cell, controls among them or not. A Series is matched by name to a DataFrame of latents.
    n_splits
        Stratified folds. Labels with fewer cells are left out, with a warning.
    max_cells
        At most this many cells of each label, drawn without replacement.
    seed
        Of that draw and of the folds; the global random state is untouched.

    Returns
    -------
    LeakageScore
        ``score``, ``accuracy`` and ``chance``.

    Raises
    ------
    KeyError
        If a labelled cell has no latents.
    ValueError
        If there is not one label a cell, values are missing, or fewer than two labels have ``n_splits`` cells.
    """
    _check_folds(n_splits)
    if max_cells < n_splits:
        raise ValueError(f"max_cells={max_cells} must be at least n_splits={n_splits}.")
    basal, labels = match_rows(basal, labels, "basal", "labels")
    z, column = _matrix(basal, "basal"), np.asarray(labels, dtype=object)
    if column.shape != (len(z),):
        raise ValueError(f"basal has {len(z)} cells, labels the shape {column.shape}: pass one label a cell.")
    if pd.isna(column).any():
        raise ValueError(f"labels has {int(pd.isna(column).sum())} missing values.")
    codes, names = pd.factorize(column.astype(str), sort=True)
    counts = np.bincount(codes, minlength=len(names))
    few = counts < n_splits
    if few.any():
        warnings.warn(
            f"leakage: {int(few.sum())} of {len(names)} labels have fewer than {n_splits} cells and are left out: "
            f"{[str(n) for n in names[few][:5]]}.",
            stacklevel=2,
        )
    if (~few).sum() < 2:
        raise ValueError(f"leakage needs at least two labels with {n_splits} cells or more, got {(~few).sum()}.")
    rng = np.random.default_rng(seed)
    cells = [np.flatnonzero(codes == c) for c in np.flatnonzero(~few)]
    chosen = np.concatenate([c[subsample(rng, len(c), max_cells)] for c in cells])
    folds = StratifiedKFold(n_splits, shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=300))
    with warnings.catch_warnings():
        # an accuracy does not wait for the last digits of coefficients
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = cross_val_predict(model, z[chosen], codes[chosen], cv=folds)
    accuracy, chance = float(balanced_accuracy_score(codes[chosen], found)), 1.0 / len(cells)
    return LeakageScore((accuracy - chance) / (1 - chance), accuracy, chance)


def _checked(latents: Latents, truth: Latents) -> tuple[np.ndarray, np.ndarray]:
    """Return both as matrices with one row a cell; refuse what has no score."""
    latents, truth = match_rows(latents, truth, "latents", "truth")
    z, t = _matrix(latents, "latents"), _matrix(truth, "truth")
    if len(z) != len(t):
        raise ValueError(f"latents has {len(z)} cells, truth {len(t)}: both need one row a cell.")
    if len(z) < 2:
        raise ValueError(f"There are {len(z)} cells: a correlation needs at least two.")
    constant = np.flatnonzero(~_standardised(t).any(axis=0))
    if len(constant):
        raise ValueError(f"truth: column {constant[0]} is constant: leave it out, it cannot be recovered.")
    return z, t


def _matrix(values: Latents, name: str) -> np.ndarray:
    """Return cells x latents in double precision."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"{name} has shape {x.shape}: pass cells x latents.")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} has {int((~np.isfinite(x)).sum())} values that are missing or infinite.")
    return x


def _standardised(x: np.ndarray) -> np.ndarray:
    """Return columns with mean 0 and standard deviation 1; a constant column gives zeros."""
    centred = x - x.mean(axis=0)
    sd = centred.std(axis=0)
    # relative to the values: centring a constant column leaves rounding errors, not zeros
    varies = sd > 1e-12 * np.abs(x).max(axis=0)
    return np.divide(centred, sd, out=np.zeros_like(centred), where=varies)


def _check_folds(n_splits: int) -> None:
    if n_splits < 2:
        raise ValueError(f"n_splits={n_splits} must be at least 2.")
