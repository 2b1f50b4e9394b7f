"""Intervals of means and of paired differences, over conditions or over held-out cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pertvae.metrics import bootstrap_interval

CONFIDENCE = 0.95
MIN_CONDITIONS = 5
"""With fewer conditions than this their spread says nothing: the held-out cells are resampled instead."""
OVER_CONDITIONS = "conditions"
OVER_CELLS = "cells"
NO_INTERVAL = "none"


@dataclass(frozen=True)
class Interval:
    """A mean over conditions with its interval.

    Parameters
    ----------
    value
        Mean over conditions.
    lower, upper
        Ends of the percentile interval; NaN when there is none.
    kind
        What was resampled: ``"conditions"``, ``"cells"`` or ``"none"``.
    n
        Number of conditions.
    """

    value: float
    lower: float
    upper: float
    kind: str
    n: int


def mean_interval(values: pd.Series, draws: pd.DataFrame | None = None) -> Interval:
    """Return the mean of one value a condition and its bootstrap interval.

    Calls with the same conditions resample the same ones, so intervals of two methods are comparable, and the
    interval of a difference is that of a paired bootstrap.

    Parameters
    ----------
    values
        One value a condition (or one difference a condition), indexed by condition.
    draws
        The same with the held-out cells resampled: conditions x draws; used when there are fewer than
        ``MIN_CONDITIONS`` conditions.
    """
    values = values.dropna().sort_index()
    n = len(values)
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, NO_INTERVAL, 0)
    x = values.to_numpy(dtype=float)
    if n >= MIN_CONDITIONS:
        return Interval(*bootstrap_interval(x, level=CONFIDENCE), OVER_CONDITIONS, n)
    if draws is None or draws.empty or not values.index.isin(draws.index).all():
        return Interval(float(x.mean()), np.nan, np.nan, NO_INTERVAL, n)
    # Drawing cells again adds the sampling noise a second time, which moves distances upward: the spread of the draws
    # is what they say, so it is put around the value itself.
    drawn = draws.loc[values.index].to_numpy(dtype=float).mean(axis=0)
    lower, upper = percentiles(drawn - np.nanmean(drawn) + x.mean())
    return Interval(float(x.mean()), lower, upper, OVER_CELLS, n)


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """Return the ends of the ``CONFIDENCE`` percentile interval; NaN without draws."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return np.nan, np.nan
    tail = 50.0 * (1.0 - CONFIDENCE)
    lower, upper = np.percentile(finite, [tail, 100.0 - tail])
    return float(lower), float(upper)
