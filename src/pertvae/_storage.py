"""Tables in ``adata.uns`` that survive ``write_h5ad`` and back.

Returned tables have perturbations as rows and genes as columns. Stored ones are transposed, because thousands of
columns break h5ad, and ``/`` in column names is replaced, because h5ad reads it as a path. A table beside maps
the stored names to the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from pertvae._constants import NAMES_SUFFIX


def _safe_names(names: pd.Index) -> list[str]:
    """Return names without ``/``, unique."""
    taken: set[str] = set()
    result = []
    for name in names.astype(str):
        base = name.replace("/", "|")
        safe, k = base, 1
        while safe in taken:
            safe, k = f"{base}_{k}", k + 1
        taken.add(safe)
        result.append(safe)
    return result


def to_stored(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the stored form of a table and its name table.

    Parameters
    ----------
    table
        Rows become columns.

    Returns
    -------
    The transposed table with safe column names, and a DataFrame indexed by those with the column ``name``.
    """
    safe = _safe_names(table.index)
    stored = table.T.copy()
    stored.columns = pd.Index(safe, dtype=object)
    stored.index = pd.Index(stored.index.astype(str), dtype=object)
    names = pd.DataFrame({"name": table.index.astype(str).to_numpy(dtype=object)}, index=pd.Index(safe, dtype=object))
    return stored, names


def from_stored(stored: pd.DataFrame, names: pd.DataFrame) -> pd.DataFrame:
    """Return the table as it was before :func:`to_stored` (rows named as the caller wrote them)."""
    table = stored.T.copy()
    table.index = pd.Index([str(names.loc[c, "name"]) for c in stored.columns], dtype=object)
    return table


def write_table(uns: Any, key: str, table: pd.DataFrame, merge: bool = False) -> None:
    """Write one table to ``uns[key]`` and its names to ``uns[key + "_names"]``.

    Parameters
    ----------
    uns
        ``adata.uns``.
    key
        Where to write.
    table
        Perturbations x genes.
    merge
        Keep rows already stored under ``key`` that ``table`` does not have (same genes only).
    """
    if merge and key in uns and key + NAMES_SUFFIX in uns:
        old = read_table(uns, key)
        if list(old.columns.astype(str)) == list(table.columns.astype(str)):
            table = pd.concat([old.loc[~old.index.isin(table.index.astype(str))], table])
    uns[key], uns[key + NAMES_SUFFIX] = to_stored(table)


def read_table(uns: Any, key: str) -> pd.DataFrame:
    """Return a table that :func:`write_table` stored: perturbations x genes, names as the caller wrote them."""
    return from_stored(uns[key], uns[key + NAMES_SUFFIX])


def write_tables(uns: Any, key: str, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write several tables to ``uns[key][name]``, each with its names in ``uns[key][name + "_names"]``."""
    group: dict[str, pd.DataFrame] = {}
    for name, table in tables.items():
        write_table(group, name, table)
    uns[key] = group


def read_tables(uns: Any, key: str) -> dict[str, pd.DataFrame]:
    """Return the tables that :func:`write_tables` stored."""
    group = uns[key]
    return {name: read_table(group, name) for name in group if not name.endswith(NAMES_SUFFIX)}
