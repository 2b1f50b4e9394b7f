"""Open questions of the SAMS-VAE paper as options: SAMSVAE with one option changed at a time, on simulated screens.

Screens: ``authors``, the authors' simulation (real values) with fewer cells and perturbations, and ``sparse``, counts
of a small ``sparse_additive`` screen whose doubles are all held out. A seed is that of the screen, the split and the
training. Each fit is one row of the CSV, written at once; a run that was stopped goes on where it was.

- ``iwelbo``: importance-weighted log-likelihood of held-out cells, nats a cell: test cells of the singles and controls;
  ``iwelbo_doubles``: cells of held-out doubles (``sparse``).
- ``mask_f1``, ``mask_precision``, ``mask_recall`` after matching latents, at a threshold of 0.5; ``density`` of the
  inclusion probabilities (``density_truth`` over as many latents), ``latents_used`` by at least one perturbation.
- ``effect_l2``, ``effect_slope``: distance of the predicted shifts of doubles that were not in training to the true
  expectation, mean over doubles, and their projection on it; ``effect_l2_none`` is the distance of no effect at all.
- ``train_seconds`` of the whole fit; ``cells_per_s`` and ``cells_per_cpu_s`` of the training epochs alone.

    python benchmarks/samsvae_options.py                              everything
    python benchmarks/samsvae_options.py --configs default gated      a part; later runs add to it
    python benchmarks/samsvae_options.py --summary                    the table of what is there
    python benchmarks/samsvae_options.py --tiny --out /tmp/tiny.csv   a check that it runs
"""

from __future__ import annotations

import argparse
import inspect
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
from speed import EpochTimer

import pertvae as pv
from pertvae._predictions import predicted_shifts
from pertvae.datasets._generator import Decoder, stream

KEY, CONTROL, SPLIT = "perturbation", "control", "split"
SETTING = {"n_latent": 15, "n_hidden": 64}
# what is changed from the defaults, by name; an argument the constructor does not have is skipped
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"mask_prior={p:g}": {"mask_prior": p} for p in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)},
    "hyperprior=perturbation": {"mask_hyperprior": "perturbation"},
    "hyperprior=latent": {"mask_hyperprior": "latent"},
    "hyperprior=perturbation, 0.05": {"mask_hyperprior": "perturbation", "mask_prior": 0.05},
    "hyperprior=latent, 0.05": {"mask_hyperprior": "latent", "mask_prior": 0.05},
    "effects=mean_field": {"embedding_inference": "mean_field"},
    "effects=correlated": {"embedding_inference": "correlated"},
    "effects=gated": {"embedding_inference": "gated"},
    "effects=low_rank": {"embedding_inference": "low_rank"},
    "basal=mean_field": {"basal_inference": "mean_field"},
    "basal=correlated": {"basal_inference": "correlated"},
    "basal=flow": {"basal_posterior": "flow"},
    "particles=5": {"n_particles": 5},
    "iwae, particles=5": {"objective": "iwae", "n_particles": 5},
    "mask_gradient=identity": {"mask_gradient": "identity"},
    "sparsify=published": {"sparsify": "published"},
}
SCREENS: dict[str, dict[str, Any]] = {
    "authors": {
        "kind": "samsvae_authors",
        "n_genes": 100,
        "n_perturbations": 50,
        "n_latent": 10,
        "cells_per_split": (80, 20, 20),
        "n_controls": 300,
    },
    "sparse": {
        "kind": "sparse_additive",
        "n_genes": 200,
        "n_perturbations": 40,
        "n_doubles": 20,
        "cells_per_perturbation": 80,
        "cells_per_double": 40,
        "n_controls": 400,
        "n_latent": 10,
        "mask_density": 0.15,
        "n_batches": 1,
        "batch_sd": 0.0,
    },
}
FEWER = {"n_genes": 30, "n_perturbations": 6, "n_controls": 60, "n_latent": 4, "n_oracle": 100}
TINY: dict[str, dict[str, Any]] = {
    "authors": SCREENS["authors"] | FEWER | {"cells_per_split": (16, 4, 4)},
    "sparse": SCREENS["sparse"] | FEWER | {"n_doubles": 4, "cells_per_perturbation": 24, "cells_per_double": 10},
}
N_DOUBLES = 20
FIT = ["screen", "config", "seed"]
SCORES = ["iwelbo", "iwelbo_doubles", "mask_f1", "mask_precision", "mask_recall", "density", "density_truth"]
SCORES += ["latents_used", "effect_l2", "effect_slope", "effect_l2_none"]
COSTS = ["epochs", "train_seconds", "cells_per_s", "cells_per_cpu_s"]
COLUMNS = [*FIT, *SCORES, *COSTS, "n_train_cells", "arguments", "settings", "versions"]


# ---------------------------------------------------------------- screens


def split_of(adata: AnnData, seed: int) -> pd.Series:
    """Return the split of every cell: doubles are test; of the others 80% train, 10% valid, 10% test."""
    if SPLIT in adata.obs:
        return adata.obs[SPLIT].astype(str)
    labels = adata.obs[KEY].astype(str)
    rank = pd.Series(stream(seed, "split").permutation(len(labels)), index=labels.index)
    place = rank.groupby(labels).rank(method="first", pct=True)
    is_test = labels.str.contains("+", regex=False) | (place > 0.9)
    return pd.Series(np.select([is_test, place > 0.8], ["test", "valid"], "train"), index=labels.index)


def true_doubles(adata: AnnData, seed: int) -> pd.DataFrame:
    """Return the expected shifts of doubles without training cells, doubles x genes.

    The authors' simulation has no doubles: random pairs of its singles go through its true decoder.
    """
    truth = pv.datasets.read_truth(adata)
    doubles = [c for c in truth.shifts.index if "+" in c]
    if doubles:
        return truth.shifts.loc[doubles]
    rng = stream(seed, "doubles")
    weights = [w for k, w in truth.decoder.items() if k.startswith("layer")]
    decoder = Decoder(weights, truth.decoder["center"], truth.decoder["scale"])
    basal = rng.standard_normal((2_000, truth.effects.shape[1]))
    pairs = [sorted(rng.choice(truth.effects.index, 2, replace=False)) for _ in range(N_DOUBLES)]
    base = decoder(basal).mean(axis=0)
    shifts = [decoder(basal + truth.effects.loc[p].sum().to_numpy()).mean(axis=0) - base for p in pairs]
    table = pd.DataFrame(shifts, index=["+".join(p) for p in pairs], columns=truth.shifts.columns)
    return table[~table.index.duplicated()]


# ---------------------------------------------------------------- one fit


def accepted(arguments: dict[str, Any]) -> str | None:
    """Return why the constructor does not take the arguments, or None."""
    parameters = inspect.signature(pv.SAMSVAE).parameters
    missing = [a for a in arguments if a not in parameters]
    if missing:
        return f"SAMSVAE has no {', '.join(missing)}"
    if arguments and all(parameters[a].default == value for a, value in arguments.items()):
        return "these are the defaults"
    return None


def fit(screen: AnnData, arguments: dict[str, Any], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one model and score it."""
    truth, doubles = pv.datasets.read_truth(screen), true_doubles(screen, seed)
    work = screen.copy()
    del work.uns["truth"]
    work.obs[KEY] = work.obs[KEY].astype(str)
    work.obs[SPLIT] = split_of(work, seed).to_numpy()
    counts = truth.shift_space != "identity"
    pv.SAMSVAE.setup_anndata(work, perturbation_key=KEY, control=CONTROL, is_count_data=counts)
    scvi.settings.seed = seed
    model = pv.SAMSVAE(work, gene_likelihood="nb" if counts else "normal", **SETTING, **arguments)
    timer = EpochTimer()
    start = time.perf_counter()
    model.train(
        max_epochs=args.max_epochs,
        split_key=SPLIT,
        batch_size=args.batch_size,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timer],
    )
    seconds = time.perf_counter() - start
    cells, wall, cpu = (sum(column) for column in zip(*timer.epochs, strict=True))

    split, is_double = work.obs[SPLIT].to_numpy(), work.obs[KEY].str.contains("+", regex=False).to_numpy()
    test = np.flatnonzero(split == "test")
    each = np.asarray(model.get_marginal_ll(indices=test, n_mc_samples=args.n_mc_samples, return_mean=False))
    masks = model.get_masks()
    score = pv.metrics.mask_f1(masks, truth.mask)
    controls = np.flatnonzero((work.obs[KEY] == CONTROL) & (split == "train"))
    predicted = model.predict_perturbation(
        list(doubles.index),
        indices=controls,
        n_cells=args.n_cells,
        library_size="observed",
        seed=seed,
        key_added=None,
    )
    shifts, expected = predicted_shifts(predicted).loc[doubles.index].to_numpy(), doubles.to_numpy()
    return {
        "iwelbo": float(each[~is_double[test]].mean()),
        "iwelbo_doubles": float(each[is_double[test]].mean()) if is_double[test].any() else float("nan"),
        "mask_f1": score.f1,
        "mask_precision": score.precision,
        "mask_recall": score.recall,
        "density": float(masks.to_numpy().mean()),
        "density_truth": float(truth.mask.to_numpy().sum() / masks.size),
        "latents_used": int((masks > 0.5).any().sum()),
        "effect_l2": float(np.linalg.norm(shifts - expected, axis=1).mean()),
        "effect_slope": float((shifts * expected).sum() / (expected**2).sum()),
        "effect_l2_none": float(np.linalg.norm(expected, axis=1).mean()),
        "epochs": len(timer.epochs),
        "train_seconds": seconds,
        "cells_per_s": cells / wall,
        "cells_per_cpu_s": cells / cpu,
        "n_train_cells": int((split == "train").sum()),
    }


# ---------------------------------------------------------------- the table


def summarise(path: Path) -> None:
    """Print means over seeds, IWELBO as the difference to the defaults on the same seeds, with its standard error."""
    table = pd.read_csv(path)
    for screen, rows in table.groupby("screen", sort=False):
        default = rows[rows["config"] == "default"].set_index("seed")
        lines = {}
        for config, fits in rows.groupby("config", sort=False):
            fits = fits.set_index("seed")
            line: dict[str, Any] = {"seeds": len(fits)}
            for name in ("iwelbo", "iwelbo_doubles", "effect_l2"):
                difference = (fits[name] - default[name]).dropna()
                if len(difference):
                    error = difference.std() / len(difference) ** 0.5 if len(difference) > 1 else float("nan")
                    line[f"{name} - default"] = f"{difference.mean():+.3f} ({error:.3f})"
            for name in (*SCORES, *COSTS):
                if fits[name].notna().any():
                    line[name] = f"{fits[name].mean():.5g}"
            lines[config] = line
        print(f"\n{screen}: means over seeds; differences to the defaults with their standard errors")
        print(pd.DataFrame.from_dict(lines, orient="index").fillna("").to_string())


def main() -> None:
    """Run what is missing in the CSV, then summarise it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--screens", nargs="+", default=list(SCREENS), choices=list(SCREENS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4], help="0 to 2 chose constants of the training")
    parser.add_argument("--max-epochs", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--n-mc-samples", type=int, default=100, help="importance samples a cell")
    parser.add_argument("--n-cells", type=int, default=500, help="cells predicted a double")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="only print the table of the CSV")
    parser.add_argument("--tiny", action="store_true", help="tiny screens and ten epochs: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "samsvae_options.csv")
    args = parser.parse_args()
    unknown = [c for c in args.configs if c not in CONFIGS]
    if unknown:
        parser.error(f"unknown configurations {unknown}; there are {list(CONFIGS)}.")
    if args.summary:
        summarise(args.out)
        return
    if args.tiny:
        args.max_epochs, args.n_mc_samples, args.n_cells = 10, 5, 50

    quiet(args.threads)
    sizes = TINY if args.tiny else SCREENS
    settings = json.dumps(
        {
            **{k: getattr(args, k) for k in ("max_epochs", "batch_size", "n_mc_samples", "n_cells")},
            **SETTING,
            "screens": sizes,
        }
    )
    table = ResumableTable(args.out, COLUMNS, FIT, settings)
    for config in args.configs:
        reason = accepted(CONFIGS[config])
        if reason is not None:
            print(f"{config}: skipped, {reason}.")
            args.configs = [c for c in args.configs if c != config]
    for seed in args.seeds:
        for name in args.screens:
            screen = pv.datasets.simulate_screen(seed=seed, **sizes[name])
            for config in args.configs:
                if (name, config, seed) in table.done:
                    continue
                scores = fit(screen, CONFIGS[config], seed, args)
                row = dict(zip(FIT, (name, config, seed), strict=True)) | {"arguments": json.dumps(CONFIGS[config])}
                table.add([row | scores])
                print(
                    f"seed {seed} {name} {config}: iwelbo {scores['iwelbo']:.3f}  f1 {scores['mask_f1']:.2f}  "
                    f"l2 {scores['effect_l2']:.3f}  ({scores['train_seconds']:.0f} s)",
                    flush=True,
                )
    summarise(args.out)


if __name__ == "__main__":
    main()
