"""Tables of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pertvae.benchmark import _page
from pertvae.benchmark._figures import best_reference, headline
from pertvae.benchmark._intervals import CONFIDENCE
from pertvae.benchmark._metrics import plain_name, rising
from pertvae.benchmark._prediction import records
from pertvae.benchmark._strata import EFFECT_SIZE, NON_ADDITIVITY

if TYPE_CHECKING:
    from pertvae.benchmark._result import BenchmarkResult

_KINDS = {
    "model": "",
    "reference": "reference",
    "duplicate": "other half of the same cells",
    "oracle": "truth of the simulation",
}
MAIN = (
    "l2_profile",
    "pearson_delta_perturbed",
    "weighted_mse",
    "energy_distance",
    "de_recovery",
    "gene_variance_agreement",
    "discrimination_score",
    "slope",
)
"""Metrics of the main table, which together see direction, size, cells and differential expression."""
_ARROWS = {True: "\N{UPWARDS ARROW}", False: "\N{DOWNWARDS ARROW}", None: "(best 1)"}
_DASH = "\N{EN DASH}"


def main_metrics(run: Sequence[str]) -> list[str]:
    """Return the metrics of the main table among those run; without any the first few."""
    return [m for m in MAIN if m in run] or list(run)[:4]


def scores_table(summary: pd.DataFrame, metrics: Sequence[str]) -> str:
    """Return one row a method with its value and interval in each metric."""
    wide = summary.pivot_table(index="model", columns="metric", values=["value", "lower", "upper"], dropna=False)
    rows = []
    for model, kind in _methods(summary):
        name: str | tuple[str, str] = (model, _KINDS[kind]) if _KINDS[kind] else model
        cells: list[str | tuple[str, str]] = [name]
        for metric in metrics:
            value, lower, upper = (_lookup(wide, model, k, metric) for k in ("value", "lower", "upper"))
            text = _DASH if not np.isfinite(value) else f"{value:.3g}"
            cells.append((text, f"{lower:.3g} to {upper:.3g}") if np.isfinite(lower) else text)
        rows.append((kind, cells))
    note = _page.paragraph("\N{UPWARDS ARROW} higher is better, \N{DOWNWARDS ARROW} lower is better.", "soft")
    return _page.table(["Method", *(_head(m) for m in metrics)], rows) + note


def _methods(summary: pd.DataFrame) -> list[tuple[str, str]]:
    """Return methods and their kinds: models, references, duplicates, oracle."""
    kinds = summary.drop_duplicates("model").set_index("model")["kind"]
    return [(str(m), str(kinds[m])) for m in sorted(kinds.index, key=lambda m: list(_KINDS).index(kinds[m]))]


def _head(metric: str) -> str:
    return f"{plain_name(metric)} {_ARROWS[rising(metric)]}"


def verdict_table(result: BenchmarkResult, scheme: str) -> str:
    """Return which model beats the best reference on what: one row a model, one column a metric."""
    metrics = [m for m in main_metrics(result.metrics) if result.has_conditions(m)]
    if not metrics or not result.names("model"):
        return ""
    compared = result.compare(metrics)
    compared = compared[(compared["scheme"] == scheme) & compared["best_reference"]]
    rows = []
    for model in result.names("model"):
        cells: list[str | tuple[str, str]] = [model]
        for metric in metrics:
            found = records(compared[(compared["model"] == model) & (compared["metric"] == metric)])
            if not found:
                cells.append(_DASH)
                continue
            r = found[0]
            interval = f" ({r['lower']:+.2g} to {r['upper']:+.2g})" if np.isfinite(r["lower"]) else ""
            words = {"better": "better than", "worse": "worse than"}.get(r["verdict"], f"{r['verdict']}:")
            cells.append((f"{words} {r['reference']}", f"{r['difference']:+.2g}{interval}"))
        rows.append(("", cells))
    words = "Each model against the reference that is best on that score; difference and its interval underneath."
    head = _page.heading("Which model beats the best reference on what", 3)
    return head + _page.paragraph(words, "soft") + _page.table(["Model", *(_head(m) for m in metrics)], rows)


def strata_table(result: BenchmarkResult, scheme: str) -> str:
    """Return the headline score by size of the effect and by distance from additivity."""
    metric = headline(result)
    if metric is None or result.units.empty:
        return ""
    parts = [result.largest.strata(metric, by) for by in (EFFECT_SIZE, NON_ADDITIVITY)]
    parts = [p[p["scheme"] == scheme] for p in parts]
    parts = [p for p in parts if len(p)]
    if not parts:
        return ""
    summary = result.largest.summary()
    titles = {EFFECT_SIZE: "effect", NON_ADDITIVITY: "non-additivity"}
    heads, columns = ["Method"], []
    for part in parts:
        by = str(part["by"].iloc[0])
        for stratum, rows in part.groupby("stratum", sort=False):
            low, high, n = rows["smallest"].iloc[0], rows["largest"].iloc[0], rows["n_conditions"].max()
            heads.append(f"{stratum} {titles[by]} ({low:.2g} to {high:.2g}, {n} conditions)")
            columns.append(rows.set_index("model"))
    rows_out = []
    for model, kind in _methods(summary[summary["scheme"] == scheme]):
        cells: list[str | tuple[str, str]] = [model]
        for column in columns:
            if model not in column.index:
                cells.append(_DASH)
                continue
            r = column.loc[model]
            text = f"{r['value']:.3g}"
            cells.append((text, f"{r['lower']:.3g} to {r['upper']:.3g}") if np.isfinite(r["lower"]) else text)
        rows_out.append((kind, cells))
    words = (
        f"{plain_name(metric).capitalize()} of conditions with small and large effects, and near to and far from the "
        "sum of their components' shifts. Sizes are lengths in log1p CP10k over the scored genes, free of sampling "
        "noise on average."
    )
    head = _page.heading("By size of the effect and non-additivity", 3)
    return head + _page.paragraph(words, "soft") + _page.table(heads, rows_out)


def range_table(result: BenchmarkResult, scheme: str) -> str:
    """Return scores between the negative and the positive control, with the room there is between these."""
    table = result.dynamic_range()
    table = table[table["scheme"] == scheme]
    metrics = [m for m in main_metrics(result.metrics) if m in set(table["metric"])]
    if not metrics:
        return ""
    wide = table.pivot(index="model", columns="metric", values="normalised")
    room = table.drop_duplicates("metric").set_index("metric")["dynamic_range"]
    rows = [("", ["dynamic range", *(f"{room[m]:.0%}" if np.isfinite(room[m]) else _DASH for m in metrics)])]
    summary = result.largest.summary()
    for model, kind in _methods(summary[summary["scheme"] == scheme]):
        if model in wide.index:
            values = wide.loc[[model], metrics].to_numpy(dtype=float)[0]
            rows.append((kind, [model, *(f"{v:.2f}" if np.isfinite(v) else _DASH for v in values)]))
    negative = "no change" if scheme == "unseen_context" else "the mean of the training perturbations"
    words = (
        f"0: as good as {negative}; 1: as good as the other half of the same cells (interpolated where the score needs "
        "no cells). The dynamic range says how far the latter is on the way to a perfect score: where it is small, the "
        "score tells good from bad badly."
    )
    head = _page.heading("Between a negative and a positive control", 3)
    return head + _page.paragraph(words, "soft") + _page.table(["Method", *(plain_name(m) for m in metrics)], rows)


def _lookup(wide: pd.DataFrame, model: str, what: str, metric: str) -> float:
    return float(wide[what, metric].loc[model]) if (what, metric) in wide.columns else np.nan


def comparison_table(result: BenchmarkResult, scheme: str) -> str:
    """Return the headline score of each model minus that of each reference."""
    metric = headline(result)
    if metric is None or not result.names("model"):
        return ""
    rows = result.compare(metric)
    rows = rows[rows["scheme"] == scheme] if len(rows) else rows
    if rows.empty:
        return ""
    cells = []
    for r in records(rows):
        interval = f"{r['lower']:+.3g} to {r['upper']:+.3g}" if np.isfinite(r["lower"]) else "\N{EN DASH}"
        reference = (r["reference"], "best reference") if r["best_reference"] else r["reference"]
        css = "model" if r["best_reference"] else ""
        cells.append((css, [r["model"], reference, f"{r['difference']:+.3g}", interval, r["verdict"]]))
    best = best_reference(result, scheme)
    head = _page.heading(f"Model minus reference: {plain_name(metric)}", 3)
    words = f"Paired by condition. The best reference is {best}." if best else "Paired by condition."
    columns = ["Model", "Reference", "Difference", f"{CONFIDENCE:.0%} interval", "Verdict"]
    return head + _page.paragraph(words, "soft") + _page.table(columns, cells, texts=2)


def settings_table(settings: dict[str, Any]) -> str:
    """Return how it was run: settings, versions, fingerprint of the data."""
    rows = [("", [key.replace("_", " "), _value(value)]) for key, value in settings.items() if value not in (None, "")]
    return _page.table([], rows, "settings")


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_value(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(v) for v in value) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def fits_table(fits: pd.DataFrame) -> str:
    """Return the time and the state of each fit."""
    several = "train_fraction" in fits and fits["train_fraction"].nunique() > 1
    rows = []
    for r in records(fits):
        seed = "" if r["seed"] < 0 else str(r["seed"])
        fraction = [f"{r['train_fraction']:.0%}"] if several else []
        times = [f"{r['fit_seconds']:.1f}", f"{r['predict_seconds']:.1f}"]
        status = "read from the cache" if r["cached"] else r["status"]
        rows.append(("", [r["model"], r["scheme"], *fraction, str(r["fold"]), seed, *times, status]))
    columns = ["Method", "Scheme", *(["Combinations"] if several else []), "Fold", "Seed", "Fit (s)", "Predict (s)"]
    return _page.table([*columns, "Status"], rows, texts=2)
