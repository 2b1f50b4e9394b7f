"""Source cells: the control cells that generated cells start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pertvae._expression import mean_profile
from pertvae._labels import LabelFormat, hint, is_control, require_column
from pertvae.reference._training import Controls, batches_of, counts_of, read_rows


@dataclass
class Source:
    """Cells to start from.

    Parameters
    ----------
    x
        Observed counts, CSR, cells x genes.
    obs
        Covariates, indexed by cell.
    profile
        Mean log1p CP10k, to which shifts are added.
    batches
        Technical batch of each cell, text; ``None`` for references that know none.
    """

    x: sp.csr_matrix
    obs: pd.DataFrame
    profile: np.ndarray
    batches: np.ndarray | None


def training_source(controls: Controls, labels: str | None) -> Source:
    """Return the training controls, or those of one context."""
    if labels is None:
        return Source(controls.x, controls.obs, controls.profiles[""], controls.batches)
    if controls.contexts is None:
        raise ValueError(f"labels={labels!r} needs fit(..., labels_key=...), the obs column of the context.")
    if labels not in controls.profiles:
        raise KeyError(
            f"labels={labels!r} has no training controls.{hint(labels, [c for c in controls.profiles if c])}"
        )
    inside = np.flatnonzero(controls.contexts == labels)
    batches = None if controls.batches is None else controls.batches[inside]
    return Source(controls.x[inside], controls.obs.iloc[inside], controls.profiles[labels], batches)


def source_of(
    adata: AnnData,
    indices: Sequence[int] | np.ndarray | None,
    *,
    genes: pd.Index,
    perturbation_key: str,
    fmt: LabelFormat,
    layer: str | None,
    covariates: Sequence[str],
    batch_key: str | None,
) -> Source:
    """Return cells of the caller: those numbered, or the control cells."""
    columns = adata.var_names.get_indexer(genes)
    if (columns < 0).any():
        lost = list(genes[columns < 0])
        raise KeyError(f"adata lacks {len(lost)} genes of the fit, first {lost[0]!r}.{hint(lost[0], adata.var_names)}")
    if indices is None:
        require_column(adata.obs, perturbation_key, "adata.obs", "perturbation_key")
        rows = np.flatnonzero(is_control(adata.obs[perturbation_key], fmt.control, fmt.sep))
        if not len(rows):
            raise ValueError(
                f"adata has no control cells ({' or '.join(map(repr, fmt.control))}) in obs[{perturbation_key!r}]. "
                "Pass indices, or leave adata out to start from the training controls."
            )
    else:
        rows = np.asarray(indices)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        if len(rows) and not (-adata.n_obs <= rows.min() and rows.max() < adata.n_obs):
            raise ValueError(f"indices run from {rows.min()} to {rows.max()}, but adata has {adata.n_obs} cells.")
        rows = rows % adata.n_obs
    for column in covariates:
        require_column(adata.obs, column, "adata.obs", "covariates")
    obs = adata.obs.iloc[rows]
    x = read_rows(counts_of(adata, layer), rows)[:, columns]
    return Source(
        x=x,
        obs=obs[list(covariates)].copy(),
        profile=mean_profile(x) if len(rows) else np.zeros(x.shape[1]),
        batches=None if batch_key is None else batches_of(obs, batch_key),
    )
