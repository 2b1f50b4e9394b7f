"""Observed and predicted cells side by side in one UMAP."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.figure import Figure

from pertvae.benchmark._cloud import CONTROL
from pertvae.pl._canvas import COLORS, literal, new_figure, shorten, tidy

MAX_METHODS = 5
_GREY = "#c4c9cf"


def cells_figure(observed: pd.DataFrame, predicted: Mapping[str, pd.DataFrame]) -> Figure | None:
    """Draw the held-out cells, and beside them what each method predicted, in one embedding.

    Parameters
    ----------
    observed
        Principal components of training controls and held-out cells, indexed by unit.
    predicted
        The same of predicted cells, by method; the first ``MAX_METHODS`` are shown.
    """
    shown = dict(list(predicted.items())[:MAX_METHODS])
    if observed.empty or not shown:
        return None
    parts = {"observed": observed, **shown}
    joined = pd.concat(parts.values())
    places = _umap(joined.to_numpy(dtype=np.float32))
    units = [u for u in dict.fromkeys(observed.index) if u != CONTROL]
    colors = dict(zip(units, COLORS, strict=False))
    n_columns = min(3, len(parts))
    n_rows = -(-len(parts) // n_columns)
    figure = new_figure((3.1 * n_columns, 3.0 * n_rows + 0.5))
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True).ravel()
    controls = places[: len(observed)][(observed.index == CONTROL)]
    start = 0
    for ax, (name, part) in zip(axes, parts.items(), strict=False):
        here = places[start : start + len(part)]
        start += len(part)
        ax.scatter(*controls.T, s=4, c=_GREY, linewidths=0, label="training controls")
        for unit in units:
            inside = np.asarray(part.index == unit)
            ax.scatter(*here[inside].T, s=7, c=colors[unit], linewidths=0, alpha=0.75, label=literal(shorten(unit, 26)))
        ax.set_title("observed, held out" if name == "observed" else f"predicted by {literal(name)}", fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
        tidy(ax)
    for spare in axes[len(parts) :]:
        spare.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        fontsize=8,
        frameon=False,
        markerscale=2.2,
    )
    return figure


def _umap(x: np.ndarray) -> np.ndarray:
    """Return a two-dimensional embedding, the same for the same cells."""
    import scanpy as sc

    adata = AnnData(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fixed seed turns threads off, and umap says so
        sc.pp.neighbors(adata, n_neighbors=min(20, len(x) - 1), use_rep="X", random_state=0)
        sc.tl.umap(adata, min_dist=0.3, random_state=0)
    return np.asarray(adata.obsm["X_umap"])
