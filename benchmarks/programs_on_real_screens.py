"""Programs of SAMS-VAE on two real subsets: alike for one pathway, absent where nothing happens.

Papalexi 2021 (15,738 cells, 303 genes): effects of IFNGR1, JAK2 and STAT1 should be more alike than each is to the
median other knock-out, by latents and by what they do to genes, and the knock-outs that look most like controls should
touch no program. Which these are is fixed before training: the eight whose own gene is not in the panel with the
smallest energy distance to controls of the same replicates. McFaline 2023 (2,586 cells, 438 genes) is a negative
control: no perturbation has an effect.

``programs_on_real_screens.csv`` has one row for each mask that was open before the check by validation cells: whether
it is open after it, and by how many nats validation and test cells are described worse without it.
``programs_on_real_screens_summary.csv`` has the largest mask of each perturbation after the check, and cosines of the
pathway's effects. A seed is that of the random split and of the training.

    python benchmarks/programs_on_real_screens.py [--data FOLDER] [--seeds 0 1 2 3 4]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import anndata as ad
import numpy as np
import pandas as pd
import scvi
from _common import RESULTS, quiet, write_results
from sklearn.metrics.pairwise import cosine_similarity

import pertvae as pv
from pertvae._expression import log1p_cp10k
from pertvae.metrics import energy_distance
from pertvae.models.base._access import dose_table
from pertvae.models.samsvae import _model
from pertvae.models.samsvae._evidence import evidence_for

PATHWAY = ("IFNGR1", "JAK2", "STAT1")
SCREENS: dict[str, tuple[str, dict[str, str]]] = {
    "papalexi": ("papalexi2021_eccite_subset.h5ad", {"batch_key": "batch"}),
    "mcfaline": ("mcfaline2023_subset.h5ad", {"labels_key": "cell_type"}),
}


def train(adata: ad.AnnData, seed: int, **setup: str) -> tuple[pv.SAMSVAE, list[dict[str, Any]]]:
    """Split at random, train with defaults on the training cells; return the model and its open masks."""
    scvi.settings.seed = seed
    keys = {"perturbation_key": "perturbation", "control": "control"}
    pv.pp.split_perturbations(adata, "random", **keys, seed=seed)
    pv.SAMSVAE.setup_anndata(adata, **keys, **setup)
    model = pv.SAMSVAE(adata)
    check = _model.heed_validation_cells
    rows: list[dict[str, Any]] = []

    def record(model: pv.SAMSVAE) -> None:
        before = model.module.effects.mask_logits.detach().clone()
        asked = (before > 0).cpu()
        found = {}
        model.module.eval()
        for part in ("valid", "test"):
            cells = np.flatnonzero(adata.obs["split"] == part)
            doses = dose_table(model, adata)[cells]
            found[part] = (evidence_for(model, asked, cells, doses), (doses != 0).sum(axis=0))
        check(model)
        for t, k in asked.nonzero().tolist():
            row = {"perturbation": model.perturbation_names[t], "seed": seed}
            row["log_odds"] = float(before[t, k])
            row["kept"] = bool(model.module.effects.mask_logits[t, k] > 0)
            for part, (evidence, cells) in found.items():
                row |= {f"n_{part}": int(np.asarray(cells).ravel()[t]), f"evidence_{part}": float(evidence[t, k])}
            rows.append(row)

    _model.heed_validation_cells = record
    try:
        model.train(split_key="split", enable_progress_bar=False)
    finally:
        _model.heed_validation_cells = check
    return model, rows


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


def report_programs(model: pv.SAMSVAE, null: list[str]) -> list[dict[str, Any]]:
    """Print how alike the pathway's effects are, and what knock-outs that look like controls touch; return cosines."""
    programs = model.get_perturbation_programs()
    rows = []
    # in latent coordinates two programs that do much the same to genes are as different as any two
    for space, effects in (("latents", programs.effects), ("genes", programs.effects @ programs.loadings)):
        cosine = pd.DataFrame(cosine_similarity(effects), effects.index, effects.index)
        others = [n for n in cosine.index if n not in PATHWAY]
        print(f"\ncosine of effects by {space}\n" + cosine.loc[list(PATHWAY), list(PATHWAY)].round(3).to_string())
        for name in PATHWAY:
            inside = min(cosine.loc[name, other] for other in PATHWAY if other != name)
            median = cosine.loc[name, others].median()
            rows += [
                {"quantity": f"cosine by {space}", "of": f"{name} {o}", "value": cosine.loc[name, o]}
                for o in PATHWAY[PATHWAY.index(name) + 1 :]
            ]
            rows.append({"quantity": f"median cosine by {space}", "of": f"{name} others", "value": median})
            print(f"{name}: least alike in the pathway {inside:.3f}, median other knock-out {median:.3f}")
    largest = programs.inclusion.max(axis=1)
    print("maximum inclusion of the eight:\n" + largest[null].round(3).to_string())
    print("maximum inclusion of the others:\n" + largest.drop(null).round(3).to_string())
    return [row | {"value": float(row["value"])} for row in rows]


def main() -> None:
    """Train on both screens, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PERTVAE_DATA", "../shared/data")))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    quiet(args.threads)
    rows, summary = [], []
    for name, (file, setup) in SCREENS.items():
        adata = ad.read_h5ad(args.data / file)
        null: list[str] = []
        if name == "papalexi":
            distances = distances_to_controls(adata)
            null = [n for n in distances.index if n not in set(adata.var_names)][:8]
            print("energy distance to replicate-matched controls, own gene not in the panel:")
            print(distances[null].round(4).to_string())
        for seed in args.seeds:
            model, found = train(adata.copy(), seed, **setup)
            rows += [
                {"screen": name, **row, "null": name == "mcfaline" or row["perturbation"] in null} for row in found
            ]
            largest = model.get_masks().max(axis=1)
            quantities = [{"quantity": "maximum inclusion", "of": p, "value": float(v)} for p, v in largest.items()]
            kept = sum(row["kept"] for row in found)
            print(
                f"\n{name}, seed {seed}: {len(found)} open masks, {kept} after the check; largest {largest.max():.3f}"
            )
            if name == "papalexi":
                quantities += report_programs(model, null)
            summary += [
                {"screen": name, "seed": seed, **q, "null": name == "mcfaline" or q["of"] in null} for q in quantities
            ]
    table = pd.DataFrame(rows)
    print(table.groupby(["screen", "null", "kept"]).size().rename("masks").to_string())
    write_results(RESULTS / "programs_on_real_screens.csv", rows)
    write_results(RESULTS / "programs_on_real_screens_summary.csv", summary)


if __name__ == "__main__":
    main()
