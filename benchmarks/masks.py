"""Do masks find the truth? SAMSVAE's way of training them, on the two screens of the SAMS-VAE papers' questions.

Screens: ``authors``, the authors' simulation at full size (15 latents, 100 perturbations, 100 genes, 150 training and
20 test cells a perturbation, real values), and ``sparse``, the fixed ``sparse_additive`` screen (23,200 cells, 1,000
genes, 16 doubles held out). A seed is that of the screen, the split and the training. Each fit is one row of the CSV,
written at once; a run that was stopped goes on where it was.

- ``mask_f1``, ``mask_precision``, ``mask_recall`` after matching latents, at a threshold of 0.5.
- ``iwelbo``: importance-weighted log-likelihood of the test cells, nats a cell.
- ``l2_truth``: distance of the predicted shifts of held-out doubles to the true expectation, mean over doubles;
  ``l2_profile``: the benchmark's, against the held-out cells. Both also for the references, on the same doubles.

    python benchmarks/masks.py                          everything
    python benchmarks/masks.py --configs default        a part; later runs add to it
    python benchmarks/masks.py --summary                the table of what is there
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pandas as pd
import scvi
from _common import RESULTS, ResumableTable, quiet
from anndata import AnnData

import pertvae as pv
from pertvae._predictions import predicted_shifts
from pertvae.models.samsvae import _sparsify

KEY, CONTROL, SPLIT = "perturbation", "control", "split"
SCREENS: dict[str, dict[str, Any]] = {
    "authors": {"kind": "samsvae_authors", "cells_per_split": (150, 20, 20), "n_controls": 150},
    "sparse": {"kind": "sparse_additive"},
}
LATENTS = {"authors": 15, "sparse": 20}
REFERENCES = ("CalibratedAdditive", "RidgeAdditive", "Additive")
# constructor arguments, and what is changed in the training that finds the masks
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "published": ({"sparsify": "published"}, {}),
    "default, basal mean field": ({"basal_inference": "mean_field"}, {}),
    "auto": ({"sparsify": "auto"}, {}),
    "no rotation": ({}, {"simple_structure": lambda effects: np.eye(effects.shape[1])}),
    "no cost": ({}, {"COST": 0.0}),
    "cost 0.1": ({}, {"COST": 0.1}),
    "cost 0.4": ({}, {"COST": 0.4}),
    "energy 0.75": ({}, {"ENERGY": 0.75}),
    "energy 0.95": ({}, {"ENERGY": 0.95}),
    "decoder of 2 layers": ({"n_layers_decoder": 2}, {}),
    "32 latents": ({"n_latent": 32}, {}),
    "32 latents, decoder of 2 layers": ({"n_latent": 32, "n_layers_decoder": 2}, {}),
}
FIT = ["screen", "config", "seed"]
SCORES = ["mask_f1", "mask_precision", "mask_recall", "latents_used", "iwelbo", "l2_truth", "l2_profile"]
COLUMNS = [*FIT, *SCORES, "epochs", "train_seconds", "settings", "versions"]


def doubles_of(work: AnnData) -> list[str]:
    """Return the held-out doubles."""
    return sorted({str(c) for c in work.obs.loc[work.obs[SPLIT] == "test", KEY]} - {CONTROL})


def effect_scores(predicted: AnnData, work: AnnData, truth: Any) -> dict[str, float]:
    """Return distances of the predicted doubles to the truth and to the held-out cells."""
    doubles = doubles_of(work)
    error = predicted_shifts(predicted).loc[doubles].to_numpy() - truth.shifts.loc[doubles].to_numpy()
    observed = work[(work.obs[SPLIT] == "test") | ((work.obs[KEY] == CONTROL) & (work.obs[SPLIT] == "valid"))].copy()
    table = pv.metrics.evaluate(predicted, observed, KEY, CONTROL, metrics=["l2_profile"])
    value = table.loc[(table["level"] == "pooled") & (table["metric"] == "l2_profile"), "value"]
    return {"l2_truth": float(np.linalg.norm(error, axis=1).mean()), "l2_profile": float(value.iloc[0])}


def fit(work: AnnData, truth: Any, name: str, config: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one model and score it."""
    arguments, changed = CONFIGS[config]
    counts = name != "authors"
    covariates = {"batch_key": "batch"} if counts else {}
    pv.SAMSVAE.setup_anndata(work, perturbation_key=KEY, control=CONTROL, is_count_data=counts, **covariates)
    scvi.settings.seed = seed
    likelihood = "nb" if counts else "normal"
    model = pv.SAMSVAE(work, gene_likelihood=likelihood, **({"n_latent": LATENTS[name]} | arguments))
    kept = {k: getattr(_sparsify, k) for k in changed}
    start = time.perf_counter()
    try:
        for k, v in changed.items():
            setattr(_sparsify, k, v)
        model.train(split_key=SPLIT, accelerator="cpu", enable_progress_bar=False, max_epochs=args.max_epochs)
    finally:
        for k, v in kept.items():
            setattr(_sparsify, k, v)
    seconds = time.perf_counter() - start
    masks = model.get_masks()
    score = pv.metrics.mask_f1(masks, truth.mask)
    test = np.flatnonzero(work.obs[SPLIT] == "test")
    scores = {
        "mask_f1": score.f1,
        "mask_precision": score.precision,
        "mask_recall": score.recall,
        "latents_used": int((masks > 0.5).any().sum()),
        "iwelbo": float(model.get_marginal_ll(indices=test, n_mc_samples=args.n_mc_samples)),
        "epochs": len(model.history["train_loss"]),
        "train_seconds": seconds,
    }
    if counts:
        controls = np.flatnonzero((work.obs[KEY] == CONTROL) & (work.obs[SPLIT] == "train"))
        predicted = model.predict_perturbation(
            doubles_of(work), indices=controls, n_cells=args.n_cells, seed=seed, key_added=None
        )
        scores |= effect_scores(predicted, work, truth)
    return scores


def reference(work: AnnData, truth: Any, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Fit a reference and score its doubles."""
    fitted = getattr(pv.reference, name)().fit(work, KEY, CONTROL, SPLIT)
    return effect_scores(fitted.predict_perturbation(doubles_of(work), n_cells=args.n_cells, seed=0), work, truth)


def summarise(path: Path) -> None:
    """Print means over seeds and the smallest and largest value."""
    table = pd.read_csv(path)
    for screen, rows in table.groupby("screen", sort=False):
        groups = rows.groupby("config", sort=False)
        lines = {"seeds": groups.size()}
        for name in (*SCORES, "train_seconds"):
            if rows[name].notna().any():
                stats = groups[name].agg(["mean", "min", "max"])
                lines[name] = stats.apply(lambda r: f"{r['mean']:.4g} [{r['min']:.4g}, {r['max']:.4g}]", axis=1)
        print(f"\n{screen}: mean over seeds [smallest, largest]\n{pd.DataFrame(lines).to_string()}")


def main() -> None:
    """Run what is missing in the CSV, then summarise it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=[*CONFIGS, *REFERENCES], help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--screens", nargs="+", default=list(SCREENS), choices=list(SCREENS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[3, 4, 5], help="0 to 2 chose the constants of the training"
    )
    parser.add_argument("--max-epochs", type=int, default=None, help="default: chosen by the model")
    parser.add_argument("--n-mc-samples", type=int, default=100, help="importance samples a cell")
    parser.add_argument("--n-cells", type=int, default=1_000, help="cells predicted a double")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="only print the table of the CSV")
    parser.add_argument("--out", type=Path, default=RESULTS / "masks.csv")
    args = parser.parse_args()
    unknown = [c for c in args.configs if c not in CONFIGS and c not in REFERENCES]
    if unknown:
        parser.error(f"unknown configurations {unknown}; there are {[*CONFIGS, *REFERENCES]}.")
    if args.summary:
        summarise(args.out)
        return
    quiet(args.threads)
    common = json.dumps({k: getattr(args, k) for k in ("max_epochs", "n_mc_samples", "n_cells")} | {"latents": LATENTS})
    table = ResumableTable(args.out, COLUMNS, FIT, common)
    for seed in args.seeds:
        for name in args.screens:
            missing = [c for c in args.configs if (name, c, seed) not in table.done]
            missing = [c for c in missing if name == "sparse" or c not in REFERENCES]
            if not missing:
                continue
            work = pv.datasets.simulate_screen(seed=seed, **SCREENS[name])
            truth = pv.datasets.read_truth(work)
            del work.uns["truth"]
            if SPLIT not in work.obs:
                pv.pp.split_perturbations(
                    work, scheme="unseen_combination", perturbation_key=KEY, control=CONTROL, seed=seed
                )
            work.obs[KEY] = work.obs[KEY].astype(str)
            for config in missing:
                is_model = config in CONFIGS
                found = fit(work, truth, name, config, args, seed) if is_model else reference(work, truth, config, args)
                row = {c: float("nan") for c in COLUMNS} | {"screen": name, "config": config, "seed": seed} | found
                table.add([row])
                shown = {k: round(float(v), 3) for k, v in found.items()}
                print(f"seed {seed} {name} {config}: {shown}", flush=True)
    summarise(args.out)


if __name__ == "__main__":
    main()
