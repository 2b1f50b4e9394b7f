"""An AnnData with canonical labels: which cells are controls, which stand for a condition, and their expression."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertvae._expression import log1p_cp10k, row_blocks
from pertvae._labels import LabelFormat, canonical_labels, hint, require_column


@dataclass(frozen=True)
class Labelled:
    """An AnnData with the canonical label of each cell.

    Parameters
    ----------
    adata
        The cells.
    name
        What messages call it: ``"predicted"``, ``"observed"`` or ``"train"``.
    labels
        Canonical label of each cell.
    format
        How labels are written.
    layer
        Layer of the counts; ``None`` for X.
    """

    adata: ad.AnnData
    name: str
    labels: np.ndarray
    format: LabelFormat
    layer: str | None = None

    @classmethod
    def create(
        cls, adata: ad.AnnData, name: str, perturbation_key: str, format: LabelFormat, layer: str | None = None
    ) -> Labelled:
        """Check the label column and the layer, and parse the labels."""
        require_column(adata.obs, perturbation_key, f"{name}.obs", "perturbation_key")
        if layer is not None and layer not in adata.layers:
            raise KeyError(f"layer={layer!r} is not a layer of {name}.{hint(layer, adata.layers.keys())}")
        labels = canonical_labels(adata.obs[perturbation_key], format.control, format.sep)
        return cls(adata, name, labels.astype(str).to_numpy(), format, layer)

    @property
    def counts(self) -> Any:
        """Return the matrix of counts."""
        return self.adata.X if self.layer is None else self.adata.layers[self.layer]

    @property
    def generated(self) -> np.ndarray:
        """Return which cells may stand for a condition: all, or in a prediction the generated ones."""
        column = self.adata.obs.get("generated")
        return np.ones(self.adata.n_obs, dtype=bool) if column is None else column.to_numpy().astype(bool)

    @property
    def control_rows(self) -> np.ndarray:
        """Return the control cells: in a prediction the source cells, or generated controls where there are none."""
        control = self.labels == self.format.control[0]
        source = control & ~self.generated
        return np.flatnonzero(source if source.any() else control)

    @property
    def condition_labels(self) -> list[str]:
        """Return the conditions that have cells, in order of appearance."""
        rows = self.generated & (self.labels != self.format.control[0])
        return list(pd.unique(self.labels[rows]))

    def rows(self, condition: str) -> np.ndarray:
        """Return the cells of a condition."""
        return np.flatnonzero((self.labels == condition) & self.generated)

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """Return a code of the cell that each of some cells was made from; their own where none is known."""
        column = self.adata.obs.get("source_cell")
        if column is None:
            return np.arange(len(rows))
        return np.asarray(pd.factorize(column.iloc[rows].astype(str))[0])

    def control_names(self) -> set[str]:
        """Return the names of the control cells; in a prediction those of the cells they were copied from."""
        obs = self.adata.obs.iloc[self.control_rows]
        return set((obs["source_cell"] if "source_cell" in obs else obs.index.to_series()).astype(str))

    def values(self, rows: np.ndarray, columns: np.ndarray | None, selected: np.ndarray | None) -> sp.csr_matrix:
        """Return log1p CP10k of some cells: sums over ``columns``, then only the ``selected`` of them."""
        blocks: list[sp.csr_matrix] = []
        for _, block in row_blocks(self.counts, rows):
            block = block if columns is None else block[:, columns]
            data = block.data if sp.issparse(block) else block
            if data.size and (not np.isfinite(data).all() or data.min() < 0):
                raise ValueError(
                    f"{self.name} has negative or non-finite values in {self._place}: metrics take counts. Put counts "
                    "in X" + (", or name their layer with layer=..." if self.name != "predicted" else ".")
                )
            if data.size and not blocks and (data != np.round(data)).any():
                self._not_whole()
            y = log1p_cp10k(block)
            blocks.append(sp.csr_matrix(y if selected is None else y[:, selected]))
        if blocks:
            return sp.vstack(blocks, format="csr")
        width = self.adata.n_vars if columns is None else len(columns)
        return sp.csr_matrix((0, width if selected is None else len(selected)))

    @property
    def _place(self) -> str:
        return "X" if self.layer is None else f"layers[{self.layer!r}]"

    def _not_whole(self) -> None:
        if self.layer is None and "log1p" in self.adata.uns:
            raise ValueError(
                f"{self.name}.X is log-transformed (uns['log1p'] says so): metrics take counts and do log1p CP10k "
                "themselves." + (" Name the layer of the counts with layer=..." if self.name != "predicted" else "")
            )
        warnings.warn(
            f"{self.name} holds values that are not whole numbers in {self._place}. Metrics are defined on counts: "
            "predict with output='counts', and profiles are means over sampled cells.",
            stacklevel=6,
        )


def same_genes(side: Labelled, names: pd.Index) -> np.ndarray | None:
    """Return the columns of ``side`` that are ``names``, or ``None`` when they are its columns already."""
    if side.adata.var_names.equals(names):
        return None
    position = side.adata.var_names.get_indexer(names)
    if (position < 0).any():
        missing = list(names[position < 0])
        raise ValueError(
            f"{len(missing)} predicted genes are missing in {side.name}, first {missing[:5]}: both need the genes "
            "that were registered, because log1p CP10k is taken over all of them."
        )
    return position
