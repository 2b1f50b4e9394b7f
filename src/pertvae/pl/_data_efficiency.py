"""Scores against the fraction of the combinations that stood in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pertvae._labels import hint
from pertvae.metrics import registry
from pertvae.pl._canvas import COLORS, MUTED, figure_of, finish, literal, new_figure, shorten, tidy

_MARKERS = "oDs^vPX"
_REFERENCE_STYLES = ("--", ":", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1)))
_DIRECTIONS = {"higher": "higher is better", "lower": "lower is better", "one": "best value: 1"}
_NEEDED = ("train_fraction", "model", "metric", "value")


def data_efficiency(
    data: Any,
    metric: str | None = None,
    *,
    models: Sequence[str] | None = None,
    ylabel: str | None = None,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw a score against the fraction of the combinations that stood in training, one line a method.

    Models have colours, markers and solid lines; references (and the duplicate and the oracle) are grey, broken lines.
    The legend stands in the order of the last points.

    Parameters
    ----------
    data
        What :func:`pertvae.benchmark.run` returned for several values of ``train_fraction``, or a tidy table with the
        columns ``train_fraction``, ``model``, ``metric``, ``value`` and, where there are any, ``seed``, ``kind``,
        ``status``. Rows of the same method, fraction and seed (conditions, folds) are averaged.
    metric
        Which metric; by default the first of the table.
    models
        Methods to draw; by default all.
    ylabel
        Label of the vertical axis; by default the metric, and which way is better.
    ax
        Axes to draw into; by default a new figure, unknown to pyplot.
    figsize
        Size of the new figure in inches.
    save
        File to write; the suffix names the format.

    Returns
    -------
    The matplotlib figure. Lines are means over seeds, bars reach from the lowest to the highest seed.

    Raises
    ------
    KeyError
        If a column is missing, or the metric or a method is not in the table.
    ValueError
        If no score is left to draw.
    """
    table = getattr(data, "table", data)
    for column in _NEEDED:
        if column not in table:
            raise KeyError(f"The table has no column {column!r}.{hint(column, table.columns)} Needed: {list(_NEEDED)}.")
    if "status" in table:
        table = table[table["status"] == "ok"]
    table = table[table["value"].notna()]
    known = list(dict.fromkeys(table["metric"]))
    if not known:
        raise ValueError("The table has no scores: every fit failed, or nothing was scored.")
    metric = known[0] if metric is None else metric
    if metric not in known:
        raise KeyError(f"The metric {metric!r} is not in the table.{hint(metric, known)}")
    rows = table[table["metric"] == metric]
    names = list(dict.fromkeys(rows["model"])) if models is None else list(models)
    for name in names:
        if name not in set(rows["model"]):
            raise KeyError(f"The method {name!r} has no {metric!r}.{hint(name, list(dict.fromkeys(rows['model'])))}")
    curves = {name: _curve(rows[rows["model"] == name]) for name in names}
    is_model = {
        name: "kind" not in rows or (rows.loc[rows["model"] == name, "kind"] == "model").all() for name in names
    }

    if ax is None:
        figure = new_figure(figsize or (6.4, 3.6))
        ax = figure.add_subplot()
    else:
        figure = figure_of(ax)
    handles: dict[str, Any] = {}
    n_models = n_others = 0
    for name in names:
        curve = curves[name]
        x, y = curve.index.to_numpy(dtype=float), curve["mean"].to_numpy()
        error = np.stack([y - curve["lowest"].to_numpy(), curve["highest"].to_numpy() - y])
        if is_model[name]:
            color, marker = COLORS[n_models % len(COLORS)], _MARKERS[n_models % len(_MARKERS)]
            style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "-", "linewidth": 1.8, "zorder": 3}
            n_models += 1
        else:
            style = {"color": MUTED, "linestyle": _REFERENCE_STYLES[n_others % len(_REFERENCE_STYLES)]}
            style |= {"linewidth": 1.4, "marker": "o" if len(x) == 1 else None, "zorder": 2}
            n_others += 1
        spread = error if np.any(error > 0) else None
        handles[name] = ax.errorbar(x, y, yerr=spread, markersize=5, capsize=2.5, elinewidth=1, **style)
    order = sorted(names, key=lambda name: -float(curves[name]["mean"].iloc[-1]))
    ax.legend(
        [handles[n] for n in order],
        [shorten(n, 24) for n in order],
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        fontsize=8,
        frameon=False,
        handlelength=2.8,
    )
    ticks = sorted({float(f) for curve in curves.values() for f in curve.index})
    ax.set_xticks(ticks, [f"{100 * f:g}%" for f in ticks], fontsize=8)
    ax.set_xlabel("combinations in training", fontsize=9)
    ax.set_ylabel(literal(ylabel) if ylabel is not None else _label(metric), fontsize=9)
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    tidy(ax)
    return finish(figure, save)


def _curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Return by fraction the mean over seeds of the mean over rows, and the lowest and highest seed."""
    seeds = rows["seed"] if "seed" in rows else pd.Series(0, index=rows.index)
    each = rows.groupby([rows["train_fraction"].astype(float), seeds])["value"].mean()
    by_fraction = each.groupby(level=0)
    return pd.DataFrame({"mean": by_fraction.mean(), "lowest": by_fraction.min(), "highest": by_fraction.max()})


def _label(metric: str) -> str:
    name = literal(metric.replace("_", " "))
    return f"{name}\n({_DIRECTIONS[registry[metric].direction]})" if metric in registry else name
