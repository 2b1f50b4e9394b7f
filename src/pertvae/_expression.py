"""Expression on the scale every shift is measured on: log1p of counts per 10,000.

Matrices stay sparse; rows are visited in blocks, so backed data never come into memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp

from pertvae._constants import CP10K

BLOCK = 4096


def row_blocks(x: Any, rows: np.ndarray | None = None, size: int = BLOCK) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield ``(row indices, block)`` with each block a dense array or CSR matrix in memory.

    Parameters
    ----------
    x
        Cells x genes: array, scipy sparse matrix or array, or a backed dataset.
    rows
        Rows to visit, in this order; ``None`` for all. Backed data are read in sorted order within a block.
    size
        Rows a block.
    """
    index = np.arange(x.shape[0]) if rows is None else np.asarray(rows)
    for start in range(0, len(index), size):
        part = index[start : start + size]
        if rows is None:
            block = x[start : start + len(part)]
        elif isinstance(x, np.ndarray) or sp.issparse(x):
            block = x[part]
        else:  # backed datasets want sorted, unique rows
            unique, inverse = np.unique(part, return_inverse=True)
            block = x[unique][inverse]
        yield part, (sp.csr_matrix(block) if sp.issparse(block) else np.asarray(block))


def row_sums(x: Any, rows: np.ndarray | None = None) -> np.ndarray:
    """Return the total counts of each cell over all genes given, float64."""
    n = x.shape[0] if rows is None else len(rows)
    sums = np.empty(n)
    start = 0
    for part, block in row_blocks(x, rows):
        sums[start : start + len(part)] = np.asarray(block.sum(axis=1), dtype=np.float64).ravel()
        start += len(part)
    return sums


def log1p_cp10k(x: Any) -> Any:
    """Return log1p(1e4 x / sum x) of each row; a cell without counts gives zeros.

    Parameters
    ----------
    x
        Counts in memory, cells x genes, dense or sparse. Not changed.

    Returns
    -------
    The same kind of matrix (CSR for sparse input), float64.
    """
    totals = np.asarray(x.sum(axis=1), dtype=np.float64).ravel()
    factor = np.divide(CP10K, totals, out=np.zeros_like(totals), where=totals > 0)
    if sp.issparse(x):
        y = sp.csr_matrix(x, dtype=np.float64, copy=True)
        y.data = np.log1p(y.data * np.repeat(factor, np.diff(y.indptr)))
        return y
    return np.log1p(np.asarray(x, dtype=np.float64) * factor[:, None])


def mean_profile(x: Any, rows: np.ndarray | None = None) -> np.ndarray:
    """Return the mean over cells of log1p CP10k, one value a gene (float64).

    Parameters
    ----------
    x
        Counts, cells x genes: dense, sparse or backed.
    rows
        Cells to average; ``None`` for all.
    """
    n = x.shape[0] if rows is None else len(rows)
    if n == 0:
        raise ValueError("mean_profile: no cells to average.")
    total = np.zeros(x.shape[1])
    for _, block in row_blocks(x, rows):
        total += np.asarray(log1p_cp10k(block).sum(axis=0)).ravel()
    return total / n


def group_profiles(x: Any, codes: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean log1p CP10k of every group of cells, and the cells in each.

    Parameters
    ----------
    x
        Counts, cells x genes: dense, sparse or backed.
    codes
        Group of each cell, 0 to ``n_groups - 1``; a negative code leaves the cell out.
    n_groups
        Number of groups.

    Returns
    -------
    Means (groups x genes, NaN rows for empty groups) and cell counts (groups).
    """
    rows = np.flatnonzero(codes >= 0)
    sums = np.zeros((n_groups, x.shape[1]))
    for part, block in row_blocks(x, rows):
        member = sp.csr_matrix((np.ones(len(part)), (codes[part], np.arange(len(part)))), shape=(n_groups, len(part)))
        added = member @ log1p_cp10k(block)
        sums += added.toarray() if sp.issparse(added) else added
    counts = np.bincount(codes[rows], minlength=n_groups)
    with np.errstate(invalid="ignore"):
        return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], np.nan), counts
