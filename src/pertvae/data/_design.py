"""From labels or a design matrix in an AnnData to doses: cells x components, CSR float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pertvae._labels import LabelFormat, check_labels, hint, require_column, unknown_components


@dataclass
class Design:
    """What the registration stores: doses of every cell, its condition, and the names of the components.

    Parameters
    ----------
    doses
        Cells x components, CSR float32; controls are empty rows.
    condition
        Canonical label of each cell.
    components
        Names of the columns of ``doses``.
    """

    doses: sp.csr_matrix
    condition: pd.Categorical
    components: tuple[str, ...]


def design_from_labels(
    adata: AnnData,
    key: str,
    fmt: LabelFormat,
    *,
    dosage_key: str | None = None,
    components: Sequence[str] | None = None,
) -> Design:
    """Encode a label column, parsed once a category and then gathered by row.

    Parameters
    ----------
    adata
        Holds the label column, and the dose column if there is one.
    key
        Label column of ``adata.obs``.
    fmt
        Control tokens and separator.
    dosage_key
        Dose column of ``adata.obs``: numbers, or text such as ``"1.0+0.5"`` aligned with the components as written.
    components
        The vocabulary of an earlier registration; ``None`` builds it from the data.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If labels are missing, a label has an empty component, a dose is negative, not finite or not aligned, or a
        component is not in ``components``.
    """
    require_column(adata.obs, key, "adata.obs", "perturbation_key")
    labels = check_labels(adata.obs[key], key)
    codes = np.asarray(labels.codes)
    numeric = None
    if dosage_key is None:
        rows = [dict.fromkeys(fmt.components(c), 1.0) for c in labels.categories]
    else:
        require_column(adata.obs, dosage_key, "adata.obs", "dosage_key")
        column = adata.obs[dosage_key]
        # the dose of a control cell is not read
        perturbed = np.array([bool(fmt.components(c)) for c in labels.categories])[codes]
        if pd.api.types.is_numeric_dtype(column):
            numeric = column.to_numpy(dtype=np.float64)
            bad = perturbed & ~(np.isfinite(numeric) & (numeric >= 0))
            if bad.any():
                i = int(np.flatnonzero(bad)[0])
                raise ValueError(
                    f"obs[{dosage_key!r}] has {int(bad.sum())} doses that are negative or not finite, first "
                    f"{numeric[i]} in cell {str(adata.obs_names[i])!r} (label {str(labels.categories[codes[i]])!r})."
                )
            rows = [dict.fromkeys(fmt.components(c), 1.0) for c in labels.categories]
        else:
            doses = pd.Categorical(column)
            missing = perturbed & (doses.codes < 0)
            if missing.any():
                first = str(adata.obs_names[np.flatnonzero(missing)[0]])
                raise ValueError(
                    f"obs[{dosage_key!r}] has {int(missing.sum())} missing doses, first in cell {first!r}."
                )
            amounts = [*doses.categories, 1.0]  # the last stands for a missing one
            places = np.where(doses.codes < 0, len(doses.categories), doses.codes)
            pairs, codes = np.unique(codes.astype(np.int64) * len(amounts) + places, return_inverse=True)
            rows = [fmt.doses(labels.categories[p // len(amounts)], amounts[p % len(amounts)]) for p in pairs]
    if components is None:
        components = sorted({c for row in rows for c in row})
    else:
        known = set(components)
        unknown = {fmt.join(row): row for row in rows if not known.issuperset(row)}
        if unknown:
            raise ValueError(unknown_components(unknown, components))
    position = {c: j for j, c in enumerate(components)}
    matrix = _csr([[(position[c], d) for c, d in row.items()] for row in rows], len(components))
    table = matrix[codes]
    if numeric is not None:
        table.data *= np.repeat(numeric, np.diff(table.indptr)).astype(np.float32)
        table.eliminate_zeros()
    names = np.array([fmt.join(row) for row in rows], dtype=object)[codes]
    if numeric is not None:
        names = np.where(np.diff(table.indptr) > 0, names, fmt.control[0])
    return Design(table, _categorical(names), tuple(components))


def design_from_obsm(adata: AnnData, key: str, fmt: LabelFormat, *, components: Sequence[str] | None = None) -> Design:
    """Encode a ready design matrix in ``adata.obsm``.

    Parameters
    ----------
    adata
        Holds the matrix.
    key
        ``adata.obsm`` key: DataFrame (columns name the components), array or sparse matrix (components are named
        by their position). A column named like a control token is dropped.
    fmt
        Control tokens and separator.
    components
        The vocabulary of an earlier registration. Columns are matched by name; absent ones are zero.

    Raises
    ------
    KeyError
        If ``key`` is not in ``adata.obsm``.
    ValueError
        If a dose is negative or not finite, a column name contains the separator, names repeat, or a column is not
        in ``components``.
    """
    if key not in adata.obsm:
        raise KeyError(f"perturbation_obsm_key={key!r} is not in adata.obsm.{hint(key, adata.obsm.keys())}")
    value: Any = adata.obsm[key]
    if isinstance(value, pd.DataFrame):
        names = [str(c).strip() for c in value.columns]
        matrix = sp.csr_matrix(value.to_numpy(dtype=np.float32))
    else:
        matrix = sp.csr_matrix(value, dtype=np.float32, copy=True)
        names = [str(j) for j in range(matrix.shape[1])]
        if components is not None and len(components) == matrix.shape[1]:
            names = list(components)
    repeated = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ValueError(f"obsm[{key!r}] names the component {repeated[0]!r} more than once.")
    if fmt.sep is not None:
        for name in names:
            if fmt.sep in name:
                raise ValueError(
                    f"The component {name!r} of obsm[{key!r}] contains the separator {fmt.sep!r}. Rename the column, "
                    "or pass another sep."
                )
    bad = np.flatnonzero(~np.isfinite(matrix.data) | (matrix.data < 0))
    if len(bad):
        row = int(np.searchsorted(matrix.indptr, bad[0], side="right") - 1)
        raise ValueError(
            f"obsm[{key!r}] has {len(bad)} doses that are negative or not finite, first {matrix.data[bad[0]]} in cell "
            f"{str(adata.obs_names[row])!r}, component {names[matrix.indices[bad[0]]]!r}."
        )
    keep = [j for j, n in enumerate(names) if n not in fmt.control]
    matrix = matrix[:, keep]
    names = [names[j] for j in keep]
    order = np.argsort(np.array(names, dtype=str), kind="stable") if components is None else None
    if components is None:
        components = [names[j] for j in order] if order is not None else names
    unknown = {n: (n,) for n in names if n not in set(components)}
    if unknown:
        raise ValueError(unknown_components(unknown, components))
    position = {c: j for j, c in enumerate(components)}
    place = sp.csr_matrix(
        (np.ones(len(names), np.float32), (np.arange(len(names)), [position[n] for n in names])),
        shape=(len(names), len(components)),
    )
    doses = sp.csr_matrix(matrix @ place, dtype=np.float32)
    doses.eliminate_zeros()
    doses.sort_indices()
    return Design(doses, _conditions(doses, components, fmt), tuple(components))


def dose_matrix(rows: Sequence[dict[str, float]], components: Sequence[str]) -> sp.csr_matrix:
    """Return doses given as one dict a row as CSR float32, rows x components."""
    position = {c: j for j, c in enumerate(components)}
    return _csr([[(position[c], d) for c, d in row.items()] for row in rows], len(components))


def distinct_doses(doses: sp.csr_matrix) -> dict[tuple[int, float], int]:
    """Return the cells of each pair of a component (its column) and a non-zero dose, sorted.

    Parameters
    ----------
    doses
        Cells x components; doses that differ in float32 are different.
    """
    values, columns = np.asarray(doses.data, dtype=np.float32), doses.indices
    order = np.lexsort((values, columns))
    order = order[values[order] != 0]
    values, columns = values[order], columns[order]
    first = np.flatnonzero((np.diff(columns, prepend=-1) != 0) | (np.diff(values, prepend=-1.0) != 0))
    cells = np.diff(first, append=len(values))
    return {(int(columns[i]), float(values[i])): int(n) for i, n in zip(first, cells, strict=True)}


def _csr(rows: Sequence[Sequence[tuple[int, float]]], n_columns: int) -> sp.csr_matrix:
    indptr = np.cumsum([0, *(len(r) for r in rows)])
    flat = [pair for r in rows for pair in sorted(r)]
    indices = np.array([j for j, _ in flat], dtype=np.int32)
    data = np.array([d for _, d in flat], dtype=np.float32)
    return sp.csr_matrix((data, indices, indptr), shape=(len(rows), n_columns))


def _categorical(names: np.ndarray) -> pd.Categorical:
    categories, codes = np.unique(names.astype(str), return_inverse=True)
    return pd.Categorical.from_codes(codes, categories=pd.Index(categories, dtype=object))


def _conditions(doses: sp.csr_matrix, components: Sequence[str], fmt: LabelFormat) -> pd.Categorical:
    """Return the canonical label of each row from the pattern of its non-zeros."""
    count = np.diff(doses.indptr)
    padded = np.full((doses.shape[0], max(int(count.max(initial=0)), 1)), -1, dtype=np.int64)
    inside = np.arange(padded.shape[1])[None, :] < count[:, None]
    padded[inside] = doses.indices
    patterns, codes = np.unique(padded, axis=0, return_inverse=True)
    names = np.array([fmt.join(components[j] for j in p if j >= 0) for p in patterns], dtype=object)
    return _categorical(names[np.asarray(codes).ravel()])
