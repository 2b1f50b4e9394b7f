"""Treatment effects with their credible intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pertvae._labels import hint
from pertvae._storage import read_tables
from pertvae.pl._canvas import COLORS, INK, MUTED, figure_of, finish, literal, new_figure, shorten, tidy

_TABLES = ("mean", "lower", "upper")


def treatment_effects(
    data: Any,
    perturbations: str | Sequence[str] | None = None,
    *,
    key: str = "samsvae_effects",
    n_genes: int = 12,
    genes: Sequence[str] | None = None,
    n_perturbations: int = 4,
    n_columns: int = 4,
    xlabel: str = "effect (log1p CP10k)",
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw the effect of perturbations on genes: point and credible interval, one panel a perturbation.

    Parameters
    ----------
    data
        What ``model.get_treatment_effects()`` returned, or an AnnData in which it was stored.
    perturbations
        Perturbations to draw; by default the ``n_perturbations`` with the largest effects.
    key
        Where the effects are stored, when ``data`` is an AnnData.
    n_genes
        Genes a panel: those with the largest absolute mean effect, largest first.
    genes
        Genes to draw in every panel instead.
    n_perturbations
        Panels when ``perturbations`` is not given.
    n_columns
        Panels side by side.
    xlabel
        Label of the axis; change it when the effects were asked for on another scale.
    ax
        Axes to draw into (one perturbation only); by default a new figure, unknown to pyplot.
    figsize
        Size of the new figure in inches.
    save
        File to write; the suffix names the format.

    Returns
    -------
    The matplotlib figure. Effects whose interval leaves out zero are filled, others are open circles.

    Raises
    ------
    KeyError
        If the effects are not in ``data``, or a perturbation or gene is not among them.
    ValueError
        If ``ax`` is given for several perturbations.
    """
    mean, lower, upper = effect_tables(data, key)
    if perturbations is None:
        strength = np.sqrt((mean**2).sum(axis=1)).sort_values(ascending=False, kind="stable")
        chosen = list(strength.index[: 1 if ax is not None else n_perturbations])
    else:
        chosen = [perturbations] if isinstance(perturbations, str) else [str(p) for p in perturbations]
    for name in chosen:
        if name not in mean.index:
            raise KeyError(f"The perturbation {name!r} has no treatment effects.{hint(name, mean.index)}")
    for gene in genes or ():
        if gene not in mean.columns:
            raise KeyError(f"The gene {gene!r} has no treatment effects.{hint(gene, mean.columns)}")
    if ax is not None and len(chosen) != 1:
        raise ValueError(f"ax holds one perturbation but {len(chosen)} were asked for: pass one, or leave ax out.")

    if ax is None:
        across = min(n_columns, len(chosen))
        down = -(-len(chosen) // across)
        rows = len(genes) if genes is not None else min(n_genes, mean.shape[1])
        figure = new_figure(figsize or (0.5 + 2.6 * across, down * (0.9 + 0.22 * rows)))
        axes = list(figure.subplots(down, across, squeeze=False).ravel())
        for spare in axes[len(chosen) :]:
            spare.set_visible(False)
    else:
        figure, axes = figure_of(ax), [ax]
    for panel, name in zip(axes, chosen, strict=False):
        values = mean.loc[name]
        order = list(genes) if genes is not None else _largest(values, n_genes)
        _panel(panel, name, values[order], lower.loc[name, order], upper.loc[name, order], xlabel)
    return finish(figure, save)


def effect_tables(data: Any, key: str = "samsvae_effects") -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return mean, lower and upper (perturbations x genes) from either form."""
    if all(isinstance(getattr(data, name, None), pd.DataFrame) for name in _TABLES):
        tables = {name: getattr(data, name) for name in _TABLES}
    elif hasattr(data, "uns"):
        if key not in data.uns:
            raise KeyError(
                f"uns[{key!r}] is missing.{hint(key, data.uns)} Call model.get_treatment_effects() first: it writes "
                "the effects there."
            )
        tables = read_tables(data.uns, key)
    else:
        raise TypeError(
            f"Treatment effects cannot be read from {type(data).__name__}: pass what get_treatment_effects() "
            "returned, or the AnnData it was stored in."
        )
    mean = tables["mean"]
    return mean, tables["lower"].reindex_like(mean), tables["upper"].reindex_like(mean)


def _largest(values: pd.Series, n: int) -> list[str]:
    return list(values.abs().sort_values(ascending=False, kind="stable").index[:n])


def _panel(ax: Axes, name: str, mean: pd.Series, lower: pd.Series, upper: pd.Series, xlabel: str) -> None:
    y = np.arange(len(mean))
    low, middle, high = (s.to_numpy(dtype=float) for s in (lower, mean, upper))
    clear = (low > 0) | (high < 0)
    color = [COLORS[1] if value > 0 else COLORS[0] for value in middle]
    ax.axvline(0, color=MUTED, linewidth=0.8, zorder=0)
    ax.hlines(y, low, high, colors=color, linewidth=1.6)
    ax.scatter(middle, y, s=26, c=np.where(clear, color, "white"), edgecolors=color, linewidths=1.2, zorder=3)
    ax.set_yticks(y, [shorten(g, 16) for g in mean.index], fontsize=8)
    ax.set_ylim(len(mean) - 0.4, -0.6)
    ax.tick_params(axis="x", labelsize=8)
    ax.set_title(literal(name), fontsize=10, color=INK)
    ax.set_xlabel(xlabel, fontsize=8)
    tidy(ax)
