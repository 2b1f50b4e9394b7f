"""Small screens in every form that can be registered, and short training."""

from __future__ import annotations

import warnings
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
from mudata import MuData

from ._models import Case

CONTROL = "ctrl"
LABELS = {CONTROL: 40, "A": 16, "B": 16, "C/2": 16, "A+B": 8, "B+A": 8, "B+ctrl": 8, "A+C/2": 8}
COMPONENTS = ["A", "B", "C/2"]
UNSEEN = "B+C/2"
FAST = {"max_epochs": 2, "batch_size": 64, "accelerator": "cpu", "enable_progress_bar": False}


def screen(n_genes: int = 30, labels: dict[str, int] | None = None, seed: int = 0) -> ad.AnnData:
    """Return cells with counts in ``X`` and every column a model may register."""
    rng = np.random.default_rng(seed)
    labels = LABELS if labels is None else labels
    label = rng.permutation(np.repeat(list(labels), list(labels.values())))
    n = len(label)
    effects = {c: rng.normal(0, 1.5, n_genes) * (rng.random(n_genes) < 0.3) for c in COMPONENTS}
    log_rate = rng.normal(0, 1, n_genes) + rng.normal(0, 0.2, (n, n_genes))
    log_rate += np.stack([sum((effects.get(p, 0.0) for p in set(v.split("+"))), np.zeros(n_genes)) for v in label])
    size = rng.lognormal(0, 0.2, n)
    share = np.exp(log_rate) / np.exp(log_rate).sum(1, keepdims=True)
    counts = rng.poisson(10 * n_genes * size[:, None] * share).astype(np.float32)
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(label),
            "batch": pd.Categorical(rng.choice(["b0", "b1"], n)),
            "cell_type": pd.Categorical(rng.choice(["t0", "t1"], n)),
            "donor": pd.Categorical(rng.choice(["d0", "d1", "d2"], n)),
            "age": rng.normal(size=n),
            "size_factor": counts.sum(1) * 2.0,
            "dose": rng.choice([0.5, 1.0], n),
            "artifact": rng.random(n) < 0.3,
        },
        index=[f"cell{i}" for i in range(n)],
    )
    obs["dose_text"] = [
        "+".join(f"{0.5 * (1 + (i + k) % 2)}" for k in range(len(str(v).split("+")))) for i, v in enumerate(label)
    ]
    var = pd.DataFrame({"symbol": [f"S{j}" for j in range(n_genes)]}, index=[f"gene{j}" for j in range(n_genes)])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)


def design(adata: ad.AnnData) -> pd.DataFrame:
    """Return the design matrix of the labels."""
    parts = adata.obs["perturbation"].astype(str).str.split("+")
    return pd.DataFrame({c: [float(c in p) for p in parts] for c in COMPONENTS}, index=adata.obs_names)


def register(case: Case, data: Any, **arguments: Any) -> None:
    """Register data for a model."""
    if "perturbation_obsm_key" not in arguments:
        arguments = {"perturbation_key": "perturbation", "control": CONTROL, **arguments}
    arguments = {**case.setup, **arguments}
    if isinstance(data, MuData):
        named = {k: "rna" for k in arguments if k.endswith(("_key", "_keys"))}
        modalities = {"layer": "rna", **named, **arguments.pop("modalities", {})}
        case.cls.setup_mudata(data, modalities={k: v for k, v in modalities.items() if v}, **arguments)
    else:
        case.cls.setup_anndata(data, **arguments)


def fit(case: Case, data: Any, setup: dict | None = None, model: dict | None = None, **train: Any) -> Any:
    """Register data, build a model and train it for two epochs."""
    scvi.settings.seed = 0
    register(case, data, **(setup or {}))
    built = case.cls(data, **{**case.kwargs, **(model or {})})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(early stopping is off|log_every_n_steps|mini-batch)", append=True)
        built.train(**{**FAST, **case.train, **train})
    return built


def dense(x: Any) -> np.ndarray:
    """Return a matrix as an array."""
    return x.toarray() if sp.issparse(x) else np.asarray(x)


def block(predicted: ad.AnnData, label: str, key: str = "perturbation") -> pd.DataFrame:
    """Return the generated cells of one label: source cells x genes."""
    rows = ((predicted.obs[key].astype(str) == label) & predicted.obs["generated"].astype(bool)).to_numpy()
    part = predicted[rows].to_memory() if predicted.isbacked else predicted[rows]
    return pd.DataFrame(dense(part.X), index=part.obs["source_cell"].astype(str), columns=part.var_names)


def frozen(adata: ad.AnnData) -> ad.AnnData:
    """Return a deep copy, to compare with later."""
    return adata.copy()


def assert_same(adata: ad.AnnData, before: ad.AnnData) -> None:
    """Assert that nothing in an AnnData has changed."""
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert type(adata.X) is type(before.X)
    assert list(adata.obsm) == list(before.obsm)
    assert list(adata.layers) == list(before.layers)
    assert list(adata.uns) == list(before.uns)
    for ours, theirs in [(adata.X, before.X), *((adata.layers[k], before.layers[k]) for k in before.layers)]:
        np.testing.assert_array_equal(dense(ours), dense(theirs))
    for key in before.obsm:
        np.testing.assert_array_equal(dense(adata.obsm[key]), dense(before.obsm[key]))
