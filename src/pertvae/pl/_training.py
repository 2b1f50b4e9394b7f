"""Loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pertvae._labels import hint
from pertvae.pl._canvas import COLORS, figure_of, finish, literal, new_figure, tidy

_DEFAULT = ("elbo", "reconstruction_loss", "kl_local", "kl_global")
_TITLES = {
    "elbo": "negative ELBO",
    "reconstruction_loss": "reconstruction",
    "kl_local": "KL of the cells",
    "kl_global": "KL of the effects (total)",
}


def training_curves(
    data: Any,
    metrics: Sequence[str] | None = None,
    *,
    skip: int = 1,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw losses over epochs, training and validation together, one panel a quantity.

    Parameters
    ----------
    data
        A trained model, or its ``history`` (a dictionary of DataFrames indexed by epoch, as scvi-tools keeps it).
    metrics
        Quantities without the suffix ``_train`` or ``_validation``; by default ``elbo``, ``reconstruction_loss``,
        ``kl_local`` and ``kl_global``, as far as they were recorded.
    skip
        First epochs that do not set the scale of the axis (they are usually far above the rest). The curve is whole.
    ax
        Axes to draw into (one metric only); by default a new figure, unknown to pyplot.
    figsize
        Size of the new figure in inches.
    save
        File to write; the suffix names the format.

    Returns
    -------
    The matplotlib figure.

    Raises
    ------
    ValueError
        If the model was not trained, or ``ax`` is given for several metrics.
    KeyError
        If a metric was not recorded.
    """
    curves = history_curves(data)
    recorded = list(dict.fromkeys(name for name, _ in curves))
    if metrics is None:
        chosen = [m for m in _DEFAULT if m in recorded] or recorded
        chosen = chosen[:1] if ax is not None else chosen
    else:
        chosen = [metrics] if isinstance(metrics, str) else list(metrics)
    for metric in chosen:
        if metric not in recorded:
            raise KeyError(f"The metric {metric!r} was not recorded.{hint(metric, recorded)}")
    if ax is not None and len(chosen) != 1:
        raise ValueError(f"ax holds one metric but {len(chosen)} were asked for: pass one, or leave ax out.")

    if ax is None:
        across = min(len(chosen), 4)
        down = -(-len(chosen) // across)
        figure = new_figure(figsize or (max(2.9 * across, 4.0), 2.6 * down))
        axes = list(figure.subplots(down, across, squeeze=False).ravel())
        for spare in axes[len(chosen) :]:
            spare.set_visible(False)
    else:
        figure, axes = figure_of(ax), [ax]
    for i, (panel, metric) in enumerate(zip(axes, chosen, strict=False)):
        _panel(panel, metric, {split: c for (name, split), c in curves.items() if name == metric}, skip, i == 0)
    return finish(figure, save)


def history_curves(data: Any) -> dict[tuple[str, str], pd.Series]:
    """Return ``{(metric, "training" | "validation"): values by epoch}`` from a model or its history."""
    history = data if isinstance(data, Mapping) else getattr(data, "history", None)
    if not history:
        raise ValueError("There are no training curves: the model was not trained. Call model.train() first.")
    curves = {}
    for key, table in history.items():
        for suffix, split in (("_train", "training"), ("_validation", "validation")):
            if str(key).endswith(suffix):
                column = table.iloc[:, 0] if isinstance(table, pd.DataFrame) else pd.Series(table)
                values = pd.to_numeric(column, errors="coerce").dropna()
                if len(values):
                    curves[str(key)[: -len(suffix)], split] = values
    if not curves:
        raise ValueError(f"No key of the history ends in '_train' or '_validation'. Keys: {sorted(history)[:10]}.")
    return curves


def _panel(ax: Axes, metric: str, curves: dict[str, pd.Series], skip: int, legend: bool) -> None:
    style = {"training": (COLORS[0], "-"), "validation": (COLORS[1], "--")}
    for split, values in curves.items():
        color, line = style[split]
        marker = "o" if len(values) == 1 else None
        ax.plot(
            values.index.to_numpy(), values.to_numpy(), line, color=color, label=split, marker=marker, linewidth=1.6
        )
    settled = np.concatenate(
        [(v.iloc[skip:] if len(v) > skip + 2 else v).to_numpy(dtype=float) for v in curves.values()]
    )
    settled = settled[np.isfinite(settled)]
    if len(settled) and settled.min() < settled.max():
        margin = 0.06 * (settled.max() - settled.min())
        ax.set_ylim(settled.min() - margin, settled.max() + margin)
    ax.set_title(_TITLES.get(metric, literal(metric.replace("_", " "))), fontsize=10)
    ax.set_xlabel("epoch", fontsize=9)
    ax.set_ylabel("nats a cell" if metric == "elbo" else "", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if legend:
        ax.legend(fontsize=8, frameon=False)
    tidy(ax)
