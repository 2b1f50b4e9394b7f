"""From the parts of a screen to its AnnData and its tables."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pertvae.datasets._generator import Decoder, Design, gene_names


def assemble(
    x: Any, design: Design, *, batch: np.ndarray | None, basal: np.ndarray, latent: np.ndarray, columns: dict[str, Any]
) -> ad.AnnData:
    """Return the AnnData of a screen, without its truth."""
    labels = design.labels
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical.from_codes(design.codes, categories=pd.Index(labels, dtype=object))},
        index=pd.Index([f"cell{i:06d}" for i in range(len(design.codes))], dtype=object),
    )
    if batch is None:
        batch = np.zeros(len(obs), dtype=int)
    names = pd.Index([f"batch{b + 1}" for b in range(int(batch.max()) + 1)], dtype=object)
    obs["batch"] = pd.Categorical.from_codes(batch, categories=names)
    for name, values in columns.items():
        obs[name] = values
    adata = ad.AnnData(X=x, obs=obs, var=pd.DataFrame(index=gene_names(x.shape[1])))
    adata.obsm["X_truth_basal"] = basal.astype(np.float32)
    adata.obsm["X_truth_latent"] = latent.astype(np.float32)
    return adata


def tables(
    design: Design, mask: np.ndarray, effects: np.ndarray, shifts: np.ndarray, genes: pd.Index
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return mask, effects and shifts as tables with names."""
    latents = pd.Index([f"Z{i + 1}" for i in range(mask.shape[1])], dtype=object)
    rows = pd.Index(design.perturbations, dtype=object)
    return (
        pd.DataFrame(mask.astype(np.int8), index=rows, columns=latents),
        pd.DataFrame(effects, index=rows, columns=latents),
        pd.DataFrame(shifts, index=pd.Index(design.labels[1:], dtype=object), columns=genes),
    )


def decoder_arrays(decoder: Decoder) -> dict[str, np.ndarray]:
    """Return the parameters of a decoder by name."""
    weights = {f"layer{i + 1}": w for i, w in enumerate(decoder.weights)}
    return {**weights, "center": decoder.center, "scale": decoder.scale}
