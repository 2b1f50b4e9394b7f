"""Bootstrap intervals over conditions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


class Interval(NamedTuple):
    """A mean with its interval.

    Parameters
    ----------
    estimate
        Mean of the values, or of the paired differences.
    lower, upper
        Ends of the interval; NaN with fewer than two values.
    """

    estimate: float
    lower: float
    upper: float


def bootstrap_interval(
    values: pd.Series | np.ndarray,
    other: pd.Series | np.ndarray | None = None,
    *,
    n: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the mean over conditions with its bootstrap interval.

    Percentiles of the means of resampled conditions, at tail probabilities that make up for the narrowness of the
    bootstrap in small samples (expanded percentile interval; Hesterberg 2015, The American Statistician 69): the tail
    of a normal beyond sqrt(m / (m - 1)) t, with t the quantile of Student's distribution for m conditions.

    Parameters
    ----------
    values
        One score a condition, or one paired difference a condition.
    other
        Scores of another method on the same conditions: the interval is that of the mean of ``values - other``, with
        conditions drawn together (paired bootstrap). Two Series are matched by index.
    n
        Number of resamplings of the conditions.
    level
        Coverage.
    seed
        Of the resamplings; equal numbers of conditions meet the same draws.

    Returns
    -------
    Interval
        ``(estimate, lower, upper)``.

    Raises
    ------
    ValueError
        If there are no values, values are missing (NaN), or the two methods have different conditions.
    """
    if other is not None:
        values = _paired(values, other)
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"bootstrap_interval takes one value a condition, got an array of shape {x.shape}.")
    if np.isnan(x).any():
        raise ValueError(f"bootstrap_interval: {int(np.isnan(x).sum())} of {len(x)} values are NaN: leave them out.")
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"n={n} must be at least 1 and level={level} between 0 and 1.")
    if len(x) < 2:
        return Interval(float(x[0]), float("nan"), float("nan"))
    draws = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=n) @ x / len(x)
    m = len(x)
    tail = stats.norm.sf(np.sqrt(m / (m - 1)) * stats.t.isf((1 - level) / 2, m - 1))
    lower, upper = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(x.mean()), float(lower), float(upper))


def _paired(values: pd.Series | np.ndarray, other: pd.Series | np.ndarray) -> np.ndarray:
    if isinstance(values, pd.Series) and isinstance(other, pd.Series):
        if set(values.index) != set(other.index) or not values.index.is_unique or not other.index.is_unique:
            odd = sorted(set(map(str, values.index)) ^ set(map(str, other.index)))
            raise ValueError(
                f"The two methods have different or repeated conditions, such as {odd[:5]}: pair them first."
            )
        other = other.loc[values.index]
    a, b = np.asarray(values, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"The two methods have {a.shape} and {b.shape} values: a paired interval needs the same conditions."
        )
    return a - b
