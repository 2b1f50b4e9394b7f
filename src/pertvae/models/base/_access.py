"""How the getters reach the data: tables of the registered object, minibatches in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from torch import Tensor

from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae._labels import hint

if TYPE_CHECKING:
    from pertvae.models.base._model import PerturbationModel

INNER_BLOCK = 128
"""Rows of every forward pass of a getter that promises results independent of batch size and order: the last block
is padded to it, so that each cell sees matrix products of the same shape."""


def padded(values: np.ndarray, device: Any, axis: int = 0) -> Tensor:
    """Return a block as a tensor of ``INNER_BLOCK`` rows, the last row repeated."""
    missing = INNER_BLOCK - values.shape[axis]
    if missing:
        last = np.take(values, [-1], axis=axis)
        values = np.concatenate([values, np.repeat(last, missing, axis=axis)], axis=axis)
    return torch.as_tensor(np.ascontiguousarray(values), dtype=torch.float32, device=device)


def counts_table(model: PerturbationModel, adata: AnnData | MuData) -> AnnData:
    """Return the AnnData that holds the registered counts: the object itself, or a modality."""
    if isinstance(adata, MuData):
        manager = model.get_anndata_manager(adata, required=True)
        return adata.mod[manager.data_registry[REGISTRY_KEYS.X_KEY]["mod_key"]]
    return adata


def obs_column(model: PerturbationModel, adata: AnnData | MuData, argument: str, key: str) -> pd.Series:
    """Return the column that a setup argument names, from the modality it was registered in."""
    modality = (model.registry_["setup_args"].get("modalities") or {}).get(argument)
    if isinstance(adata, MuData) and modality is not None:
        return adata.mod[modality].obs[key]
    return adata.obs[key]


def covariate_columns(model: PerturbationModel, adata: AnnData | MuData) -> pd.DataFrame:
    """Return the registered covariates of all cells, named as the user named them."""
    arguments = model.registry_["setup_args"]
    columns = {}
    for argument in ("batch_key", "labels_key", "categorical_covariate_keys", "continuous_covariate_keys"):
        keys = arguments.get(argument)
        for key in [keys] if isinstance(keys, str) else keys or []:
            columns[key] = obs_column(model, adata, argument, key)
    return pd.DataFrame(columns, index=adata.obs_names)


def covariate_groups(manager: AnnDataManager) -> np.ndarray:
    """Return a code of each cell's batch, context and further categorical covariates together."""
    keys = [REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.LABELS_KEY, REGISTRY_KEYS.CAT_COVS_KEY]
    tables = [np.asarray(manager.get_from_registry(k)) for k in keys if k in manager.data_registry]
    columns = pd.DataFrame(np.column_stack(tables).astype(np.int64))
    return columns.groupby(list(columns)).ngroup().to_numpy()


def dose_table(model: PerturbationModel, adata: AnnData | MuData) -> sp.csr_matrix:
    """Return the registered doses, cells x components."""
    return model.get_anndata_manager(adata, required=True).get_from_registry(PERTURBATION_REGISTRY_KEY)


def row_indices(adata: AnnData | MuData, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """Return indices as an integer array; booleans select, ``None`` is every cell.

    Raises
    ------
    ValueError
        If an index is outside the data.
    """
    if indices is None:
        return np.arange(adata.n_obs)
    rows = np.asarray(indices)
    if rows.dtype == bool:
        if len(rows) != adata.n_obs:
            raise ValueError(f"indices is a mask of {len(rows)} entries, but the data have {adata.n_obs} cells.")
        return np.flatnonzero(rows)
    if rows.size == 0:
        return rows.astype(np.int64)
    if rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= adata.n_obs:
        raise ValueError(f"indices must be whole numbers from 0 to {adata.n_obs - 1}; got {rows[:5].tolist()}.")
    return rows.astype(np.int64)


def control_indices(
    model: PerturbationModel,
    adata: AnnData | MuData,
    indices: Sequence[int] | np.ndarray | None = None,
    labels: Any = None,
    batch: Any = None,
) -> np.ndarray:
    """Return the cells a prediction starts from.

    Parameters
    ----------
    model, adata
        Registered data.
    indices
        Cells to choose from; by default the controls.
    labels, batch
        Keep cells with these values of ``labels_key`` and ``batch_key``.

    Raises
    ------
    ValueError
        If no cell is left, or a value does not occur.
    """
    rows = row_indices(adata, indices)
    if indices is None:
        rows = rows[np.diff(dose_table(model, adata).indptr) == 0]
        if not len(rows):
            raise ValueError("These data have no control cells: pass indices=... with the cells to start from.")
    for argument, wanted in (("labels_key", labels), ("batch_key", batch)):
        if wanted is None:
            continue
        name = argument.removesuffix("_key")
        key = model.registry_["setup_args"].get(argument)
        if key is None:
            raise ValueError(f"{name}={wanted!r} needs data registered with {argument}.")
        column = obs_column(model, adata, argument, key).astype(str).to_numpy()
        values = [str(v) for v in ([wanted] if isinstance(wanted, str) or np.isscalar(wanted) else wanted)]
        for value in values:
            if value not in set(column):
                raise ValueError(f"{name}={value!r} does not occur in obs[{key!r}].{hint(value, np.unique(column))}")
        rows = rows[np.isin(column[rows], values)]
    if not len(rows):
        raise ValueError(f"No cell is left to start from (labels={labels!r}, batch={batch!r}).")
    return rows


def minibatches(
    model: PerturbationModel, adata: AnnData | MuData, rows: np.ndarray, batch_size: int | None = None
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Yield ``(positions in rows, tensors)`` with exactly ``INNER_BLOCK`` rows in the tensors.

    Tensors beyond the positions are padding. Backed data are read in sorted order, so ``rows`` may be in any order
    but must not repeat.

    Parameters
    ----------
    model, adata, rows
        Registered data and cells.
    batch_size
        Cells read at a time, rounded up to whole blocks.
    """
    order = np.argsort(rows, kind="stable")
    blocks = max(1, -(-(batch_size or 4 * INNER_BLOCK) // INNER_BLOCK))
    # a loader without a generator draws its base seed from the global one
    loader = model._make_data_loader(
        adata=adata, indices=rows[order], batch_size=blocks * INNER_BLOCK, generator=torch.Generator()
    )
    start = 0
    device = model.device
    for tensors in loader:
        size = len(tensors[REGISTRY_KEYS.X_KEY])
        for inner in range(0, size, INNER_BLOCK):
            part = {k: v[inner : inner + INNER_BLOCK] for k, v in tensors.items()}
            n = len(part[REGISTRY_KEYS.X_KEY])
            if n < INNER_BLOCK:
                part = {k: torch.cat([v, v[-1:].expand(INNER_BLOCK - n, *v.shape[1:])]) for k, v in part.items()}
            yield order[start + inner : start + inner + n], {k: v.to(device) for k, v in part.items()}
        start += size
