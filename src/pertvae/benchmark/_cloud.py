"""Some real and predicted cells in a few principal components: what pictures of cells are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.decomposition import PCA

from pertvae._expression import log1p_cp10k
from pertvae.benchmark._score import Scorer

CONTROL = "control"
N_UNITS = 6
N_CELLS = 120
N_TRAINING = 3000
N_COMPONENTS = 20


@dataclass(frozen=True)
class Cloud:
    """Principal components of the training cells of a fold (log1p CP10k, scored genes), and who is shown in them.

    Parameters
    ----------
    pca
        Fitted on training cells alone.
    units
        Names of the units shown: those with the largest effects.
    """

    pca: PCA
    units: tuple[str, ...]

    @classmethod
    def create(cls, scorer: Scorer) -> Cloud:
        """Fit on at most ``N_TRAINING`` training cells, drawn at random."""
        rng = np.random.default_rng([0, 11])
        train = np.flatnonzero(scorer.fold.common_rows())
        rows = rng.choice(train, size=min(len(train), N_TRAINING), replace=False)
        x = log1p_cp10k(scorer.adata.X[np.sort(rows)])[:, scorer.genes]
        x = x.toarray() if hasattr(x, "toarray") else x
        pca = PCA(n_components=min(N_COMPONENTS, *x.shape), svd_solver="randomized", random_state=0).fit(x)
        largest = scorer.table.sort_values("effect_size", ascending=False, kind="stable")["unit"]
        return cls(pca, tuple(largest[:N_UNITS]))

    def observed(self, scorer: Scorer) -> pd.DataFrame:
        """Return components of training controls and held-out cells, indexed by unit."""
        parts = {}
        for context in scorer.fold.contexts:
            rows = scorer.control_rows(context, "train")
            parts[f"{CONTROL}{context}"] = self._project(scorer, scorer.adata.X, rows, CONTROL)
        for unit in scorer.fold.units:
            if unit.name in self.units:
                parts[unit.name] = self._project(scorer, scorer.adata.X, scorer.cells(unit), unit.name)
        return pd.concat(parts.values())

    def predicted(self, scorer: Scorer, predicted: Mapping[str, AnnData]) -> pd.DataFrame:
        """Return components of predicted cells, indexed by unit."""
        parts = []
        for context, adata in predicted.items():
            labels = scorer.canonical(adata.obs[scorer.perturbation_key])
            generated = adata.obs["generated"].to_numpy(dtype=bool)
            for unit in scorer.units(context):
                if unit.name in self.units:
                    rows = np.flatnonzero((labels == unit.label) & generated)
                    parts.append(self._project(scorer, adata.X, rows, unit.name))
        return pd.concat(parts) if parts else pd.DataFrame()

    def _project(self, scorer: Scorer, x: Any, rows: np.ndarray, name: str) -> pd.DataFrame:
        rng = np.random.default_rng([0, 12])
        rows = np.sort(rng.choice(rows, size=min(len(rows), N_CELLS), replace=False))
        y = log1p_cp10k(x[rows])[:, scorer.genes]
        values = self.pca.transform(y.toarray() if hasattr(y, "toarray") else y)
        columns = [f"PC{i + 1}" for i in range(values.shape[1])]
        return pd.DataFrame(values, index=pd.Index([name] * len(values), dtype=object), columns=columns)
