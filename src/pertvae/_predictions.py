"""The AnnData that every prediction returns, from models and references alike.

One block of generated cells a perturbation in the order asked, then the source control cells once. Shifts (mean
log1p CP10k of a block minus the same for zero dose) stand in ``uns`` as a stored table.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertvae._constants import UNS_PROVENANCE_KEY
from pertvae._storage import read_table, write_table


@dataclass
class Block:
    """Cells of one label.

    Parameters
    ----------
    label
        The label as the caller wrote it; for controls the first control token.
    x
        Counts (CSR) or expected counts (dense), cells x genes.
    obs
        One row a cell, indexed by the name of the source cell: covariates and nothing else.
    mean
        Expected counts, cells x genes, or ``None``.
    """

    label: str
    x: Any
    obs: pd.DataFrame
    mean: np.ndarray | None = None


def block_obs(block: Block, perturbation_key: str, generated: bool) -> pd.DataFrame:
    """Return the obs of a block: label, source cell, ``generated``, covariates; names unique within the block."""
    obs = block.obs.copy()
    source = obs.index.astype(str)
    obs.insert(0, "generated", generated)
    obs.insert(0, "source_cell", source.to_numpy(dtype=object))
    obs[perturbation_key] = block.label
    obs.index = pd.Index([f"{block.label}:{i}" for i in range(len(obs))] if generated else source.to_list())
    return obs


def prediction_anndata(
    blocks: Sequence[Block],
    controls: Block,
    var: pd.DataFrame,
    perturbation_key: str,
    shifts: pd.DataFrame,
    shift_key: str,
    provenance: Mapping[str, Any],
) -> ad.AnnData:
    """Join blocks of generated cells and their source controls into one AnnData.

    Parameters
    ----------
    blocks
        One a perturbation, in the order asked.
    controls
        The source cells once, observed counts.
    var
        Genes; the index is kept, columns too.
    perturbation_key
        obs column of the labels.
    shifts
        Perturbations x genes, log1p CP10k.
    shift_key
        ``uns`` key of the stored shifts.
    provenance
        What goes to ``uns["pertvae"]``: model, version, seed, settings, value_kind.

    Returns
    -------
    AnnData with ``obs[perturbation_key]``, ``obs["source_cell"]``, ``obs["generated"]``, covariates, counts in
    ``X``, ``layers["mean"]`` when the blocks have expected counts (observed counts for the controls),
    ``uns["pertvae"]`` and ``uns[shift_key]``.
    """
    everything = [*blocks, controls]
    obs = _join_obs([block_obs(b, perturbation_key, generated=b is not controls) for b in everything])
    dense = any(not sp.issparse(b.x) for b in blocks)
    if dense:
        x: Any = np.concatenate([_dense(b.x) for b in everything]).astype(np.float32, copy=False)
    else:
        x = sp.vstack([sp.csr_matrix(b.x) for b in everything], format="csr").astype(np.float32)
    result = ad.AnnData(X=x, obs=obs, var=var.copy())
    if blocks and all(b.mean is not None for b in blocks):
        if dense:
            result.layers["mean"] = result.X
        else:
            parts = [b.mean for b in blocks if b.mean is not None]
            result.layers["mean"] = np.concatenate([*parts, _dense(controls.x)]).astype(np.float32, copy=False)
    result.obs_names_make_unique()
    write_table(result.uns, shift_key, shifts)
    result.uns[UNS_PROVENANCE_KEY] = {**provenance, "shifts": shift_key}
    return result


def write_prediction(
    path: str,
    blocks: Iterable[Block],
    controls: Block,
    var: pd.DataFrame,
    perturbation_key: str,
    shifts: Callable[[], pd.DataFrame],
    shift_key: str,
    provenance: Mapping[str, Any],
) -> ad.AnnData:
    """Write blocks to an h5ad file as they come, so that one block at a time is in memory.

    Parameters
    ----------
    path
        File to write; it appears whole or not at all.
    blocks, controls, var, perturbation_key, shift_key, provenance
        See :func:`prediction_anndata`.
    shifts
        Called after the last block.

    Returns
    -------
    The file, opened in backed mode. Its ``X`` is CSR for counts; expected counts are stored as CSR too.
    """
    scratch = f"{path}.partial"
    frames: list[pd.DataFrame] = []
    try:
        with h5py.File(scratch, "w") as file:
            for block in itertools.chain(blocks, [controls]):
                x = sp.csr_matrix(block.x, dtype=np.float32)
                if not frames:
                    # the first block fixes the type of the row pointers, which later blocks may outgrow
                    x.indptr = x.indptr.astype(np.int64)
                    ad.io.write_elem(file, "X", x)
                else:
                    ad.io.sparse_dataset(file["X"]).append(x)
                frames.append(block_obs(block, perturbation_key, generated=block is not controls))
            small = ad.AnnData(obs=_join_obs(frames), var=var.copy())
            small.obs_names_make_unique()
            write_table(small.uns, shift_key, shifts())
            small.uns[UNS_PROVENANCE_KEY] = {**provenance, "shifts": shift_key}
            for key, value in (("obs", small.obs), ("var", small.var), ("uns", dict(small.uns))):
                ad.io.write_elem(file, key, value)
            for key in ("layers", "obsm", "obsp", "varm", "varp"):
                ad.io.write_elem(file, key, {})
            file.attrs["encoding-type"], file.attrs["encoding-version"] = "anndata", "0.1.0"
        os.replace(scratch, path)
    finally:
        if os.path.exists(scratch):
            os.remove(scratch)
    return ad.read_h5ad(path, backed="r")


def _join_obs(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the obs of all blocks, text as text."""
    obs = pd.concat(frames)
    for column in obs.columns:
        if obs[column].dtype == object:
            obs[column] = obs[column].astype(str)
    return obs


def predicted_shifts(predicted: ad.AnnData) -> pd.DataFrame:
    """Return the shifts stored in a prediction: perturbations x genes, log1p CP10k.

    Raises
    ------
    KeyError
        If the AnnData is not a prediction of this package.
    """
    if UNS_PROVENANCE_KEY not in predicted.uns or "shifts" not in predicted.uns[UNS_PROVENANCE_KEY]:
        raise KeyError(f"uns[{UNS_PROVENANCE_KEY!r}]['shifts'] is missing: this AnnData is not a pertvae prediction.")
    return read_table(predicted.uns, predicted.uns[UNS_PROVENANCE_KEY]["shifts"])


def _dense(x: Any) -> np.ndarray:
    return x.toarray() if sp.issparse(x) else np.asarray(x)
