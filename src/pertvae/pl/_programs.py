"""Heatmap of perturbation programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

from pertvae._labels import hint
from pertvae._storage import read_tables
from pertvae.pl._canvas import DIVERGING, INK, MUTED, figure_of, finish, literal, new_figure, shorten, tidy

_TABLES = ("effects", "inclusion", "loadings")


def programs(
    data: Any,
    perturbations: Sequence[str] | None = None,
    *,
    key: str = "samsvae_programs",
    n_perturbations: int = 50,
    n_programs: int = 20,
    n_genes: int = 5,
    inclusion_threshold: float = 0.5,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw which perturbation moves which program, and the genes of each program.

    Columns are perturbations (alike ones side by side), rows are programs. Colour is the effect in units of the basal
    state's prior standard deviation; a dot says that the program is included, a larger dot with more certainty. The
    genes with the largest absolute loading stand beside each program, with an arrow for the direction in which a
    positive effect moves them.

    Parameters
    ----------
    data
        What ``model.get_perturbation_programs()`` returned, or an AnnData in which it was stored.
    perturbations
        Perturbations to draw, in this order; by default the ``n_perturbations`` with the largest effects, clustered.
    key
        Where the programs are stored, when ``data`` is an AnnData.
    n_perturbations
        Most columns drawn when ``perturbations`` is not given.
    n_programs
        Most rows drawn: those with the largest effects among the perturbations drawn.
    n_genes
        Genes named beside each program.
    inclusion_threshold
        A dot is drawn where the inclusion is above this (0 to 1).
    ax
        Axes to draw into; by default a new figure, unknown to pyplot.
    figsize
        Size of the new figure in inches; by default by the number of rows and columns.
    save
        File to write; the suffix names the format.

    Returns
    -------
    The matplotlib figure. Nothing is written to ``data``.

    Raises
    ------
    KeyError
        If the programs are not in ``data``, or a perturbation has none.
    """
    effects, inclusion, loadings = program_tables(data, key)
    columns = _pick(effects, perturbations, n_perturbations)
    effects, inclusion = effects.loc[columns], inclusion.loc[columns]
    strength = effects.abs().max(axis=0)
    kept = strength.sort_values(ascending=False, kind="stable").index[:n_programs]
    rows = _clustered(effects[kept].T.fillna(0.0))
    if perturbations is None:
        columns = _clustered(effects[rows].fillna(0.0))
    grid = effects.loc[columns, rows].T.to_numpy(dtype=float)
    certain = inclusion.loc[columns, rows].T.to_numpy(dtype=float)

    if ax is None:
        width = min(3.2 + 0.24 * len(columns) + 0.085 * 11 * n_genes, 30.0)
        figure = new_figure(figsize or (max(width, 5.5), 1.9 + 0.27 * len(rows)))
        ax = figure.add_subplot()
    figure = figure_of(ax)
    limit = float(np.nanmax(np.abs(grid))) if np.isfinite(grid).any() else 1.0
    image = ax.imshow(grid, cmap=DIVERGING, vmin=-(limit or 1.0), vmax=limit or 1.0, aspect="auto")
    shown = certain > inclusion_threshold
    y, x = np.nonzero(shown)
    dark = np.abs(grid[y, x]) > 0.65 * limit
    span = max(1.0 - inclusion_threshold, 1e-9)
    size = 3.0 + 13.0 * (certain[y, x] - inclusion_threshold) / span
    ax.scatter(x, y, s=size, c=np.where(dark, "white", INK), linewidths=0)
    ax.set_xticks(range(len(columns)), [shorten(c) for c in columns], rotation=90, fontsize=8)
    ax.set_yticks(range(len(rows)), [shorten(r, 18) for r in rows], fontsize=8)
    ax.set_ylabel("program")
    ax.tick_params(length=0)
    note = f"dot: inclusion above {inclusion_threshold:g}" + ("; beside: genes it moves most" if n_genes else "")
    ax.set_title(f"Effect of each perturbation on each program\n({note})", fontsize=10)
    if n_genes:
        beside = ax.secondary_yaxis("right")
        beside.set_yticks(range(len(rows)), [_top_genes(loadings.T[r], n_genes) for r in rows], fontsize=8)
        beside.tick_params(length=0, labelcolor=INK)
        beside.spines["right"].set_visible(False)
    bar = figure.colorbar(image, ax=ax, location="bottom", shrink=0.5, aspect=30, pad=0.02)
    bar.set_label("effect (standard deviations of the basal state; red: up, blue: down)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    tidy(ax)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    return finish(figure, save)


def program_tables(data: Any, key: str = "samsvae_programs") -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return effects, inclusion (perturbations x programs) and loadings (programs x genes) from either form."""
    if all(hasattr(data, name) for name in _TABLES):
        tables = {name: getattr(data, name) for name in _TABLES}
    elif hasattr(data, "uns"):
        if key not in data.uns:
            raise KeyError(
                f"uns[{key!r}] is missing.{hint(key, data.uns)} Call model.get_perturbation_programs() first: it "
                "writes the programs there."
            )
        tables = read_tables(data.uns, key)
        missing = [name for name in _TABLES if name not in tables]
        if missing:
            raise KeyError(f"uns[{key!r}] lacks {missing}: it must hold {list(_TABLES)}.")
    else:
        raise TypeError(
            f"programs cannot be read from {type(data).__name__}: pass what get_perturbation_programs() returned, or "
            "the AnnData it was stored in."
        )
    named = [_text_index(tables[name]) for name in _TABLES]
    effects, inclusion, loadings = named
    return effects, inclusion.reindex(index=effects.index, columns=effects.columns), loadings.reindex(effects.columns)


def _text_index(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_axis(table.index.astype(str), axis=0).set_axis(table.columns.astype(str), axis=1)


def _pick(effects: pd.DataFrame, perturbations: Sequence[str] | None, n: int) -> list[str]:
    if perturbations is None:
        strength = np.sqrt((effects.fillna(0.0) ** 2).sum(axis=1))
        return list(strength.sort_values(ascending=False, kind="stable").index[:n])
    wanted = [perturbations] if isinstance(perturbations, str) else [str(p) for p in perturbations]
    for name in wanted:
        if name not in effects.index:
            raise KeyError(f"The perturbation {name!r} has no programs.{hint(name, effects.index)}")
    return wanted


def _clustered(table: pd.DataFrame) -> list[str]:
    """Return the row names with alike rows side by side."""
    if len(table) < 3:
        return list(table.index)
    return list(table.index[leaves_list(linkage(table.to_numpy(dtype=float), method="average"))])


def _top_genes(loading: pd.Series, n: int) -> str:
    values = loading.dropna()
    top = values.loc[values.abs().sort_values(ascending=False, kind="stable").index[:n]]
    arrows = {True: "\N{UPWARDS ARROW}", False: "\N{DOWNWARDS ARROW}"}
    return "  ".join(f"{literal(gene)}{arrows[bool(value > 0)]}" for gene, value in top.items())
