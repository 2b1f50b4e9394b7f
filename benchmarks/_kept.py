"""Trained models that comparison.py has kept, with the fold and seed each belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

import pertvae as pv

CLASSES = {"samsvae": pv.SAMSVAE, "conditionalvae": pv.ConditionalVAE, "cpavae": pv.CPAVAE, "svaeplus": pv.SVAEPlus}


def kept_fits(
    folder: Path, file_name: str, cls: Any, adata: ad.AnnData, seeds: Sequence[int]
) -> Iterator[tuple[str, int, Any]]:
    """Yield fold (column of ``splits.csv``), seed and model, by fold and seed.

    Where several were kept of a fold and seed (the code or a setting changed under the same name) the last trained one.

    Parameters
    ----------
    folder
        Of the comparison's data set, with ``splits.csv`` and ``cache/models``.
    file_name
        What the folders of the fits begin with.
    cls
        Model class.
    adata
        The cells of the comparison.
    seeds
        Of training.
    """
    splits = pd.read_csv(folder / "splits.csv", index_col=0)
    if not splits.index.equals(adata.obs_names.astype(splits.index.dtype)):
        raise SystemExit(f"{folder}/splits.csv is of other cells: run comparison.py first.")
    newest: dict[tuple[str, int], tuple[float, Any]] = {}
    for done in folder.glob("cache/models/*/fit.json"):
        base, _, rest = done.parent.name.rpartition("-seed")
        seed = int(rest.split("-")[0]) if base == file_name else -1
        if seed not in seeds:
            continue
        model = cls.load(str(done.parent), adata=adata)
        seen = np.zeros(adata.n_obs, dtype=bool)
        seen[np.r_[np.asarray(model.train_indices), np.asarray(model.validation_indices)]] = True
        for fold in splits:
            if np.array_equal(seen, (splits[fold] != "test").to_numpy()):
                when = done.stat().st_mtime
                if when > newest.get((fold, seed), (0.0, None))[0]:
                    newest[fold, seed] = when, model
    for (fold, seed), (_, model) in sorted(newest.items(), key=lambda item: item[0]):
        yield fold, seed, model
