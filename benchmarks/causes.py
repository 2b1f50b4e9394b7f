"""Why does a model lose to a reference? One setting of a model changed at a time, scored on the comparison's folds.

    python benchmarks/causes.py zhao norman          data sets of comparison.py
    python benchmarks/causes.py zhao --model conditionalvae
    python benchmarks/causes.py zhao --changes "KL weight 0.1" "10 latents"

This looks for causes; nothing is chosen by it: the scores are those of held-out cells that the benchmark reports. A row
is a change: mean over seeds of a metric, its difference to the reference that is best in ``comparison_*_summary.csv``
with the interval of the benchmark, and in how many latents the basal state of training cells says anything (variance of
posterior means above 0.01). Resumes.
"""

from __future__ import annotations

import argparse
import inspect
import os
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from _common import RESULTS
from _kept import CLASSES, kept_fits
from comparison import REFERENCES, jobs, read, run

from pertvae.benchmark._job import _safe
from pertvae.cli import _quiet

METRICS = ("l2_profile", "pearson_delta_perturbed", "slope", "energy_distance")
COLUMNS = ["data", "model", "change", "reference", "metric", "model_value", "reference_value", "difference"]
COLUMNS += ["lower", "upper", "interval", "n_conditions", "n_seeds", "active_latents"]
STEPS = {"samsvae": 10_000}  # of a default training
DEFAULT = "default"

# the default monitor has the KL at full weight: with another weight it would stop at what is hardly trained
AS_TRAINED = {"early_stopping_monitor": "validation_loss"}

Change = dict[str, dict[str, Any]]
CHANGES: dict[str, Change] = {
    DEFAULT: {},
    "a quarter of the training": {"length": {"factor": 0.25}},
    "twice the training": {"length": {"factor": 2}},
    "no early stopping": {"train": {"early_stopping": False}},
    "Adam's eps 0.01": {"train": {"plan_kwargs": {"eps": 0.01}}},
    "KL weight 0.1": {"train": {"plan_kwargs": {"max_kl_weight": 0.1}, **AS_TRAINED}},
    "KL weight 3": {"train": {"plan_kwargs": {"max_kl_weight": 3.0}, **AS_TRAINED}},
    "KL warm-up": {"train": {"plan_kwargs": {"n_epochs_kl_warmup": 100}}},
    "10 latents": {"model": {"n_latent": 10}},
    "100 latents": {"model": {"n_latent": 100}},
    "32 hidden units": {"model": {"n_hidden": 32}},
    "512 hidden units": {"model": {"n_hidden": 512}},
    "linear decoder": {"model": {"n_layers_decoder": 0}},
    "decoder of 2 layers": {"model": {"n_layers_decoder": 2}},
    "masks: prior 0.1": {"model": {"mask_prior": 0.1}},
    "masks: prior 0.5": {"model": {"mask_prior": 0.5}},
    "masks: the published way": {"model": {"sparsify": "published"}},
    "effects: prior scale 3": {"model": {"effect_prior_scale": 3.0}},
    "basal state of expression only": {"model": {"basal_inference": "mean_field"}},
    "no leak correction": {"model": {"leak_correction": False}},
    "Poisson": {"model": {"gene_likelihood": "poisson"}},
}


def applies(change: str, model: str) -> bool:
    """Return whether a model has what is changed."""
    return set(CHANGES[change].get("model", {})) <= set(inspect.signature(CLASSES[model].__init__).parameters)


def arguments(change: Change, model: str, steps: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the constructor and ``train`` are given, for a mean number of steps an epoch."""
    train = dict(change.get("train", {}))
    if "length" in change:
        train["max_epochs"] = round(change["length"]["factor"] * STEPS.get(model, 4_000) / steps)
    return change.get("model", {}), train


def active_latents(folder: Path, name: str, cls: Any, adata: ad.AnnData, seeds: list[int]) -> float:
    """Return in how many latents the basal state of the training cells varies, mean over folds and seeds."""
    counts = []
    for _, _, model in kept_fits(folder, _safe(name), cls, adata, seeds):
        basal = model.get_latent_representation(indices=model.train_indices, kind="basal", key_added=None)
        counts.append(int((basal.var(axis=0) > 0.01).sum()))
    return float(np.mean(counts)) if counts else float("nan")


def best_reference(name: str) -> str:
    """Return the reference with the best mean profiles in the comparison."""
    table = pd.read_csv(RESULTS / f"comparison_{name}_summary.csv")
    rows = table[(table["kind"] == "reference") & (table["metric"] == "l2_profile")]
    return str(rows.loc[rows["value"].idxmin(), "model"])


def search(name: str, model: str, changes: list[str], seeds: list[int], folder: Path) -> pd.DataFrame:
    """Train, score and compare; return one row a change and metric."""
    options = jobs([name])[name] | {"seeds": seeds, "ensemble": len(seeds) > 1}
    adata, title = read(options)
    reference = best_reference(name)
    splits = pd.read_csv(folder / name / "splits.csv", index_col=0)  # of the comparison, which has to be there
    steps = float(np.ceil(0.9 * (splits == "train").sum() / 512).mean())  # a tenth of the training cells validates
    # the default has the name of the comparison, whose fits are used again
    names = {change: model if change == DEFAULT else f"{model}: {change}" for change in changes}
    given = {names[change]: arguments(CHANGES[change], model, steps) for change in changes}
    result = run(
        adata,
        title,
        options,
        dict.fromkeys(given, CLASSES[model]),
        folder / name,
        references={reference: REFERENCES[reference]},
        metrics=list(METRICS),
        model_kwargs={key: of_model for key, (of_model, _) in given.items()},
        train_kwargs={key: of_train for key, (_, of_train) in given.items()},
    )
    paired = result.compare(list(METRICS))
    paired = (
        paired[paired["reference"] == reference]
        .drop(columns="model")
        .assign(
            data=name,
            model=model,
            n_seeds=len(seeds),
            change=paired["model"].map({v: k for k, v in names.items()}).fillna(paired["model"]),
        )
    )
    with _quiet():
        active = {
            change: active_latents(folder / name, names[change], CLASSES[model], adata, seeds) for change in changes
        }
    return paired.assign(active_latents=paired["change"].map(active))[COLUMNS].round(4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["zhao"], help="jobs of comparison.py")
    parser.add_argument("--model", default="samsvae", choices=list(CLASSES))
    parser.add_argument("--changes", nargs="*", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results/comparison"), help="its folder")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in given.names:
        changes = [change for change in given.changes if applies(change, given.model)]
        found = search(name, given.model, changes, given.seeds, given.out)
        path = RESULTS / f"causes_{name}_{given.model}.csv"
        if path.exists():
            earlier = pd.read_csv(path)
            found = pd.concat([earlier[~earlier["change"].isin(found["change"])], found])
        found.to_csv(path, index=False)
        print(f"\n## {name}: minus {found['reference'].iloc[0]}\n{found.to_string(index=False)}", flush=True)


if __name__ == "__main__":
    main()
