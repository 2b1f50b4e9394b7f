"""The numbers behind "Where a model loses" in docs/benchmark.md, from the fits that comparison.py has kept.

    python benchmarks/where_models_lose.py                everything (minutes; comparison.py of the data sets first)
    python benchmarks/where_models_lose.py luck kang      a part

- ``seeds``: ``l2_profile`` of single fits on the doubles of Norman, and total counts predicted and observed.
- ``datlinger``: predictions of knock-outs under stimulation, and of stimulation alone in their place.
- ``kang``: how far the control profile of the held-out type is that a model starts from, and its shift.
- ``zhao``: nats by which validation cells are described better with SAMS-VAE's open masks than without.
- ``luck``: energy distances between random cells of one population, as many as there are training controls and held-out
  cells of a condition; as they are, and with the mean of the controls moved to that of the population, as a reference
  with the right shift does.

Lengths are of mean log1p CP10k, over the genes that the benchmark scores.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from _common import RESULTS
from _kept import CLASSES, kept_fits
from comparison import jobs, read

from pertvae._predictions import predicted_shifts
from pertvae.benchmark._score import scoring_genes
from pertvae.cli import _quiet
from pertvae.metrics import energy_distance
from pertvae.models.samsvae._evidence import chosen_cells, evidence_for

SEEDS = (0, 1, 2)
KEY, CONTROL = "perturbation", "control"
N_CELLS = 2_000
PATH = RESULTS / "where_models_lose.csv"
COLUMNS = ["part", "data", "model", "fold", "seed", "condition", "quantity", "value"]
Row = dict[str, Any]


def log_cells(adata: ad.AnnData) -> ad.AnnData:
    """Return log1p CP10k."""
    copy = adata.copy()
    sc.pp.normalize_total(copy, target_sum=1e4)
    sc.pp.log1p(copy)
    return copy


def profile(adata: ad.AnnData) -> np.ndarray:
    """Return the mean of log1p CP10k."""
    return np.asarray(log_cells(adata).X.mean(axis=0)).ravel()


class Fold:
    """A kept fit, the cells of its fold, and what it predicts."""

    def __init__(self, adata: ad.AnnData, splits: pd.Series, model: Any) -> None:
        labels = adata.obs[KEY].astype(str)
        test = (splits == "test").to_numpy() & (labels != CONTROL).to_numpy()
        train = (splits != "test").to_numpy()
        self.adata, self.model, self.labels, self.test = adata, model, labels.to_numpy(), test
        self.conditions = sorted(set(self.labels[test]))
        self.controls = np.flatnonzero(train & (self.labels == CONTROL))
        self.genes = scoring_genes(adata.X, np.flatnonzero(train))

    def length(self, vector: np.ndarray) -> float:
        return float(np.linalg.norm(vector[self.genes]))

    def observed(self, condition: str) -> ad.AnnData:
        return self.adata[self.test & (self.labels == condition)]

    def predict(self, conditions: list[str], controls: np.ndarray) -> tuple[dict[str, ad.AnnData], pd.DataFrame]:
        """Return generated cells of each condition, and shifts."""
        made = self.model.predict_perturbation(conditions, indices=controls, n_cells=N_CELLS, seed=0, key_added=None)
        generated = made.obs["generated"].to_numpy(bool)
        cells = {c: made[generated & (made.obs[KEY] == c).to_numpy()] for c in conditions}
        return cells, predicted_shifts(made)


def folds(name: str, model: str, out: Path) -> Iterator[tuple[Row, Fold]]:
    """Yield what a row says of a kept fit, and the fit."""
    adata, _ = read(jobs([name])[name])
    splits = pd.read_csv(out / name / "splits.csv", index_col=0)
    n = 0
    for fold, seed, fitted in kept_fits(out / name, model, CLASSES[model], adata, SEEDS):
        n += 1
        yield {"data": name, "model": model, "fold": fold, "seed": seed}, Fold(adata, splits[fold], fitted)
    if n != splits.shape[1] * len(SEEDS):
        raise SystemExit(f"{name}: {n} fits of {model} for {splits.shape[1]} folds and {len(SEEDS)} seeds in {out}.")


def seeds(out: Path) -> Iterator[Row]:
    for model in ("samsvae", "cpavae"):
        for row, fold in folds("norman", model, out):
            cells, _ = fold.predict(fold.conditions, fold.controls)
            for condition in fold.conditions:
                made, seen = cells[condition], fold.observed(condition)
                values = {
                    "l2": fold.length(profile(made) - profile(seen)),
                    "total counts predicted": float(made.X.sum(axis=1).mean()),
                    "total counts observed": float(seen.X.sum(axis=1).mean()),
                }
                yield from (row | {"condition": condition, "quantity": q, "value": v} for q, v in values.items())


def datlinger(out: Path) -> Iterator[Row]:
    stimulus = "TCRstim"
    for model in CLASSES:
        for row, fold in folds("datlinger", model, out):
            cells, _ = fold.predict([*fold.conditions, stimulus], fold.controls)
            alone = profile(cells[stimulus])
            for condition in fold.conditions:
                seen, made = profile(fold.observed(condition)), profile(cells[condition])
                values = {"l2": fold.length(made - seen), "l2 of stimulation alone": fold.length(alone - seen)}
                yield from (row | {"condition": condition, "quantity": q, "value": v} for q, v in values.items())


def kang(out: Path) -> Iterator[Row]:
    for model in CLASSES:
        for row, fold in folds("kang", model, out):
            (condition,) = fold.conditions
            (context,) = set(fold.adata.obs["cell_type"].astype(str)[fold.test])
            controls = fold.controls[(fold.adata.obs["cell_type"].astype(str) == context).to_numpy()[fold.controls]]
            cells, shifts = fold.predict([condition], controls)
            seen, start = profile(fold.observed(condition)), profile(fold.adata[controls])
            made, shift = profile(cells[condition]), shifts.loc[condition].to_numpy()
            true = seen - start
            cosine = (shift * true)[fold.genes].sum() / fold.length(shift) / fold.length(true)
            values = {
                "l2": fold.length(made - seen),
                "error of the control profile": fold.length(made - shift - start),
                "l2 of shift + observed controls": fold.length(start + shift - seen),
                "shift": fold.length(shift),
                "true shift": fold.length(true),
                "cosine of shift and true shift": float(cosine),
            }
            yield from (row | {"condition": context, "quantity": q, "value": v} for q, v in values.items())


def zhao(out: Path) -> Iterator[Row]:
    for row, fold in folds("zhao", "samsvae", out):
        logits = fold.model.module.effects.mask_logits
        is_open = (logits > 0).cpu()
        values: dict[str, float] = {"open masks": int(is_open.sum())}
        if is_open.any():
            cells, doses = chosen_cells(fold.model, is_open.any(1).numpy())
            evidence = evidence_for(fold.model, is_open, cells, doses)
            values |= {"validation cells": len(cells), "evidence, nats": float(evidence[is_open].sum())}
        yield from (row | {"condition": "panobinostat", "quantity": q, "value": v} for q, v in values.items())


def luck(out: Path) -> Iterator[Row]:
    # controls that train, cells a condition
    for name, n_controls, n_cells in (("norman", 64, 80), ("datlinger", 39, 150)):
        adata, _ = read(jobs([name])[name])
        splits = pd.read_csv(out / name / "splits.csv", index_col=0)
        train = np.flatnonzero((splits.iloc[:, 0] != "test").to_numpy())
        labels = adata.obs[KEY].astype(str)
        one = labels.str.contains("TCRstim") if name == "datlinger" else labels != CONTROL
        x = log_cells(adata[one.to_numpy()]).X[:, scoring_genes(adata.X, train)].toarray()
        drawn = np.random.default_rng(0)
        found: dict[str, list[float]] = {"as they are": [], "moved to the true mean": []}
        for _ in range(200):
            order = drawn.permutation(len(x))
            controls, y = x[order[:n_controls]], x[order[n_controls : n_controls + n_cells]]
            found["as they are"].append(energy_distance(controls, y))
            moved = controls - controls.mean(axis=0) + x.mean(axis=0)
            found["moved to the true mean"].append(energy_distance(moved, y))
        row = {"data": name, "model": "", "fold": "", "seed": -1, "condition": ""}
        for which, energies in found.items():
            yield row | {"quantity": f"energy distance of one population, {which}", "value": float(np.mean(energies))}
            yield row | {"quantity": f"its SD, {which}", "value": float(np.std(energies))}


PARTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "seeds": seeds,
    "datlinger": datlinger,
    "kang": kang,
    "zhao": zhao,
    "luck": luck,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {list(PARTS)}; default all")
    parser.add_argument("--out", type=Path, default=Path("results/comparison"), help="folder of comparison.py")
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"{sorted(unknown)}: pass of {list(PARTS)}.")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for part in given.parts or PARTS:
        with _quiet():
            found = pd.DataFrame([{"part": part} | row for row in PARTS[part](given.out)])[COLUMNS]
        if PATH.exists():
            earlier = pd.read_csv(PATH)
            found = pd.concat([earlier[earlier["part"] != part], found])
        found.round(4).to_csv(PATH, index=False)
        here = found[found["part"] == part].fillna({"model": "", "condition": ""})
        table = here.pivot_table(index=["data", "model", "condition"], columns="quantity", values="value", sort=False)
        print(f"\n## {part}, mean over folds and seeds\n{table.round(3).to_string()}", flush=True)


if __name__ == "__main__":
    main()
