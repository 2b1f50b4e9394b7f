"""Programs of SAMS-VAE on two real subsets: alike for one pathway, absent where nothing happens.

Papalexi 2021 (15,738 cells, 303 genes): effects of IFNGR1, JAK2 and STAT1 should be more alike than each is to the
median other knock-out, by latents and by what they do to genes, and the knock-outs that look most like controls should
touch no program. Which these are is fixed before training: the eight whose own gene is not in the panel with the
smallest energy distance to controls of the same replicates. McFaline 2023 (2,586 cells, 438 genes) is a negative
control: no perturbation has an effect.

    python benchmarks/programs_on_real_screens.py [--data FOLDER] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scvi
from sklearn.metrics.pairwise import cosine_similarity

import pertvae as pv
from pertvae._expression import log1p_cp10k
from pertvae.metrics import energy_distance

PATHWAY = ("IFNGR1", "JAK2", "STAT1")


def train(adata: ad.AnnData, seed: int, **setup: str) -> pv.SAMSVAE:
    """Split at random, train with defaults on the training cells."""
    scvi.settings.seed = seed
    keys = {"perturbation_key": "perturbation", "control": "control"}
    pv.pp.split_perturbations(adata, "random", **keys, seed=0)
    pv.SAMSVAE.setup_anndata(adata, **keys, **setup)
    model = pv.SAMSVAE(adata)
    model.train(split_key="split", enable_progress_bar=False)
    return model


def distances_to_controls(adata: ad.AnnData, seed: int = 0) -> pd.Series:
    """Return the energy distance of each knock-out to controls matched by replicate, smallest first."""
    label, batch = (adata.obs[k].astype(str).to_numpy() for k in ("perturbation", "batch"))
    y = log1p_cp10k(adata.X).toarray()
    control = np.flatnonzero(label == "control")
    rng = np.random.default_rng(seed)
    found = {}
    for name in sorted(set(label) - {"control"}):
        cells = np.flatnonzero(label == name)
        parts = []
        for replicate in np.unique(batch[cells]):
            pool = control[batch[control] == replicate]
            wanted = int((batch[cells] == replicate).sum())
            parts.append(rng.choice(pool, min(wanted, len(pool)), replace=False))
        found[name] = energy_distance(y[cells], y[np.concatenate(parts)], max_cells=1000, seed=seed)
    return pd.Series(found).sort_values()


def main() -> None:
    """Print the numbers of both screens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("PERTVAE_DATA", "../shared/data"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    adata = ad.read_h5ad(Path(args.data) / "papalexi2021_eccite_subset.h5ad")
    distances = distances_to_controls(adata)
    genes = set(adata.var_names)
    null = [n for n in distances.index if n not in genes][:8]
    print("energy distance to replicate-matched controls, own gene not in the panel:")
    print(distances[null].round(4).to_string())
    model = train(adata, args.seed, batch_key="batch")
    print(f"\nPapalexi, masks of sparsify={model.sparsify_!r} kept")
    programs = model.get_perturbation_programs()
    # in latent coordinates two programs that do much the same to genes are as different as any two
    for space, effects in (("latents", programs.effects), ("genes", programs.effects @ programs.loadings)):
        cosine = pd.DataFrame(cosine_similarity(effects), effects.index, effects.index)
        others = [n for n in cosine.index if n not in PATHWAY]
        print(f"\ncosine of effects by {space}\n" + cosine.loc[list(PATHWAY), list(PATHWAY)].round(3).to_string())
        for name in PATHWAY:
            inside = min(cosine.loc[name, other] for other in PATHWAY if other != name)
            median = cosine.loc[name, others].median()
            print(f"{name}: least alike in the pathway {inside:.3f}, median other knock-out {median:.3f}")
    largest = programs.inclusion.max(axis=1)
    print("\nmaximum inclusion of the eight:\n" + largest[null].round(3).to_string())
    print(f"under 0.5: {int((largest[null] < 0.5).sum())} of {len(null)}")
    print("maximum inclusion of the others:\n" + largest.drop(null).round(3).to_string())

    adata = ad.read_h5ad(Path(args.data) / "mcfaline2023_subset.h5ad")
    model = train(adata, args.seed, labels_key="cell_type")
    inclusion = model.get_perturbation_programs().inclusion
    print(
        f"\nMcFaline, masks of sparsify={model.sparsify_!r} kept, maximum inclusion\n"
        + inclusion.max(axis=1).round(3).to_string()
    )
    print(f"largest: {inclusion.to_numpy().max():.3f}")


if __name__ == "__main__":
    main()
