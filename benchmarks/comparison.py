"""Models, references and duplicates on the small real subsets and on the fixed simulated screens.

    python benchmarks/comparison.py                      everything (hours on two cores; resumes)
    python benchmarks/comparison.py norman zhao          only these
    python benchmarks/comparison.py --part 0/2 ...       every second of them, for two processes

Real data: 3 training seeds, and the ensemble of the three. Fixed screens: simulation seeds 0, 1, 2; the training seed
is that of the simulation.
Reports and tables go to results/comparison/NAME, summaries to benchmarks/results/comparison_*.csv.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from _common import RESULTS

import pertvae as pv
from pertvae.cli import _quiet

MODELS = ("samsvae", "conditionalvae", "cpavae", "svaeplus")
KEYS = ("perturbation", "control")
REFERENCES = {name: name for name in pv.benchmark.REFERENCES} | {
    "AdditivePCA": partial(pv.reference.Additive, space="pca")
}

REAL: dict[str, dict[str, Any]] = {
    "norman": {"file": "norman2019_subset", "scheme": "unseen_combination", "batch_key": "batch"},
    "norman_half_seen": {
        "file": "norman2019_subset",
        "scheme": "unseen_combination",
        "batch_key": "batch",
        "split_kwargs": {"seen": "1/2"},
    },
    "norman_none_seen": {
        "file": "norman2019_subset",
        "scheme": "unseen_combination",
        "batch_key": "batch",
        "split_kwargs": {"seen": "0/2"},
    },
    "datlinger": {"file": "datlinger2021_scifi_subset", "scheme": "unseen_combination"},
    "papalexi": {"file": "papalexi2021_eccite_subset", "scheme": "random", "batch_key": "batch"},
    "kang": {
        "file": "kang2018_ifnb_2800",
        "min_detected": 0.1,
        "scheme": "unseen_context",
        "labels_key": "cell_type",
        "n_folds": 3,
        "split_kwargs": {"held_out": ["CD16 Mono", "CD4 Memory T", "NK"]},
    },
    "zhao": {
        "file": "zhao2021_gbm_panobinostat",
        "scheme": "unseen_context",
        "labels_key": "batch",
        "n_folds": 3,
        "split_kwargs": {"held_out": ["PW030", "PW032", "PW036"]},
    },
}
SCREENS: dict[str, dict[str, Any]] = {
    "sparse_additive": {"n_folds": 1},
    "interacting_structured": {"split_kwargs": {"test_fraction": 0.5}},
    "interacting_random": {"n_folds": 1},
}


def jobs(names: list[str]) -> dict[str, dict[str, Any]]:
    real = {"seeds": (0, 1, 2), "ensemble": True}
    every: dict[str, dict[str, Any]] = {name: options | real for name, options in REAL.items()}
    for kind, options in SCREENS.items():
        for seed in (0, 1, 2):
            every[f"{kind}_{seed}"] = {
                "kind": kind,
                "simulation_seed": seed,
                "scheme": "unseen_combination",
                "batch_key": "batch",
                "seeds": (seed,),
                **options,
            }
    return {
        n: o
        for n, o in every.items()
        if not names or any(n == a or (n.startswith(f"{a}_") and n[-1].isdigit()) for a in names)
    }


def read(options: dict[str, Any]) -> tuple[ad.AnnData, str]:
    """Return the screen of a job and what to call it."""
    if "kind" in options:
        kind, seed = options["kind"], options["simulation_seed"]
        return pv.datasets.simulate_screen(kind, seed=seed), f"simulated screen {kind}, seed {seed}"
    file = options["file"]
    adata = ad.read_h5ad(Path(os.environ.get("PERTVAE_DATA", "../shared/data")) / f"{file}.h5ad")
    if "min_detected" in options:  # a whole transcriptome: genes seen in cells that no fold holds out
        others = ~adata.obs[options["labels_key"]].isin(options["split_kwargs"]["held_out"]).to_numpy()
        detected = np.asarray((adata.X[others] > 0).mean(axis=0)).ravel()
        adata = adata[:, detected > options["min_detected"]].copy()
    return adata, f"{file}: a {adata.n_obs:,}-cell, {adata.n_vars:,}-gene subset"


def run(
    adata: ad.AnnData, title: str, options: dict[str, Any], models: list[str], folder: Path, **more: Any
) -> pv.benchmark.BenchmarkResult:
    options = {k: v for k, v in options.items() if k not in ("kind", "simulation_seed", "file", "min_detected")}
    scheme = options.pop("scheme")
    options |= {"cache_dir": folder / "cache", "title": title, "progress": False} | more
    with _quiet():
        return pv.benchmark.run(adata, models, scheme, *KEYS, **options)


def gain(result: pv.benchmark.BenchmarkResult, adata: ad.AnnData, n_boot: int = 2000) -> pd.DataFrame:
    """Return how much of the random deviations of doubles each method predicts: 0 none, 1 all.

    Predicted shift minus the true one without interaction, projected on the deviations (of log rates) that were drawn
    for the double, over the same of the true shift; all doubles together, with a bootstrap over doubles. The draws are
    independent of all else, so whoever knows nothing of them has 0 on average. Projected on how the true shift changes
    instead, a prediction that shrinks has a gain of nearly a tenth: expectations of log values shrink, too.
    """
    truth = pv.datasets.read_truth(adata)
    rows = []
    for key, prediction in result.trained("unseen_combination"):
        if prediction.shift.empty:
            continue
        doubles, genes = prediction.shift.index, prediction.shift.columns
        drawn = truth.interactions.loc[doubles, genes].to_numpy()
        additive, full = (t.loc[doubles, genes].to_numpy() for t in (truth.additive_shifts, truth.shifts))
        above = ((prediction.shift.to_numpy() - additive) * drawn).sum(axis=1)
        below = ((full - additive) * drawn).sum(axis=1)
        picks = np.random.default_rng(0).integers(len(doubles), size=(n_boot, len(doubles)))
        lower, upper = np.percentile(above[picks].sum(axis=1) / below[picks].sum(axis=1), [2.5, 97.5])
        gained = above.sum() / below.sum()
        rows.append({"model": key[2], "gain": gained, "lower": lower, "upper": upper, "n": len(doubles)})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {[*REAL, *SCREENS]}; default all")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--skip", nargs="*", default=[], choices=list(REFERENCES), help="references to leave out")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth job, from the Ith")
    parser.add_argument("--train-only", action="store_true", help="train and keep the models, score next to nothing")
    parser.add_argument("--out", type=Path, default=Path("results/comparison"))
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    part, of = map(int, given.part.split("/"))
    for name in given.names:
        if not jobs([name]):
            parser.error(f"{name!r}: pass of {', '.join(jobs([]))}.")
    more: dict[str, Any] = {"references": {k: v for k, v in REFERENCES.items() if k not in given.skip}}
    if given.train_only:
        more = {"metrics": ["l2_profile"], "references": ["NoChange"], "ensemble": False}
    for name, options in list(jobs(given.names).items())[part::of]:
        folder = given.out / name
        adata, title = read(options)
        result = run(adata, title, options, given.models, folder, **more)
        print(f"\n## {name}\n{result.text()}", flush=True)
        failed = result.fits[result.fits["status"] == "failed"]
        for row in failed.itertuples():
            print(f"failed: {row.model} fold {row.fold} seed {row.seed}: {row.error}", flush=True)
        if given.train_only:
            continue
        result.save(folder)
        paired = result.compare([m for m in result.metrics if result.has_conditions(m)])
        result.summary().round(4).to_csv(RESULTS / f"comparison_{name}_summary.csv", index=False)
        if name.startswith("interacting_random"):
            gained = gain(result, adata)
            gained.round(4).to_csv(RESULTS / f"comparison_{name}_gain.csv", index=False)
            print(gained.round(3).to_string(), flush=True)
        paired.round(4).to_csv(RESULTS / f"comparison_{name}_paired.csv", index=False)


if __name__ == "__main__":
    main()
