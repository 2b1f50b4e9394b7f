"""The screen as every method of a benchmark sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
from anndata import AnnData

from pertvae.benchmark._folds import SPLIT_KEY, Fold


@dataclass(frozen=True)
class Data:
    """The screen as every method sees it.

    Parameters
    ----------
    adata
        Counts in ``X``; the benchmark's own object.
    perturbation_key, control, sep, labels_key, batch_key
        As in :func:`pertvae.benchmark.run`.
    context_key
        ``labels_key`` where it has more than one value, else ``None``.
    n_cells
        Cells predicted a condition.
    setup_kwargs
        Further arguments of ``setup_anndata``.
    """

    adata: AnnData
    perturbation_key: str
    control: tuple[str, ...]
    sep: str | None
    labels_key: str | None
    batch_key: str | None
    context_key: str | None
    n_cells: int
    setup_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def of_fold(self, fold: Fold) -> tuple[AnnData, Fold]:
        """Return the cells that a fold uses, with its split column, and the fold on them; X is shared if it can be."""
        obs = self.adata.obs.assign(**{SPLIT_KEY: fold.split})
        kept = fold.split.notna().to_numpy()
        x = self.adata.X if kept.all() else self.adata.X[kept]
        work = AnnData(X=x, obs=obs[kept].copy(), var=pd.DataFrame(index=self.adata.var_names))
        work.obs[SPLIT_KEY] = work.obs[SPLIT_KEY].astype(str)
        return work, replace(fold, split=fold.split[kept], common=fold.common_rows()[kept])
