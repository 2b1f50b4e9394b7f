"""Do effects hold? Depth of the decoder, leak, library size, way of training, seed ensembles, and the references.

Simulated screens (``sparse``, counts; ``authors``, real values; those of samsvae_options.py) are scored on doubles that
were not in training, against their true expectation. Subsets of public screens are scored on held-out cells of
conditions that were seen: a tenth of the cells of each single perturbation; cells of combinations are left out, because
held-out combinations of these screens are what the benchmark reports. One split a data set; a seed is that of training.

- ``objective``: that of the validation cells under the weights that were kept, nats a cell; ``iwelbo``:
  importance-weighted log-likelihood of the test cells (singles and controls).
- ``l2``: distance of predicted shifts to the truth (simulated), or the benchmark's ``l2_profile`` against the held-out
  cells; ``energy_distance`` (public data); means over conditions. A reference's ``Additive`` is the raw observed mean
  of the training cells where a condition was seen.
- ``prediction``: what was changed in predicting from the same fit: ``default``, ``no leak correction``, ``observed
  library``, ``predicted library``; ``ensemble`` mixes the fits of all seeds.

    python benchmarks/effects.py                           everything
    python benchmarks/effects.py --data papalexi           a part; later runs add to it
    python benchmarks/effects.py --summary                 the table of what is there

Each data set and configuration is written at once; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import anndata as ad
import numpy as np
import pandas as pd
import scvi
from _common import RESULTS, ResumableTable, quiet
from samsvae_options import SCREENS, split_of, true_doubles

import pertvae as pv
from pertvae._predictions import predicted_shifts
from pertvae.models.samsvae._auto import cell_objectives

KEY, CONTROL, SPLIT = "perturbation", "control", "split"
FILES = {
    "papalexi": ("papalexi2021_eccite_subset.h5ad", "batch"),
    "mcfaline": ("mcfaline2023_subset.h5ad", None),
    "norman singles": ("norman2019_subset.h5ad", None),
    "datlinger singles": ("datlinger2021_scifi_subset.h5ad", None),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear decoder": {"n_layers_decoder": 0},
    "decoder of 2 layers": {"n_layers_decoder": 2},
    "published": {"sparsify": "published"},
    "auto": {"sparsify": "auto"},
}
REFERENCES = ("Additive", "RidgeAdditive", "CalibratedAdditive")
PREDICTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no leak correction": {},
    "observed library": {"library_size": "observed"},
    "predicted library": {"library_size": "predicted"},
}
FIT = ["data", "config"]
SCORES = ["objective", "iwelbo", "l2", "energy_distance"]
COLUMNS = [*FIT, "seed", "prediction", *SCORES, "masks_open", "sparsify", "train_seconds", "settings", "versions"]


class Screen:
    """Cells with a split, and how predictions are scored.

    Parameters
    ----------
    name
        Of :data:`SCREENS` or :data:`FILES`.
    folder
        Where the files are.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.truth: pd.DataFrame | None = None
        self.counts, self.setup = True, {}
        if name in FILES:
            file, batch = FILES[name]
            adata = ad.read_h5ad(folder / file)
            self.adata = adata[~adata.obs[KEY].astype(str).str.contains("+", regex=False)].copy()
            pv.pp.split_perturbations(self.adata, "random", perturbation_key=KEY, control=CONTROL, seed=0)
            self.setup = {} if batch is None else {"batch_key": batch}
        else:
            self.adata = pv.datasets.simulate_screen(seed=0, **SCREENS[name])
            self.truth = true_doubles(self.adata, 0)
            self.counts = pv.datasets.read_truth(self.adata).shift_space != "identity"
            del self.adata.uns["truth"]
            self.adata.obs[SPLIT] = split_of(self.adata, 0).to_numpy()
        self.adata.obs[KEY] = self.adata.obs[KEY].astype(str)
        split, labels = self.adata.obs[SPLIT].to_numpy(), self.adata.obs[KEY].to_numpy()
        single = ~self.adata.obs[KEY].str.contains("+", regex=False).to_numpy()
        self.test = np.flatnonzero((split == "test") & single)
        self.controls = np.flatnonzero((split == "train") & (labels == CONTROL))
        self.observed = np.flatnonzero(
            (split == "test") & (labels != CONTROL) | (split == "valid") & (labels == CONTROL)
        )
        held = set(labels[split == "test"]) - {CONTROL}
        self.labels = sorted(held) if self.truth is None else list(self.truth.index)

    def score(self, predicted: ad.AnnData) -> dict[str, float]:
        """Return the distances of a prediction."""
        if self.truth is not None:
            error = predicted_shifts(predicted).loc[self.truth.index].to_numpy() - self.truth.to_numpy()
            return {"l2": float(np.linalg.norm(error, axis=1).mean())}
        table = pv.metrics.evaluate(
            predicted, self.adata[self.observed].copy(), KEY, CONTROL, metrics=["l2_profile", "energy_distance"]
        )
        pooled = table[table["level"] == "pooled"].set_index("metric")["value"]
        return {"l2": float(pooled["l2_profile"]), "energy_distance": float(pooled["energy_distance"])}


def train(screen: Screen, arguments: dict[str, Any], seed: int) -> tuple[pv.SAMSVAE, float]:
    """Train one model; return it and the seconds."""
    pv.SAMSVAE.setup_anndata(
        screen.adata, perturbation_key=KEY, control=CONTROL, is_count_data=screen.counts, **screen.setup
    )
    scvi.settings.seed = seed
    model = pv.SAMSVAE(screen.adata, gene_likelihood="nb" if screen.counts else "normal", **arguments)
    start = time.perf_counter()
    model.train(split_key=SPLIT, accelerator="cpu", enable_progress_bar=False)
    return model, time.perf_counter() - start


def run_config(screen: Screen, arguments: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train all seeds, score their predictions and their ensemble."""
    rows, models = [], []
    common = {"indices": screen.controls, "n_cells": args.n_cells, "key_added": None}
    for seed in args.seeds:
        model, seconds = train(screen, arguments, seed)
        models.append(model)
        fit = {
            "seed": seed,
            "objective": float(cell_objectives(model).mean()),
            "iwelbo": float(model.get_marginal_ll(indices=screen.test, n_mc_samples=args.n_mc_samples)),
            "masks_open": int((model.get_masks() > 0.5).to_numpy().sum()),
            "sparsify": model.sparsify_,
            "train_seconds": seconds,
        }
        for name, changed in PREDICTIONS.items():
            if "library_size" in changed and not screen.counts:
                continue
            kept = model.module.leak.clone()
            if name == "no leak correction":
                model.module.leak.zero_()
            predicted = model.predict_perturbation(screen.labels, seed=seed, **common, **changed)
            model.module.leak.copy_(kept)
            rows.append(fit | {"prediction": name} | screen.score(predicted))
    mixed = pv.predict_ensemble(models, screen.labels, **common)
    rows.append({"seed": -1, "prediction": "ensemble"} | screen.score(mixed))
    return rows


def run_reference(screen: Screen, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fit and score a reference."""
    fitted = getattr(pv.reference, name)().fit(screen.adata, KEY, CONTROL, SPLIT)
    predicted = fitted.predict_perturbation(screen.labels, n_cells=min(args.n_cells, 500), seed=0)
    return [{"seed": -1, "prediction": "reference"} | screen.score(predicted)]


def summarise(path: Path) -> None:
    """Print means over seeds and, after +-, their standard deviation."""
    table = pd.read_csv(path)
    for data, rows in table.groupby("data", sort=False):
        lines = {}
        for (config, prediction), found in rows.groupby(["config", "prediction"], sort=False):
            line = {}
            for name in (*SCORES, "masks_open", "train_seconds"):
                values = found[name].dropna()
                if len(values) and (prediction in ("default", "reference") or name in ("l2", "energy_distance")):
                    spread = f" +- {values.std():.2g}" if len(values) > 1 else ""
                    line[name] = f"{values.mean():.4g}{spread}"
            lines[config if prediction in ("default", "reference") else f"{config}: {prediction}"] = line
        print(f"\n{data}\n{pd.DataFrame.from_dict(lines, orient='index').fillna('').to_string()}")


def main() -> None:
    """Run what is missing in the CSV, then summarise it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[*SCREENS, *FILES], choices=[*SCREENS, *FILES])
    parser.add_argument("--configs", nargs="+", default=[*REFERENCES, *CONFIGS], choices=[*REFERENCES, *CONFIGS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--n-mc-samples", type=int, default=50, help="importance samples a cell")
    parser.add_argument("--n-cells", type=int, default=1_000, help="cells predicted a condition")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="only print the table of the CSV")
    parser.add_argument("--folder", type=Path, default=None, help="of the h5ad files; default: $PERTVAE_DATA")
    parser.add_argument("--out", type=Path, default=RESULTS / "effects.csv")
    args = parser.parse_args()
    if args.summary:
        summarise(args.out)
        return
    folder = args.folder or Path(os.environ.get("PERTVAE_DATA", "../shared/data"))
    quiet(args.threads)
    settings = json.dumps({k: getattr(args, k) for k in ("seeds", "n_mc_samples", "n_cells")})
    table = ResumableTable(args.out, COLUMNS, FIT, settings)
    for name in args.data:
        missing = [c for c in args.configs if (name, c) not in table.done]
        missing = [c for c in missing if c not in REFERENCES or name != "authors"]  # references take counts
        if not missing:
            continue
        if name in FILES and not (folder / FILES[name][0]).is_file():
            print(f"{name}: skipped, there is no {FILES[name][0]} in {folder}: pass --folder.")
            continue
        screen = Screen(name, folder)
        for config in missing:
            if config in CONFIGS:
                rows = run_config(screen, CONFIGS[config], args)
            else:
                rows = run_reference(screen, config, args)
            blank = dict.fromkeys(COLUMNS, float("nan")) | {"sparsify": "", "data": name, "config": config}
            table.add([blank | row for row in rows])
            shown = [f"{r['prediction']} {r['l2']:.3f}" for r in rows if r["seed"] in (-1, args.seeds[0])]
            print(f"{name} {config}: {', '.join(shown)}", flush=True)
    summarise(args.out)


if __name__ == "__main__":
    main()
