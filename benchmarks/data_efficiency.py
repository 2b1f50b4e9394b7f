"""Likelihood and effects of held-out combinations against the fraction of combinations in training.

The two studies of the SAMS-VAE paper (arXiv 2311.02794) on a simulated screen in the shape of theirs (singles, more
combinations than singles, controls):

- ``ood``: combinations are shuffled, the first int(f n) train, the last quarter is tested. Cells of combinations are
  divided 80/20 into the rest and test, and all others 80/20 into train and valid; the test cells are the 20% of the
  tested combinations, the same for every f. At f = 1 all combinations train, the tested ones too.
- ``efficiency``: the same division of cells; the training cells of combinations are cut to their first fraction f, test
  and validation cells are those of all combinations.

Each fit is appended to the CSV at once, and a run that was stopped goes on where it was. A seed is that of the split
and of the training; the screen is one. Scores: ``iwelbo`` (importance-weighted log-likelihood of the test cells, nats
a cell), and ``ate_correlation``, ``ate_correlation_top_20`` of the effects on tested combinations against the expected
effects of the simulation (``_truth``) and against the test cells and validation controls (``_held_out``), with
``l2_profile``.

    python benchmarks/data_efficiency.py                               everything
    python benchmarks/data_efficiency.py --models SAMSVAE --seeds 0    a part; later runs add to it
    python benchmarks/data_efficiency.py --tiny --out /tmp/tiny.csv    a check that it runs
"""

from __future__ import annotations

import argparse
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
from pertvae.metrics._profiles import rowwise_pearson
from pertvae.metrics._treatment_effects import strongest

MODELS = ("SAMSVAE", "CPAVAE", "SVAEPlus", "ConditionalVAE")
REFERENCES = ("Additive", "RidgeAdditive")
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROTOCOLS = ("ood", "efficiency")
KEY, CONTROL, SPLIT = "perturbation", "control", "split"
TEST_COMBINATIONS, TEST_CELLS, VALID_CELLS = 0.25, 0.2, 0.2
HELD_OUT = ("ate_correlation", "ate_correlation_top_20", "l2_profile")
SIZES: dict[str, Any] = {
    "n_genes": 500,
    "n_perturbations": 40,
    "n_doubles": 52,
    "cells_per_perturbation": 60,
    "cells_per_double": 60,
    "n_controls": 600,
    "n_latent": 15,
    "mask_density": 0.15,
    "n_batches": 1,
    "batch_sd": 0.0,
}
TINY = SIZES | {"n_genes": 40, "n_perturbations": 6, "n_doubles": 8, "n_controls": 60, "n_latent": 3}
TINY |= {"cells_per_perturbation": 20, "cells_per_double": 20, "n_oracle": 200}
ROWS = {"model": 6, "reference": 5}
"""Scores of a finished fit."""
FIT = ["protocol", "train_fraction", "model", "seed"]
COLUMNS = [*FIT, "kind", "metric", "value", "n_train_cells", "n_train_combinations", "seconds", "settings", "versions"]


def split_cells(labels: pd.Series, protocol: str, fraction: float, seed: int) -> tuple[pd.Series, list[str]]:
    """Return ``train``, ``valid``, ``test`` or missing for every cell, and the tested combinations."""
    rng = np.random.default_rng([seed, 3])
    names = labels.to_numpy(dtype=str)
    is_combination = np.char.find(names, "+") >= 0
    order = rng.permutation(len(names))  # one division of cells for all protocols and fractions of a seed
    combos, others = order[is_combination[order]], order[~is_combination[order]]
    split = np.full(len(names), None, dtype=object)
    n_test = round(TEST_CELLS * len(combos))
    test, rest = combos[:n_test], combos[n_test:]
    for cells in (rest, others):
        n_valid = round(VALID_CELLS * len(cells))
        split[cells[:n_valid]], split[cells[n_valid:]] = "valid", "train"
    split[test] = "test"
    shuffled = rng.permutation(sorted(set(names[is_combination])))
    if protocol == "efficiency":
        tested = sorted(shuffled)
        training = rest[split[rest] == "train"]
        split[training[int(fraction * len(training) + 1e-9) :]] = None
    else:
        kept = set(shuffled[: int(fraction * len(shuffled) + 1e-9)])
        tested = sorted(shuffled[-int(np.ceil(TEST_COMBINATIONS * len(shuffled))) :])
        in_test = split == "test"
        split[is_combination & ~in_test & ~np.isin(names, list(kept))] = None
        split[in_test & ~np.isin(names, tested)] = None
    return pd.Series(split, index=labels.index), [str(t) for t in tested]


def effect_scores(predicted: AnnData, work: AnnData, tested: list[str], truth: Any) -> dict[str, float]:
    """Return scores of the effects on the tested combinations, against truth and against held-out cells."""
    shifts = predicted_shifts(predicted).loc[tested].to_numpy()
    expected = truth.shifts.loc[tested].to_numpy()
    found = {
        "ate_correlation_truth": float(rowwise_pearson(shifts.ravel(), expected.ravel())),
        "ate_correlation_top_20_truth": float(rowwise_pearson(*strongest(shifts, expected))),
    }
    # controls of validation cells: no prediction starts from them
    is_control = (work.obs[KEY] == CONTROL).to_numpy()
    kept = (work.obs[SPLIT] == "test").to_numpy() | (is_control & (work.obs[SPLIT] == "valid").to_numpy())
    scores = pv.metrics.evaluate(predicted, work[kept].copy(), KEY, CONTROL, metrics=HELD_OUT)
    pooled = scores[scores["level"] == "pooled"].set_index("metric")["value"]
    return found | {f"{name}_held_out": float(pooled[name]) for name in HELD_OUT}


def run_model(name: str, work: AnnData, tested: list[str], truth: Any, args: argparse.Namespace, seed: int) -> dict:
    """Train one model, and score the likelihood and the effects."""
    cls = getattr(pv, name)
    cls.setup_anndata(work, perturbation_key=KEY, control=CONTROL)
    scvi.settings.seed = seed
    model = cls(work, **({} if args.n_latent is None else {"n_latent": args.n_latent}))
    epochs = {} if args.max_epochs is None else {"max_epochs": args.max_epochs}
    model.train(split_key=SPLIT, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **epochs)
    test = np.flatnonzero(work.obs[SPLIT] == "test")
    scores = {"iwelbo": model.get_marginal_ll(indices=test, n_mc_samples=args.n_mc_samples)}
    controls = np.flatnonzero((work.obs[KEY] == CONTROL) & (work.obs[SPLIT] == "train"))
    predicted = model.predict_perturbation(
        tested, indices=controls, n_cells=args.n_cells, output="counts", key_added=None
    )
    return scores | effect_scores(predicted, work, tested, truth)


def run_reference(name: str, work: AnnData, tested: list[str], truth: Any, args: argparse.Namespace) -> dict:
    """Fit one reference and score its effects; it has no likelihood."""
    reference = getattr(pv.reference, name)().fit(work, KEY, CONTROL, SPLIT)
    predicted = reference.predict_perturbation(tested, n_cells=min(args.n_cells, 200), seed=0)
    return effect_scores(predicted, work, tested, truth)


def summarise(path: Path, figures: Path | None) -> None:
    """Print means and standard deviations over seeds; likelihoods beside the first model's at fraction 0."""
    table = pd.read_csv(path)
    first = next((m for m in MODELS if m in set(table["model"])), None)
    iwelbo = table[table["metric"] == "iwelbo"]
    zero = iwelbo[(iwelbo["model"] == first) & (iwelbo["train_fraction"] == 0)].set_index(["protocol", "seed"])["value"]
    base = [zero.get((p, s), np.nan) for p, s in zip(iwelbo["protocol"], iwelbo["seed"], strict=True)]
    relative = iwelbo.assign(metric="iwelbo_relative", value=iwelbo["value"] - base).dropna(subset="value")
    table = pd.concat([table, relative], ignore_index=True)
    for (protocol, metric), rows in table.groupby(["protocol", "metric"], sort=False):
        cells = rows.groupby(["model", "train_fraction"], sort=False)["value"].agg(["mean", "std"])
        text = [f"{m:.3f}" + ("" if np.isnan(s) else f" ({s:.3f})") for m, s in cells.to_numpy()]
        wide = pd.Series(text, index=cells.index).unstack().rename_axis(index=None, columns=None)
        print(
            f"\n{protocol}, {metric}: mean (sd over seeds) by fraction of combinations in training\n{wide.to_string()}"
        )
        if figures is not None and metric in ("iwelbo_relative", "ate_correlation_truth", "ate_correlation_held_out"):
            label = f"IWELBO minus {first} at 0%\n(nats a cell)" if metric == "iwelbo_relative" else None
            target = figures / f"{path.stem}_{protocol}_{metric}.png"
            pv.pl.data_efficiency(rows, metric, ylabel=label, save=target)
            print(f"wrote {target}")


def main() -> None:
    """Run what is missing in the CSV, then summarise it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="classes of pertvae")
    parser.add_argument("--references", nargs="*", default=list(REFERENCES), help="classes of pertvae.reference")
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    parser.add_argument("--fractions", nargs="+", type=float, default=list(FRACTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--n-mc-samples", type=int, default=100, help="importance samples a cell")
    parser.add_argument("--n-cells", type=int, default=1_000, help="cells predicted a combination")
    parser.add_argument("--n-latent", type=int, default=None, help="default: that of the model")
    parser.add_argument("--max-epochs", type=int, default=None, help="default: chosen by the model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a tiny screen and two epochs: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "data_efficiency.csv")
    parser.add_argument("--figures", type=Path, default=None, help="folder for figures (default: none)")
    args = parser.parse_args()
    absent = [n for n in args.models if not hasattr(pv, n)] + [
        n for n in args.references if not hasattr(pv.reference, n)
    ]
    if absent:
        raise SystemExit(f"pertvae has no {', '.join(absent)}.")
    if args.tiny:
        args.max_epochs, args.n_mc_samples, args.n_cells = args.max_epochs or 2, 5, 50

    quiet(args.threads)
    sizes = TINY if args.tiny else SIZES
    screen = pv.datasets.simulate_screen("sparse_additive", seed=0, **sizes)
    truth = pv.datasets.read_truth(screen)
    screen.obs[KEY] = screen.obs[KEY].astype(str)
    shape = " ".join(f"{k}={v}" for k, v in sizes.items())
    settings = f"{shape} max_epochs={args.max_epochs} n_mc_samples={args.n_mc_samples} n_cells={args.n_cells}"
    settings += "" if args.n_latent is None else f" model's n_latent={args.n_latent}"
    table = ResumableTable(args.out, COLUMNS, FIT, settings, ROWS)
    for seed in args.seeds:
        for protocol in args.protocols:
            for fraction in args.fractions:
                split, tested = split_cells(screen.obs[KEY], protocol, fraction, seed)
                for name in (*args.references, *args.models):
                    if (protocol, fraction, name, seed) in table.done:
                        continue
                    work = screen[split.notna().to_numpy()].copy()
                    del work.uns["truth"]
                    work.obs[SPLIT] = split[work.obs_names].to_numpy(dtype=str)
                    start, is_model = time.perf_counter(), name in args.models
                    if is_model:
                        scores = run_model(name, work, tested, truth, args, seed)
                    else:
                        scores = run_reference(name, work, tested, truth, args)
                    trained = work.obs.loc[work.obs[SPLIT] == "train", KEY]
                    fit = {
                        "protocol": protocol,
                        "train_fraction": fraction,
                        "model": name,
                        "seed": seed,
                        "kind": "model" if is_model else "reference",
                        "n_train_cells": len(trained),
                        "n_train_combinations": trained[trained.str.contains("+", regex=False)].nunique(),
                        "seconds": round(time.perf_counter() - start, 1),
                    }
                    table.add([{**fit, "metric": m, "value": v} for m, v in scores.items()])
                    shown = "  ".join(
                        f"{m} {scores[m]:.3f}" for m in ("iwelbo", "ate_correlation_truth") if m in scores
                    )
                    print(f"seed {seed} {protocol} {fraction:g} {name}: {shown}  ({fit['seconds']} s)", flush=True)
    summarise(args.out, args.figures)


if __name__ == "__main__":
    main()
