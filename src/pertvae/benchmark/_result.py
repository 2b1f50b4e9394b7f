"""The result of a benchmark: a tidy table, summaries, comparisons with intervals, files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pertvae._labels import hint
from pertvae.benchmark._intervals import MIN_CONDITIONS, mean_interval
from pertvae.benchmark._metrics import comparable, loss
from pertvae.benchmark._prediction import Prediction
from pertvae.benchmark._score import POOLED
from pertvae.benchmark._strata import EFFECT_SIZE, NON_ADDITIVITY, between_controls, stratified

HEADLINE = "l2_profile"
_SUMMARISED = "scheme model kind metric value lower upper interval n_conditions n_seeds".split()
_COMPARED = (
    "scheme model reference best_reference metric model_value reference_value difference lower upper interval "
    "n_conditions verdict"
).split()
Key = tuple[str, int, str, int]
"""Scheme, fold, method, seed (-1 for methods without one)."""


@dataclass
class BenchmarkResult:
    """What :func:`pertvae.benchmark.run` found.

    Parameters
    ----------
    table
        One row a (scheme, fold, train_fraction, model, seed, condition, metric). ``kind`` is ``model``,
        ``reference``, ``duplicate`` or ``oracle``; ``seen`` says how many components of the condition stand alone in
        training (``"2/2"``); ``condition`` is ``pooled`` where a metric takes all conditions at once; ``lower`` and
        ``upper`` come from
        resampling the ``n_observed`` held-out cells of the condition. A method that failed has one row with
        ``status="failed"`` and its ``error``.
    fits
        One row a fit: seconds, status, error, whether it was read from the cache.
    settings
        Everything needed to run it again: settings, versions, fingerprint of the data, scoring genes by fold.
    predictions
        By (scheme, fold, model, seed): predicted shifts, losses, programs, seconds.
    truths
        By (scheme, fold): observed shifts, units x scoring genes, log1p CP10k.
    units
        One row a (scheme, fold, held-out condition): observed cells, ``effect_size`` and ``non_additivity`` (lengths of
        the observed shift and of its distance from the sum of the components' training shifts, over the scored genes,
        free of sampling noise on average).
    splits
        One column a scheme and fold, one row a cell: ``train`` or ``test``; missing where the cell is not used. What an
        outside tool has to be trained on, for its predictions to join as ``external``.
    clouds
        By (scheme, fold): principal components of observed cells, training controls and held-out cells, for pictures.
    draws
        By metric: values with the held-out cells resampled, one row a (scheme, fold, model, seed, unit).
    by_fraction
        The result of each fraction of the training combinations, in rising order; empty when there is one. Then
        ``table``, ``fits`` and ``summary()`` hold all of them, everything else is that of the largest.
    """

    table: pd.DataFrame
    fits: pd.DataFrame
    settings: dict[str, Any]
    predictions: dict[Key, Prediction] = field(default_factory=dict, repr=False)
    truths: dict[tuple[str, int], pd.DataFrame] = field(default_factory=dict, repr=False)
    units: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    splits: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    clouds: dict[tuple[str, int], pd.DataFrame] = field(default_factory=dict, repr=False)
    draws: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)
    by_fraction: dict[float, BenchmarkResult] = field(default_factory=dict, repr=False)

    @property
    def largest(self) -> BenchmarkResult:
        """The result of the largest fraction of the training combinations; itself when there is one fraction."""
        return self.by_fraction[max(self.by_fraction)] if self.by_fraction else self

    @property
    def schemes(self) -> list[str]:
        """The schemes that were run."""
        return list(dict.fromkeys(self.table["scheme"]))

    @property
    def metrics(self) -> list[str]:
        """The metrics in the table."""
        return list(dict.fromkeys(self.table["metric"].dropna()))

    def names(self, kind: str) -> list[str]:
        """Return the methods of a kind, in the order in which they were run.

        Parameters
        ----------
        kind
            ``"model"``, ``"reference"``, ``"duplicate"`` or ``"oracle"``.

        Returns
        -------
        Names as in the column ``model`` of the table.
        """
        return list(dict.fromkeys(self.table.loc[self.table["kind"] == kind, "model"]))

    def by_condition(self, metric: str = HEADLINE, scheme: str | None = None) -> pd.DataFrame:
        """Return one metric as conditions x methods, averaged over seeds and, where it recurs, over folds.

        Parameters
        ----------
        metric
            Name of a metric in the table.
        scheme
            Which scheme; by default the first.

        Returns
        -------
        DataFrame indexed by condition (with the context after ``|`` where there is one).

        Raises
        ------
        KeyError
            If the metric or the scheme was not run.
        """
        return self._matrix(metric, self._scheme(scheme))

    def _matrix(self, metric: str, scheme: str, distance: bool = False) -> pd.DataFrame:
        """Return conditions x methods; with ``distance`` each fit's distance from 1 where 1 is best, then averaged."""
        if metric not in self.metrics:
            raise KeyError(f"The metric {metric!r} is not in the table.{hint(metric, self.metrics)}")
        table = self.largest.table
        rows = table[(table["scheme"] == scheme) & (table["metric"] == metric)]
        rows = rows[(rows["status"] == "ok") & (rows["condition"] != POOLED)]
        if distance:
            rows = rows.assign(value=comparable(metric, rows["value"]))
        return rows.pivot_table(index="unit", columns="model", values="value").rename_axis(None)

    def summary(self) -> pd.DataFrame:
        """Return one row a scheme, method and metric: the mean over conditions of the mean over seeds.

        The interval is the percentile bootstrap over conditions; with fewer than five conditions the held-out cells
        are resampled instead (metrics of mean profiles and shifts only). ``interval`` says which. Metrics that take
        all conditions at once are averaged over folds and have no interval.

        Returns
        -------
        DataFrame with the columns scheme, model, kind, metric, value, lower, upper, interval, n_conditions, n_seeds,
        and in front train_fraction when there are several.
        """
        if self.by_fraction:
            parts = [result.summary().assign(train_fraction=f) for f, result in self.by_fraction.items()]
            table = pd.concat(parts, ignore_index=True)
            return table[["train_fraction", *(c for c in table.columns if c != "train_fraction")]]
        rows = []
        for scheme in self.schemes:
            here = self.table[(self.table["scheme"] == scheme) & (self.table["status"] == "ok")]
            kinds = here.drop_duplicates("model").set_index("model")["kind"]
            seeds = here.groupby("model")["seed"].nunique()
            for metric in self.metrics:
                of_metric = here[here["metric"] == metric]
                if (of_metric["condition"] != POOLED).any():
                    matrix = self.by_condition(metric, scheme)
                    found = {str(m): mean_interval(matrix[m], self._draws(metric, scheme, str(m))) for m in matrix}
                else:
                    found = {}
                pooled = of_metric[of_metric["condition"] == POOLED].groupby("model")["value"].mean()
                for model, kind in zip(kinds.index.astype(str), kinds, strict=True):
                    row: dict[str, Any] = {"scheme": scheme, "model": model, "kind": kind, "metric": metric}
                    if model in found and found[model].n:
                        i = found[model]
                        row |= {"value": i.value, "lower": i.lower, "upper": i.upper, "interval": i.kind}
                        row["n_conditions"] = i.n
                    elif model in pooled.index:
                        row |= {"value": pooled[model], "lower": np.nan, "upper": np.nan, "interval": "none"}
                        row["n_conditions"] = 0
                    else:
                        continue
                    rows.append({**row, "n_seeds": int(seeds[model])})
        return pd.DataFrame(rows, columns=_SUMMARISED)

    def compare(self, metric: str | Sequence[str] = HEADLINE) -> pd.DataFrame:
        """Return each model minus each reference, paired by condition.

        Parameters
        ----------
        metric
            Name of a metric that has a value for each condition, or several.

        Returns
        -------
        DataFrame with the columns scheme, model, reference, best_reference (the reference with the best mean),
        metric, model_value, reference_value, difference, lower, upper, interval (``conditions``: paired bootstrap
        over conditions; ``cells``: the held-out cells resampled), n_conditions, verdict (``better``, ``worse``,
        ``no difference``, or ``not judged`` with fewer than five conditions). For a metric whose best value is
        neither its lowest nor its highest (``slope``: 1), difference is that of the distances from the best value.

        Raises
        ------
        KeyError
            If a metric was not run.
        """
        metrics = [metric] if isinstance(metric, str) else list(metric)
        rows = [row for m in metrics for scheme in self.schemes for row in self._compared(m, scheme)]
        return pd.DataFrame(rows, columns=_COMPARED)

    def _compared(self, metric: str, scheme: str) -> Iterator[list[Any]]:
        if metric not in self.metrics:
            raise KeyError(f"The metric {metric!r} is not in the table.{hint(metric, self.metrics)}")
        matrix = self._matrix(metric, scheme, distance=True)
        references = [r for r in self.names("reference") if r in matrix]
        # a reference that failed where it is hard must not be the best for it
        shared = matrix[references].dropna()
        means = loss(metric, shared if len(shared) else matrix[references], difference=True).mean()
        best = means.idxmin() if means.notna().any() else None
        for model in (m for m in self.names("model") if m in matrix):
            for reference in references:
                a, b = (self._draws(metric, scheme, m, distance=True) for m in (model, reference))
                i = mean_interval(matrix[model] - matrix[reference], None if a is None or b is None else a - b)
                both = matrix[[model, reference]].dropna().mean()
                verdict = _verdict(metric, i.lower, i.upper, i.n)
                yield [
                    *(scheme, model, reference, reference == best, metric, both[model], both[reference]),
                    *(i.value, i.lower, i.upper, i.kind, i.n, verdict),
                ]

    def strata(self, metric: str = HEADLINE, by: str = EFFECT_SIZE) -> pd.DataFrame:
        """Return one metric by how large an effect is, or how far from additive.

        Parameters
        ----------
        metric
            Name of a metric that has a value for each condition.
        by
            ``"effect_size"`` or ``"non_additivity"``, a column of ``units``.

        Returns
        -------
        DataFrame with the columns scheme, by, stratum (``small``, ``medium``, ``large``: thirds of the held-out
        conditions, halves when there are fewer than nine), model, value, lower, upper, n_conditions, and the smallest
        and largest size in the stratum. No rows for a scheme with fewer than six conditions that have the size.

        Raises
        ------
        KeyError
            If the metric was not run.
        ValueError
            If ``by`` is neither of the two.
        """
        if by not in (EFFECT_SIZE, NON_ADDITIVITY):
            raise ValueError(f"by={by!r} is not a size.{hint(by, (EFFECT_SIZE, NON_ADDITIVITY))}")
        parts = []
        for scheme in self.schemes:
            here = self.units[self.units["scheme"] == scheme]
            sizes = here.groupby("unit")[by].mean()
            parts.append(stratified(self.by_condition(metric, scheme), sizes).assign(scheme=scheme, by=by))
        table = _stacked(parts)
        return table[["scheme", "by", *(c for c in table.columns if c not in ("scheme", "by"))]]

    def dynamic_range(self) -> pd.DataFrame:
        """Return every score between a negative and a positive control, and the room there is between these.

        The negative control is :class:`~pertvae.reference.Mean`, the mean of the training perturbations, and for a new
        context :class:`~pertvae.reference.NoChange`. The positive one is the interpolated duplicate, and for metrics of
        cells the technical duplicate.

        Returns
        -------
        DataFrame with the columns scheme, model, metric, value, negative, positive, ``normalised`` (0 as the negative
        control, 1 as the positive one; a method that averages noise away can exceed 1), ``dynamic_range`` (how far the
        positive control is on the way from the negative one to the best possible value: a metric with a small one tells
        good from bad predictions badly; NaN where no value is the best, and where the positive
        control is not better than the negative one, as happens with few held-out cells or controls: each half of the
        duplicate has half of them). For metrics whose best value is 1 (``slope``)
        values are distances from 1. Metrics without both controls are left out.
        """
        parts = []
        for scheme in self.schemes:
            values = {m: self._matrix(m, scheme, distance=True).mean() for m in self.metrics if self.has_conditions(m)}
            pooled = self.largest.table[self.largest.table["condition"] == POOLED]
            pooled = pooled[(pooled["scheme"] == scheme) & pooled["value"].notna()]
            for metric, rows in pooled.groupby("metric"):
                each = comparable(str(metric), rows["value"])
                values.setdefault(str(metric), each.groupby(rows["model"]).mean())
            parts.append(between_controls(pd.DataFrame(values).T, scheme))
        return _stacked(parts)

    def text(self) -> str:
        """Return the verdict and the headline scores as plain text.

        Returns
        -------
        A few sentences and one table a scheme.
        """
        from pertvae.benchmark._report import as_text

        return as_text(self)

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page: verdict, tables, figures, settings. No network is needed to read it.

        Parameters
        ----------
        path
            File to write, or a folder for ``report.html``.

        Returns
        -------
        The path of the page.
        """
        from pertvae.benchmark._report import write_report

        return write_report(self, Path(path))

    def save(self, path: str | Path) -> Path:
        """Write tables (CSV), settings, figures and the page.

        Parameters
        ----------
        path
            Folder, made when it does not exist. It gets ``table.csv``, ``summary.csv``, ``comparison.csv``,
            ``strata.csv``, ``dynamic_range.csv``, ``units.csv``, ``fits.csv``, ``splits.csv``, ``settings.json``, and
            in ``figures/`` the figures as PNG and SVG.

        Returns
        -------
        The path of the page ``report.html``.
        """
        from pertvae.benchmark._report import write_files

        return write_files(self, Path(path))

    def trained(self, scheme: str) -> Iterator[tuple[Key, Prediction]]:
        """Yield the fits of a scheme that went well, in order of fold and seed.

        Parameters
        ----------
        scheme
            Name of a scheme that was run.

        Yields
        ------
        (scheme, fold, method, seed) and what that method predicted.
        """
        for key, prediction in sorted(self.predictions.items(), key=lambda item: (item[0][1], item[0][3])):
            if key[0] == scheme and prediction.status == "ok":
                yield key, prediction

    def has_conditions(self, metric: str) -> bool:
        """Return whether a metric has a value for each condition; others take all conditions at once.

        Parameters
        ----------
        metric
            Name of a metric in the table.

        Returns
        -------
        ``True`` or ``False``.
        """
        rows = self.table[self.table["metric"] == metric]
        return bool((rows["condition"] != POOLED).any())

    def _scheme(self, scheme: str | None) -> str:
        if scheme is None:
            return self.schemes[0]
        if scheme not in self.schemes:
            raise KeyError(f"The scheme {scheme!r} was not run.{hint(scheme, self.schemes)}")
        return scheme

    def _draws(self, metric: str, scheme: str, model: str, distance: bool = False) -> pd.DataFrame | None:
        """Return conditions x draws, averaged over seeds and folds; the same draws for every method."""
        if metric not in self.draws:
            return None
        drawn = self.draws[metric]
        index = drawn.index
        rows = drawn[(index.get_level_values("scheme") == scheme) & (index.get_level_values("model") == model)]
        if rows.empty:
            return None
        rows = comparable(metric, rows) if distance else rows
        return rows.groupby(rows.index.get_level_values("unit").astype(str).to_numpy()).mean()


def _stacked(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all tables; of empty ones the columns."""
    filled = [p for p in parts if len(p)]
    return pd.concat(filled, ignore_index=True) if filled else parts[0]


def _verdict(metric: str, lower: float, upper: float, n: int) -> str:
    if n < MIN_CONDITIONS or not np.isfinite([lower, upper]).all():
        return "not judged"
    signed = sorted(loss(metric, np.array([lower, upper]), difference=True))
    if signed[1] < 0:
        return "better"
    return "worse" if signed[0] > 0 else "no difference"
