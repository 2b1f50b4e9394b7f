"""Dose responses of SAMSVAE compared: linear, Hill curve, categories, on screens whose response is known.

Counts of 200 genes; log rates move by the response to the dose times a sparse effect of each of 12 perturbations,
beside a cell state of two dimensions. Doses 0.1, 0.3, 1, and 0.6 that is left out of training, with 80 cells each;
a tenth of the cells at other doses is tested. Responses: ``linear`` (1.5 d), ``saturating`` (a Hill curve with slope
1.5 and midpoint 0.2), and ``turning`` (an effect of its own at each dose, the middle one acting the other way).

- ``iwelbo``: importance-weighted log-likelihood of test cells at doses that were trained, nats a cell.
- ``error``: root mean square over genes of the predicted mean log1p CP10k of a dose against the truth, mean over
  perturbations and trained doses; ``error_left_out``: at the dose left out, which categories cannot predict.

    python benchmarks/doses.py
    python benchmarks/doses.py --summary
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
import scipy.sparse as sp
import scvi
from _common import RESULTS, ResumableTable, quiet
from anndata import AnnData

import pertvae as pv

GENES, PERTURBATIONS, CELLS, CONTROLS, LIBRARY = 200, 12, 80, 400, 3000
DOSES, LEFT_OUT = (0.1, 0.3, 1.0), 0.6
SCREENS = ("linear", "saturating", "turning")
RESPONSES = ("linear", "hill", "categories")
FIT = ["screen", "dose_response", "seed"]
COLUMNS = [*FIT, "iwelbo", "error", "error_left_out", "mask_density", "train_seconds", "settings", "versions"]


def screen(kind: str, seed: int) -> tuple[AnnData, pd.DataFrame]:
    """Return counts with a split, and the true mean log1p CP10k by perturbation and dose."""
    rng = np.random.default_rng([seed, SCREENS.index(kind)])
    names = [f"P{i:02d}" for i in range(PERTURBATIONS)]
    base = rng.normal(0, 1.0, GENES)
    sparse = lambda: rng.normal(0, 0.8, GENES) * (rng.random(GENES) < 0.2)  # noqa: E731
    shifts: dict[tuple[str, float], np.ndarray] = {}
    for name in names:
        first, other = sparse(), sparse()
        for dose in (*DOSES, LEFT_OUT):
            curve = 1.5 * dose if kind == "linear" else dose**1.5 / (dose**1.5 + 0.2**1.5)
            shifts[name, dose] = curve * first
        if kind == "turning":
            shifts |= {(name, 0.1): first, (name, 0.3): -0.8 * first, (name, 1.0): 0.4 * first + other}
    kept = DOSES if kind == "turning" else (*DOSES, LEFT_OUT)
    given = [("control", 0.0)] * CONTROLS + [g for g in shifts if g[1] in kept for _ in range(CELLS)]
    obs = pd.DataFrame(given, columns=["perturbation", "dose"]).rename(index=str)
    zero = np.zeros(GENES)
    state = rng.normal(size=(len(obs), 2)) @ rng.normal(0, 0.3, (2, GENES))
    rate = np.exp(base + state + np.stack([shifts.get(g, zero) for g in given]))
    share = rate / rate.sum(1, keepdims=True)
    place = rng.random(len(obs))
    obs["split"] = np.select([(obs["dose"] == LEFT_OUT) | (place < 0.1), place < 0.2], ["test", "valid"], "train")
    truth = pd.DataFrame(np.log1p(1e4 * share)).groupby([obs["perturbation"].array, obs["dose"].array]).mean()
    return AnnData(sp.csr_matrix(rng.poisson(LIBRARY * share).astype(np.float32)), obs=obs), truth


def fit(kind: str, response: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one model and score it."""
    adata, truth = screen(kind, seed)
    scvi.settings.seed = seed
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", dosage_key="dose")
    model = pv.SAMSVAE(adata, n_latent=15, n_hidden=64, dose_response=response)
    start = time.perf_counter()
    model.train(
        split_key="split", max_epochs=args.max_epochs, batch_size=256, accelerator="cpu", enable_progress_bar=False
    )
    seconds = time.perf_counter() - start
    test = np.flatnonzero((adata.obs["split"] == "test") & (adata.obs["dose"] != LEFT_OUT))
    wanted = [g for g in truth.index if g[0] != "control" and (g[1] in DOSES or response != "categories")]
    table = pd.DataFrame.from_dict({f"{p} {d}": {p: d} for p, d in wanted}, orient="index").fillna(0.0)
    predicted = model.predict_perturbation(
        table, n_cells=args.n_cells, output="mean", library_size=1e4, seed=seed, key_added=None
    )
    generated = predicted[predicted.obs["generated"].to_numpy()]
    mean = pd.DataFrame(np.log1p(generated.layers["mean"]), index=generated.obs["perturbation"].astype(str))
    mean = mean.groupby(level=0).mean().loc[table.index].to_numpy()
    error = np.sqrt(((mean - truth.loc[wanted].to_numpy()) ** 2).mean(axis=1))
    trained = np.array([d in DOSES for _, d in wanted])
    return {
        "iwelbo": float(model.get_marginal_ll(indices=test, n_mc_samples=args.n_mc_samples)),
        "error": float(error[trained].mean()),
        "error_left_out": float(error[~trained].mean()) if (~trained).any() else float("nan"),
        "mask_density": float(model.get_masks().to_numpy().mean()),
        "train_seconds": seconds,
    }


def summarise(path: Path) -> None:
    """Print means over seeds with their standard deviation."""
    table = pd.read_csv(path)
    scores = ["iwelbo", "error", "error_left_out", "mask_density", "train_seconds"]
    found = table.groupby(["screen", "dose_response"], sort=False)[scores].agg(["mean", "std"])
    print(found.round(3).to_string())


def main() -> None:
    """Run what is missing in the CSV, then summarise it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-epochs", type=int, default=300)
    parser.add_argument("--n-mc-samples", type=int, default=100, help="importance samples a cell")
    parser.add_argument("--n-cells", type=int, default=300, help="cells predicted a dose")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="only print the table of the CSV")
    parser.add_argument("--out", type=Path, default=RESULTS / "doses.csv")
    args = parser.parse_args()
    if args.summary:
        summarise(args.out)
        return
    quiet(args.threads)
    settings = json.dumps({k: getattr(args, k) for k in ("max_epochs", "n_mc_samples", "n_cells")})
    table = ResumableTable(args.out, COLUMNS, FIT, settings)
    for seed in args.seeds:
        for kind in SCREENS:
            for response in RESPONSES:
                if (kind, response, seed) in table.done:
                    continue
                scores = fit(kind, response, seed, args)
                table.add([dict(zip(FIT, (kind, response, seed), strict=True)) | scores])
                print(f"seed {seed} {kind}, {response}: { {k: round(v, 3) for k, v in scores.items()} }", flush=True)
    summarise(args.out)


if __name__ == "__main__":
    main()
