"""Predictions of outside tools, which join a benchmark as AnnData or h5ad files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pertvae._expression import mean_profile
from pertvae._labels import hint, require_column
from pertvae._predictions import Block, prediction_anndata
from pertvae.benchmark._fingerprint import fingerprint_data
from pertvae.benchmark._score import Scorer
from pertvae.metrics import registry

FOLD_MARK = "{fold}"


@dataclass(frozen=True)
class External:
    """What an outside tool predicted.

    Parameters
    ----------
    name
        What its rows are called.
    source
        AnnData, or path of an h5ad file; ``{fold}`` in a path stands for the number of the fold.
    """

    name: str
    source: AnnData | str

    @property
    def of_fold(self) -> bool:
        """Whether every fold has a file of its own."""
        return isinstance(self.source, str) and FOLD_MARK in self.source

    @property
    def words(self) -> str:
        """What the settings of a run say of it."""
        return self.source if isinstance(self.source, str) else f"AnnData of {self.source.n_obs} cells"

    def path(self, fold: int) -> Path | None:
        """Return the file for a fold, ``None`` for an AnnData; a file that is not there is an error."""
        if isinstance(self.source, AnnData):
            return None
        path = Path(self.source.replace(FOLD_MARK, str(fold)))
        if not path.is_file():
            near = sorted(p.name for p in path.parent.glob("*.h5ad")) if path.parent.is_dir() else []
            raise ValueError(f"external {self.name!r}: there is no file {str(path)!r}.{hint(path.name, near)}")
        return path

    def read(self, fold: int) -> AnnData:
        """Return the prediction for a fold."""
        path = self.path(fold)
        return ad.read_h5ad(path) if path is not None else self.source

    def fingerprint(self, fold: int) -> str:
        """Return a fingerprint of the prediction for a fold."""
        path = self.path(fold)
        if path is None:
            return fingerprint_data(self.read(fold), list(self.read(fold).obs.columns))
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()

    def predicted(self, scorer: Scorer) -> tuple[dict[str, AnnData], list[str] | None]:
        """Return by context what was predicted for the units of a fold, and the metrics it can be scored on.

        Counts are scored as cells. Means of log1p CP10k, marked as scanpy does with ``uns["log1p"]``, are scored as
        they are: turned into counts they would sum to something else, so metrics of cells are left out.
        """
        adata = self.read(scorer.fold.index)
        adata = adata.to_memory() if adata.isbacked else adata
        where = f"obs of external {self.name!r}"
        key = scorer.perturbation_key
        require_column(adata.obs, key, where, "perturbation_key")
        if scorer.labels_key is not None:
            require_column(adata.obs, scorer.labels_key, where, "labels_key")
        genes = adata.var_names.get_indexer(scorer.adata.var_names)
        if (genes < 0).any():
            lost = list(scorer.adata.var_names[genes < 0])
            raise ValueError(
                f"external {self.name!r} lacks {len(lost)} genes of the screen, first {lost[0]!r}: log1p CP10k is "
                f"taken over all genes, so all of them are needed.{hint(lost[0], adata.var_names)}"
            )
        logged = "log1p" in adata.uns
        _check_values(adata, self.name, logged)
        labels = scorer.canonical(adata.obs[key])
        contexts = np.full(adata.n_obs, "")
        if scorer.labels_key is not None:
            contexts = adata.obs[scorer.labels_key].astype(str).str.strip().to_numpy()
        found = {}
        for context in scorer.fold.contexts:
            here = contexts == context
            asked = [u.label for u in scorer.units(context)]
            rows = {label: np.flatnonzero(here & (labels == label)) for label in asked}
            absent = [label for label, r in rows.items() if not len(r)]
            if absent:
                raise ValueError(
                    f"external {self.name!r} has no cells of {absent[0]!r}{f' in {context!r}' if context else ''} "
                    f"({len(absent)} of {len(asked)} held-out conditions are missing)."
                    f"{hint(absent[0], np.unique(labels[here]))}"
                )
            own_controls = here & (labels == scorer.control[0])
            make = _as_profiles if logged else _as_prediction
            found[context] = make(adata[:, genes], rows, own_controls, scorer, context)
        without = {"cells", "controls"}
        return found, [m for m in scorer.usable if not registry[m].needs & without] if logged else None


def _as_prediction(
    adata: AnnData, rows: Mapping[str, np.ndarray], own_controls: np.ndarray, scorer: Scorer, context: str
) -> AnnData:
    """Return generated cells and controls as every prediction has them, scored by its cells.

    Shifts are against the tool's own control cells where it has some, otherwise against the training controls.
    """
    if own_controls.any():
        x, names = adata.X[np.flatnonzero(own_controls)], adata.obs_names[own_controls]
    else:
        training = scorer.control_rows(context, "train")
        x, names = scorer.adata.X[training], scorer.adata.obs_names[training]
    base = mean_profile(x)
    blocks, shifts = [], []
    for label, index in rows.items():
        cells = sp.csr_matrix(adata.X[index], dtype=np.float32)
        blocks.append(Block(label, cells, pd.DataFrame(index=adata.obs_names[index])))
        shifts.append(mean_profile(cells) - base)
    table = pd.DataFrame(np.stack(shifts), index=list(rows), columns=adata.var_names)
    controls = Block(scorer.control[0], sp.csr_matrix(x, dtype=np.float32), pd.DataFrame(index=names))
    var = pd.DataFrame(index=adata.var_names)
    return prediction_anndata(blocks, controls, var, scorer.perturbation_key, table, "external", {"model": "external"})


def _as_profiles(
    adata: AnnData, rows: Mapping[str, np.ndarray], own_controls: np.ndarray, scorer: Scorer, context: str
) -> AnnData:
    """Return mean log values as a prediction without cells; shifts are against the same controls as those of cells."""
    x = adata.X

    def mean(index: np.ndarray) -> np.ndarray:
        return np.asarray(x[index].mean(axis=0), dtype=np.float64).ravel()

    if own_controls.any():
        base = mean(np.flatnonzero(own_controls))
    else:
        base = mean_profile(scorer.adata.X, scorer.control_rows(context, "train"))
    profiles = np.stack([mean(index) for index in rows.values()])
    return scorer.as_prediction(pd.DataFrame(profiles - base, list(rows), adata.var_names), base, "external")


def _check_values(adata: AnnData, name: str, logged: bool) -> None:
    values = adata.X.data if sp.issparse(adata.X) else np.asarray(adata.X)
    if values.size and (not np.isfinite(values).all() or values.min() < 0):
        raise ValueError(f"external {name!r} holds negative or non-finite values in X: put predicted counts there.")
    if not logged and (values != np.round(values)).any():
        raise ValueError(
            f"external {name!r} holds values in X that are not whole numbers: predicted counts are scored. If X is "
            "log1p of counts per 10,000, say so with uns['log1p'] = {} as scanpy does: its means are scored then."
        )


def read_external(external: Mapping[str, Any] | None, taken: Sequence[str]) -> dict[str, External]:
    """Return predictions of outside tools by name, none of which is the name of another row."""
    found = {}
    for name, source in (external or {}).items():
        if name in taken:
            raise ValueError(f"external: {name!r} is the name of another row of the benchmark. Choose another name.")
        found[str(name)] = External(str(name), source if isinstance(source, AnnData) else str(source))
    return found
