"""Scores of a prediction: one tidy table."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pertvae.metrics._comparison import Comparison
from pertvae.metrics._pairing import build
from pertvae.metrics._registry import Metric, resolve

POOLED = "pooled"


def evaluate(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    *,
    metrics: str | Sequence[str] | None = None,
    train: ad.AnnData | pd.Series | None = None,
    conditions: Sequence[str] | None = None,
    genes: Any = None,
    sep: str | None = "+",
    layer: str | None = None,
    max_cells: int = 500,
    n_resamples: int = 0,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predicted against observed cells, condition by condition and pooled.

    Everything is measured on log1p(1e4 x / sum x), the sum over all genes of ``predicted``. A **profile** is the mean
    over cells, a **delta** the profile minus that of its own object's controls. A prediction of this package carries
    its shifts, and those are its deltas (against zero dose with the same basal states and libraries). A reference
    carries the training controls' profile too, and its profile is that plus its shift: rendered cells do not reach a
    shift in genes that are silent in controls. Any other AnnData is scored by its cells.

    Parameters
    ----------
    predicted
        What ``predict_perturbation`` returns, or any AnnData of counts with the label column.
    observed
        Observed cells, counts in ``X`` or ``layer``, with at least the genes of ``predicted``.
    perturbation_key
        Label column, in both.
    control
        Control label or labels. Labels are matched as canonical labels (``B+A`` is ``A+B``).
    metrics
        Names (see :func:`pertvae.metrics.list_metrics`; ``"jaccard_top_k"`` stands for all of its k). ``None``: all
        that the data allow; a warning names those left out and why. A metric asked for by name and not possible
        raises; nothing is put in the place of what is missing.
    train
        For ``pearson_delta_perturbed``: the training cells (the mean over their perturbed conditions of mean profiles
        is taken, each condition counting once), or that profile as a Series with genes as index.
    conditions
        Conditions to score; ``None`` for all predicted ones that were observed.
    genes
        Names, or a boolean mask over ``predicted.var_names``, of the genes scored; ``None`` for all.
    sep
        Separator of components; ``None`` when every label is one perturbation.
    layer
        Layer of the counts in ``observed`` and ``train``; ``None`` for ``X``. ``predicted`` is read from ``X``.
    max_cells
        Cells a condition and side that distances between cells use, drawn without replacement; means use all cells.
    n_resamples
        When above 0, observed cells (controls too) are drawn with replacement this many times within each condition,
        and ``lower`` and ``upper`` say how far the scores move with them.
    level
        Coverage of that interval.
    seed
        Of the draws; the global random state is untouched.

    Returns
    -------
    DataFrame
        Columns ``metric``, ``condition``, ``level``, ``value``, ``n_predicted``, ``n_observed`` (cells), and with
        ``n_resamples`` also ``lower`` and ``upper``. Rows of level ``"condition"``, then one of level ``"pooled"``
        with condition ``"pooled"``: the mean over conditions where the metric is defined, or all conditions together
        for pooled metrics. The interval holds percentiles of the resampled scores around their own mean, put around
        the score; that mean itself is not used, since drawing cells again adds their sampling noise a second time and
        moves every distance upward.

    Raises
    ------
    ValueError
        If control cells stand on both sides of a metric that subtracts controls, a metric is unknown or its
        requirement is missing, no condition stands in both, or values are not counts.
    KeyError
        If the label column, a layer, a gene or a condition is missing.

    Examples
    --------
    >>> import pertvae as pv
    >>> adata = pv.datasets.example()
    >>> first, second = adata[::2], adata[1::2]
    >>> table = pv.metrics.evaluate(first, second, "perturbation", "control", metrics="l2_profile")
    """
    names = resolve(metrics)
    _check_numbers(max_cells=max_cells, n_resamples=n_resamples, level=level, seed=seed)
    pair, kept = build(
        predicted,
        observed,
        perturbation_key=perturbation_key,
        control=control,
        metrics=names,
        explicit=metrics is not None,
        conditions=conditions,
        genes=genes,
        sep=sep,
        layer=layer,
        train=train,
        max_cells=max_cells,
        seed=seed,
    )
    table = _rows(kept, pair.comparison)
    for column, cells in (("n_predicted", pair.n_predicted), ("n_observed", pair.n_observed)):
        each = table["condition"].map(dict(zip(pair.comparison.conditions, cells, strict=True)))
        table[column] = each.where(table["level"] == "condition", cells.sum()).astype(int)
    if n_resamples:
        draws = np.stack([_rows(kept, c)["value"].to_numpy() for c in pair.resampled(n_resamples, seed)])
        table["lower"], table["upper"] = _around(table, draws, kept, level)
    return table


def resample(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    perturbation_key: str,
    *,
    control: str | Sequence[str],
    n_resamples: int = 200,
    metrics: str | Sequence[str] | None = None,
    train: ad.AnnData | pd.Series | None = None,
    conditions: Sequence[str] | None = None,
    genes: Any = None,
    sep: str | None = "+",
    layer: str | None = None,
    max_cells: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Score a prediction against observed cells that are drawn with replacement, again and again.

    With few conditions, intervals over conditions say little: what can be said is whether one prediction beats another
    whatever cells happened to be observed. The draws depend on the seed and the observed cells only, so subtract the
    tables of two predictions row by row, and give the differences to :func:`pertvae.metrics.bootstrap_interval` or
    take their percentiles.

    Parameters
    ----------
    predicted, observed, perturbation_key, control, metrics, train, conditions, genes, sep, layer, max_cells, seed
        As in :func:`pertvae.metrics.evaluate`.
    n_resamples
        Number of draws.

    Returns
    -------
    DataFrame
        Columns ``resample`` (0 to ``n_resamples - 1``), ``metric``, ``condition``, ``level``, ``value``.

    Raises
    ------
    ValueError
        As :func:`pertvae.metrics.evaluate`, and if ``n_resamples`` is below 1.
    KeyError
        As :func:`pertvae.metrics.evaluate`.
    """
    names = resolve(metrics)
    _check_numbers(max_cells=max_cells, n_resamples=n_resamples, level=0.5, seed=seed)
    if n_resamples < 1:
        raise ValueError(f"n_resamples={n_resamples} must be at least 1.")
    pair, kept = build(
        predicted,
        observed,
        perturbation_key=perturbation_key,
        control=control,
        metrics=names,
        explicit=metrics is not None,
        conditions=conditions,
        genes=genes,
        sep=sep,
        layer=layer,
        train=train,
        max_cells=max_cells,
        seed=seed,
    )
    tables = [_rows(kept, c).assign(resample=i) for i, c in enumerate(pair.resampled(n_resamples, seed))]
    return pd.concat(tables, ignore_index=True)[["resample", "metric", "condition", "level", "value"]]


def _rows(metrics: Sequence[Metric], comparison: Comparison) -> pd.DataFrame:
    """Return the tidy scores of one comparison."""
    parts = []
    for metric in metrics:
        found = np.asarray(metric.function(comparison), dtype=np.float64)
        expected = (len(comparison.conditions),) if metric.level == "condition" else ()
        if found.shape != expected:
            raise ValueError(f"The metric {metric.name!r} returned shape {found.shape}, expected {expected}.")
        if metric.level == "condition":
            where, values = [*comparison.conditions, POOLED], [*found, _mean(found)]
        else:
            where, values = [POOLED], [float(found)]
        levels = ["condition"] * (len(where) - 1) + [POOLED]
        part = pd.DataFrame({"metric": metric.name, "condition": where, "level": levels, "value": values})
        parts.append(part)
    if not parts:
        return pd.DataFrame({"metric": [], "condition": [], "level": [], "value": []})
    return pd.concat(parts, ignore_index=True)


def _mean(values: np.ndarray) -> float:
    """Return the mean of the defined values, NaN when there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _around(
    table: pd.DataFrame, draws: np.ndarray, metrics: Sequence[Metric], level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the interval of each row: percentiles of the draws around their mean, moved to the score."""
    tail = (1 - level) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows without any defined draw stay NaN
        center = table["value"].to_numpy() - np.nanmean(draws, axis=0)
        lower, upper = np.nanquantile(draws, [tail, 1 - tail], axis=0) + center
    ranges = {m.name: m.range for m in metrics}
    low, high = np.array([ranges[name] for name in table["metric"]]).reshape(-1, 2).T
    return np.clip(lower, low, high), np.clip(upper, low, high)


def _check_numbers(*, max_cells: int, n_resamples: int, level: float, seed: int) -> None:
    if max_cells < 2:
        raise ValueError(f"max_cells={max_cells} must be at least 2.")
    if n_resamples < 0:
        raise ValueError(f"n_resamples={n_resamples} must be 0 (no interval) or more.")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1.")
    if seed < 0:
        raise ValueError(f"seed={seed} must be 0 or more.")
