"""Metrics against a known truth, for simulated screens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from pertvae._labels import hint


def match_rows(values: Any, truth: Any, name: str, truth_name: str) -> tuple[Any, Any]:
    """Return both, of two tables with the rows of ``values`` in the order of those of ``truth``, by name."""
    if not (isinstance(values, pd.DataFrame) and isinstance(truth, (pd.DataFrame, pd.Series))):
        return values, truth
    missing = [row for row in truth.index if row not in values.index]
    if missing:
        raise KeyError(f"{name} has no row {missing[0]!r} ({len(missing)} missing).{hint(missing[0], values.index)}")
    for table, what in ((values, name), (truth, truth_name)):
        if not table.index.is_unique:
            raise ValueError(f"{what} has rows with the same name: {table.index[table.index.duplicated()][0]!r}.")
    return values.loc[truth.index], truth


@dataclass(frozen=True)
class MaskScore:
    """How well a mask was recovered, latents matched one to one.

    Parameters
    ----------
    precision
        Share of the mask's entries that are true.
    recall
        Share of the true entries that the mask has.
    f1
        Harmonic mean of the two.
    matching
        Column of the mask for each column of the truth; -1 where the mask has too few.
    """

    precision: float
    recall: float
    f1: float
    matching: tuple[int, ...]


def mask_f1(mask: pd.DataFrame | np.ndarray, truth: pd.DataFrame | np.ndarray, *, threshold: float = 0.5) -> MaskScore:
    """Return precision, recall and F1 of a mask after matching latents to the true ones.

    The order of latents is arbitrary. They are matched one to one so that the number of true positives is largest
    (Hungarian method, as in the simulations of SAMS-VAE, arXiv 2311.02794), which also maximises F1. Entries in
    latents left unmatched count as false positives of the mask, or as missed.

    Parameters
    ----------
    mask
        Inclusion probabilities or a binary mask, perturbations x latents; ``abs(mask) > threshold`` is on. For
        effects without a mask pass a threshold in their units.
    truth
        The true mask, perturbations x true latents; what is not zero is on. With two DataFrames, rows are matched by
        name.
    threshold
        Above it an entry is on.

    Returns
    -------
    MaskScore
        ``precision``, ``recall``, ``f1`` and the ``matching``. Precision is NaN when the mask is empty, recall when
        the truth is; F1 is then 0, or NaN when both are.

    Raises
    ------
    KeyError
        If a perturbation of the truth has no row in the mask.
    ValueError
        If the numbers of rows differ, names of rows repeat, or values are missing.
    """
    mask, truth = match_rows(mask, truth, "mask", "truth")
    values, true = np.asarray(mask, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if values.ndim != 2 or true.ndim != 2 or len(values) != len(true):
        raise ValueError(f"mask has shape {values.shape}, truth {true.shape}: both need one row a perturbation.")
    if np.isnan(values).any() or np.isnan(true).any():
        raise ValueError("mask or truth has missing values (NaN).")
    found, wanted = np.abs(values) > threshold, true != 0
    hits = wanted.T.astype(int) @ found.astype(int)
    rows, columns = linear_sum_assignment(hits, maximize=True)
    matching = np.full(true.shape[1], -1)
    matching[rows] = columns
    hit, n_found, n_true = int(hits[rows, columns].sum()), int(found.sum()), int(wanted.sum())
    nan = float("nan")
    return MaskScore(
        precision=hit / n_found if n_found else nan,
        recall=hit / n_true if n_true else nan,
        f1=2 * hit / (n_found + n_true) if n_found + n_true else nan,
        matching=tuple(int(m) for m in matching),
    )
