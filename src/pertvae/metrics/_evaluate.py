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
from pertvae.metrics._training import TrainingProfiles

POOLED = "pooled"


def evaluate(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    *,
    metrics: str | Sequence[str] | None = None,
    train: ad.AnnData | pd.Series | TrainingProfiles | None = None,
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
        For ``pearson_delta_perturbed`` and ``interaction_auroc``: the training cells, or what
        :func:`pertvae.metrics.training_profiles` made of them, or for the first only a Series with genes as index (the
        mean over training perturbed conditions of their mean profiles, each condition counting once).
    conditions
        Conditions to score; ``None`` for all predicted ones that were observed.
    genes
        Names, or a boolean mask over ``predicted.var_names``, of the genes scored; ``None`` for all.
    sep
        Separator of components; ``None`` when every label is one perturbation.
    layer
        Layer of the counts in ``observed`` and ``train``; ``None`` for ``X``. ``predicted`` is read from ``X``.
    max_cells
        Cells a condition and side, and control cells a side, that metrics of single cells use, drawn without
        replacement; means use all cells.
    n_resamples
        When above 0, observed cells (controls too) are drawn with replacement this many times within each condition,
        and ``lower`` and ``upper`` say how far the scores move with them; NaN for the metrics that are too slow for
        that (``resampled`` in :func:`pertvae.metrics.list_metrics`).
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
    return evaluate_with_draws(
        predicted,
        observed,
        perturbation_key,
        control,
        metrics=metrics,
        train=train,
        conditions=conditions,
        genes=genes,
        sep=sep,
        layer=layer,
        max_cells=max_cells,
        n_resamples=n_resamples,
        level=level,
        seed=seed,
    )[0]


def evaluate_with_draws(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    *,
    metrics: str | Sequence[str] | None,
    without: Sequence[str] = (),
    train: ad.AnnData | pd.Series | TrainingProfiles | None,
    conditions: Sequence[str] | None = None,
    genes: Any = None,
    sep: str | None = "+",
    layer: str | None = None,
    max_cells: int = 500,
    n_resamples: int = 0,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what :func:`evaluate` returns, and the draws behind its intervals as :func:`resample` returns them.

    Metrics named in ``without`` are left out without a word.
    """
    names = [m for m in resolve(metrics) if m.name not in without]
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
    table = _rows(kept, pair.comparison.conditions).assign(value=_values(kept, pair.comparison))
    for column, cells in (("n_predicted", pair.n_predicted), ("n_observed", pair.n_observed)):
        each = table["condition"].map(dict(zip(pair.comparison.conditions, cells, strict=True)))
        table[column] = each.where(table["level"] == "condition", cells.sum()).astype(int)
    if n_resamples:
        again = [m for m in kept if m.resampled]
        drawn = table["metric"].isin([m.name for m in again])
        table["lower"] = table["upper"] = np.nan
        if again:
            draws = np.stack([_values(again, c) for c in pair.resampled(n_resamples, seed)])
            table.loc[drawn, ["lower", "upper"]] = np.stack(_around(table[drawn], draws, again, level), axis=1)
            return table, _long(again, pair.comparison.conditions, draws)
    return table, pd.DataFrame(columns=["resample", "metric", "condition", "level", "value"])


def resample(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    perturbation_key: str,
    *,
    control: str | Sequence[str],
    n_resamples: int = 200,
    metrics: str | Sequence[str] | None = None,
    train: ad.AnnData | pd.Series | TrainingProfiles | None = None,
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
        Metrics that are too slow for it (``resampled`` in :func:`pertvae.metrics.list_metrics`) are left out.
    n_resamples
        Number of draws.

    Returns
    -------
    DataFrame
        Columns ``resample`` (0 to ``n_resamples - 1``), ``metric``, ``condition``, ``level``, ``value``.

    Raises
    ------
    ValueError
        As :func:`pertvae.metrics.evaluate`, if ``n_resamples`` is below 1, and if a metric asked for by name is too
        slow to be computed again for each draw.
    KeyError
        As :func:`pertvae.metrics.evaluate`.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples={n_resamples} must be at least 1.")
    slow = [m.name for m in resolve(metrics) if not m.resampled]
    if slow and metrics is not None:
        raise ValueError(
            f"The metric {slow[0]!r} is too slow to be computed for every resampling: leave it out of metrics, or "
            "score it once with evaluate. list_metrics()['resampled'] says which can be resampled."
        )
    return evaluate_with_draws(
        predicted,
        observed,
        perturbation_key,
        control,
        metrics=metrics,
        without=slow,
        train=train,
        conditions=conditions,
        genes=genes,
        sep=sep,
        layer=layer,
        max_cells=max_cells,
        n_resamples=n_resamples,
        seed=seed,
    )[1]


def _long(metrics: Sequence[Metric], conditions: Sequence[str], draws: np.ndarray) -> pd.DataFrame:
    """Return draws x scores as one row a draw and score."""
    table = pd.concat([_rows(metrics, conditions)] * len(draws), ignore_index=True)
    table.insert(0, "resample", np.repeat(np.arange(len(draws)), len(table) // len(draws)))
    return table.assign(value=draws.ravel())


def _rows(metrics: Sequence[Metric], conditions: Sequence[str]) -> pd.DataFrame:
    """Return what each value of :func:`_values` belongs to."""
    places = [(c, "condition") for c in conditions]
    rows = [(m.name, *p) for m in metrics for p in [*(places if m.level == "condition" else []), (POOLED, POOLED)]]
    return pd.DataFrame(rows, columns=["metric", "condition", "level"])


def _values(metrics: Sequence[Metric], comparison: Comparison) -> np.ndarray:
    """Return the scores of one comparison: those of each condition, then the pooled one, metric after metric."""
    values: list[np.ndarray] = [np.empty(0)]
    for metric in metrics:
        found = np.asarray(metric.function(comparison), dtype=np.float64)
        expected = (len(comparison.conditions),) if metric.level == "condition" else ()
        if found.shape != expected:
            raise ValueError(f"The metric {metric.name!r} returned shape {found.shape}, expected {expected}.")
        values.append(np.append(found, _mean(found)) if found.shape else found[None])
    return np.concatenate(values)


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
