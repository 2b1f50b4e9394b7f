"""Figures of the report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pertvae.benchmark._cells_figure import MAX_METHODS, cells_figure
from pertvae.benchmark._metrics import loss, plain_name, rising
from pertvae.pl import data_efficiency, programs, training_curves
from pertvae.pl._canvas import COLORS, INK, MUTED, literal, new_figure, shorten, tidy

if TYPE_CHECKING:
    from pertvae.benchmark._result import BenchmarkResult

HEADLINES = ("l2_profile", "pearson_delta_perturbed", "l2_delta", "energy_distance")
_KIND_COLOR = {"model": COLORS[1], "reference": COLORS[0], "duplicate": MUTED, "oracle": MUTED}
_KIND_WORD = {
    "model": "model",
    "reference": "reference",
    "duplicate": "other half of the same cells",
    "oracle": "truth of the simulation",
}


def figures(result: BenchmarkResult) -> dict[str, Figure]:
    """Return the figures of a result by name, in the order of the report."""
    found: dict[str, Figure] = {}
    whole, result = result, result.largest
    summary = result.summary()
    for scheme in result.schemes:
        here = summary[summary["scheme"] == scheme] if len(summary) else summary
        if here.empty:
            continue
        found[f"scores_{scheme}"] = scores_figure(here)
        metric = headline(result)
        if whole.by_fraction and metric is not None:
            of_scheme = whole.table[whole.table["scheme"] == scheme]
            found[f"efficiency_{scheme}"] = data_efficiency(of_scheme, metric)
        cells = cells_figure(*_clouds(result, scheme))
        if cells is not None:
            found[f"cells_{scheme}"] = cells
        for model in result.names("model"):
            reference = best_reference(result, scheme)
            if reference is not None:
                paired = paired_figure(result, scheme, model, reference)
                if paired is not None:
                    found[f"conditions_{scheme}_{model}"] = paired
            shifts = shifts_figure(result, scheme, model)
            if shifts is not None:
                found[f"shifts_{scheme}_{model}"] = shifts
            fits = [p for key, p in result.trained(scheme) if key[2] == model]
            with_history = [p for p in fits if p.history]
            if with_history:
                found[f"training_{scheme}_{model}"] = training_curves(with_history[0].history)
            with_programs = [p for p in fits if p.programs]
            if with_programs:
                found[f"programs_{scheme}_{model}"] = programs(SimpleNamespace(**with_programs[0].programs))
    return found


def _clouds(result: BenchmarkResult, scheme: str) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Return components of observed cells, and those predicted by each model and the best reference, by name."""
    observed = result.clouds.get((scheme, 0), pd.DataFrame())
    best = best_reference(result, scheme)
    names = [*result.names("model")[: MAX_METHODS - 1], *([best] if best is not None else [])]
    predicted: dict[str, pd.DataFrame] = {}
    for key, prediction in result.trained(scheme):
        if key[1] == 0 and key[2] in names and "cloud" in prediction.tables:
            predicted.setdefault(key[2], prediction.tables["cloud"])
    return observed, {name: predicted[name] for name in names if name in predicted}


def best_reference(result: BenchmarkResult, scheme: str, metric: str | None = None) -> str | None:
    """Return the reference with the best mean of the headline metric."""
    metric = metric or headline(result)
    if metric is None:
        return None
    compared = result.compare(metric)
    best = compared[(compared["scheme"] == scheme) & compared["best_reference"]]
    return None if best.empty else str(best["reference"].iloc[0])


def headline(result: BenchmarkResult) -> str | None:
    """Return the first headline metric that was run with a value for each condition."""
    usable = [m for m in [*HEADLINES, *result.metrics] if m in result.metrics and result.has_conditions(m)]
    return usable[0] if usable else None


def scores_figure(summary: pd.DataFrame) -> Figure:
    """Draw the mean of each method with its interval, one panel a headline metric."""
    run = list(dict.fromkeys(summary["metric"]))
    chosen = [m for m in HEADLINES if m in run] or run[:3]
    first = summary[summary["metric"] == chosen[0]]
    first = first.assign(order=loss(chosen[0], first["value"]))
    names = list(first.sort_values("order", kind="stable")["model"])
    names += [n for n in dict.fromkeys(summary["model"]) if n not in names]
    figure = new_figure((1.9 + 2.5 * len(chosen), 1.5 + 0.3 * len(names)))
    axes = figure.subplots(1, len(chosen), squeeze=False, sharey=True)[0]
    for ax, metric in zip(axes, chosen, strict=True):
        rows = summary[summary["metric"] == metric].set_index("model")
        for y, name in enumerate(names):
            if name in rows.index:
                _dot(ax, y, rows.loc[name])
        ax.set_yticks(range(len(names)), [shorten(n, 22) for n in names], fontsize=9)
        ax.set_ylim(len(names) - 0.5, -0.5)
        direction = {True: "higher is better", False: "lower is better", None: "best value: 1"}[rising(metric)]
        ax.set_title(f"{plain_name(metric)}\n({direction})", fontsize=9)
        ax.tick_params(axis="x", labelsize=8)
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        tidy(ax)
    kinds = [k for k in _KIND_COLOR if k in set(summary["kind"])]
    handles = [_handle(axes[0], k) for k in kinds]
    figure.legend(
        handles, [_KIND_WORD[k] for k in kinds], loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    return figure


def paired_figure(result: BenchmarkResult, scheme: str, model: str, reference: str) -> Figure | None:
    """Draw the headline metric of a model against that of the best reference, one dot a held-out condition."""
    metric = headline(result)
    if metric is None:
        return None
    matrix = result.by_condition(metric, scheme)
    if model not in matrix or reference not in matrix:
        return None
    pairs = matrix[[reference, model]].dropna()
    if pairs.empty:
        return None
    figure = new_figure((4.6, 4.4))
    ax = figure.add_subplot()
    x, y = pairs[reference].to_numpy(), pairs[model].to_numpy()
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    limits = (low - margin, high + margin)
    ax.plot(limits, limits, color=MUTED, linewidth=1, zorder=0)
    ax.scatter(x, y, s=30, color=COLORS[1], edgecolors="white", linewidths=0.6)
    _name_points(ax, pairs.index.astype(str), x, y, limits)
    ax.set_xlim(limits)
    ax.set_ylim(limits)
    ax.set_aspect("equal")
    ax.set_xlabel(f"{literal(reference)}: {plain_name(metric)}", fontsize=9)
    ax.set_ylabel(f"{literal(model)}: {plain_name(metric)}", fontsize=9)
    up = rising(metric)
    side = "" if up is None else f"\n{'above' if up else 'below'} the line: {literal(model)} is better"
    ax.set_title(f"Each dot is one held-out condition{side}", fontsize=10)
    ax.tick_params(labelsize=8)
    tidy(ax)
    return figure


def shifts_figure(result: BenchmarkResult, scheme: str, model: str, n: int = 2) -> Figure | None:
    """Draw predicted against observed shifts of genes for the best and worst predicted conditions."""
    rows = [
        (key, unit, prediction)
        for key, prediction in result.trained(scheme)
        if key[2] == model
        for unit in prediction.shift.index
    ]
    found: dict[str, tuple[np.ndarray, np.ndarray, str]] = {}
    for key, unit, _ in rows:
        name = f"{key[1]}:{unit}"
        if name in found:
            continue
        seeds = [p for k, u, p in rows if k[1] == key[1] and u == unit]
        predicted = np.mean([p.shift.loc[unit].to_numpy() for p in seeds], axis=0)
        observed = result.truths[scheme, key[1]].loc[unit].to_numpy()
        found[name] = (observed, predicted, unit)
    if not found:
        return None
    order = sorted(found, key=lambda name: float(np.linalg.norm(found[name][0] - found[name][1])))
    if len(order) > 2 * n:
        chosen = [(m, "smallest") for m in order[:n]] + [(m, "largest") for m in order[-n:]]
    else:
        chosen = [(m, "") for m in order]
    figure = new_figure((2.7 * max(len(chosen), 2), 3.1))
    axes = figure.subplots(1, max(len(chosen), 2), squeeze=False)[0]
    for spare in axes[len(chosen) :]:
        spare.set_visible(False)
    for ax, (name, which) in zip(axes, chosen, strict=False):
        observed, predicted, unit = found[name]
        limit = 1.08 * float(max(np.abs(observed).max(), np.abs(predicted).max(), 1e-6))
        ax.axhline(0, color="#dddddd", linewidth=0.8, zorder=0)
        ax.axvline(0, color="#dddddd", linewidth=0.8, zorder=0)
        ax.plot([-limit, limit], [-limit, limit], color=MUTED, linewidth=1, zorder=0)
        ax.scatter(observed, predicted, s=9, color=COLORS[2 if which == "smallest" else 1], alpha=0.6, linewidths=0)
        ax.set_xlim(-limit, limit)
        ax.set_ylim(-limit, limit)
        ax.set_aspect("equal")
        heading = f"{which} error\n" if which else ""
        ax.set_title(heading + shorten(unit, 30), fontsize=9)
        ax.set_xlabel("observed shift (log1p CP10k)", fontsize=8)
        ax.tick_params(labelsize=7)
        tidy(ax)
    axes[0].set_ylabel("predicted shift", fontsize=8)
    return figure


def _name_points(
    ax: Axes, names: pd.Index, x: np.ndarray, y: np.ndarray, limits: tuple[float, float], most: int = 12
) -> None:
    """Name the points farthest from the diagonal, leaving out names that would lie on another."""
    span = limits[1] - limits[0]
    placed: list[tuple[float, float]] = []
    for i in np.argsort(-np.abs(x - y), kind="stable"):
        left = x[i] > limits[0] + span / 2
        at = (float(x[i] - (0.3 * span if left else 0.0)), float(y[i]))
        if any(abs(at[0] - a) < 0.3 * span and abs(at[1] - b) < 0.045 * span for a, b in placed):
            continue
        text = shorten(names[i], 22)
        offset, side = ((-5, 2), "right") if left else ((5, 2), "left")
        ax.annotate(text, (x[i], y[i]), xytext=offset, textcoords="offset points", fontsize=7, color=INK, ha=side)
        placed.append(at)
        if len(placed) == most:
            return


def _dot(ax: Axes, y: int, row: pd.Series) -> None:
    color = _KIND_COLOR[row["kind"]]
    if np.isfinite(row["lower"]):
        ax.hlines(y, row["lower"], row["upper"], colors=color, linewidth=2)
    hollow = row["kind"] in ("duplicate", "oracle")
    face = "white" if hollow else color
    ax.scatter(
        [row["value"]], [y], s=34, c=[face], edgecolors=color, linewidths=1.4, marker=_marker(row["kind"]), zorder=3
    )


def _marker(kind: str) -> str:
    return {"model": "D", "reference": "o", "duplicate": "s", "oracle": "^"}[kind]


def _handle(ax: Axes, kind: str) -> Artist:
    color = _KIND_COLOR[kind]
    face = "white" if kind in ("duplicate", "oracle") else color
    return ax.scatter([], [], s=34, c=[face], edgecolors=color, linewidths=1.4, marker=_marker(kind))
