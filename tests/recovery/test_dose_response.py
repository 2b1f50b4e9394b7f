"""Known Hill curves from a screen with doses, and the prediction of a dose that was left out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
from anndata import AnnData

import pertvae as pv

# slope and midpoint of each perturbation, the largest dose being 1
CURVES = {"A": (1.0, 0.05), "B": (4.0, 0.4), "C": (2.0, 0.15)}
DOSES, HELD_OUT = (0.1, 0.2, 0.4, 0.7, 1.0), 0.2
GENES, CELLS, LIBRARY = 60, 100, 2000


def response(dose: float, slope: float, midpoint: float) -> float:
    return dose**slope * (1 + midpoint**slope) / (dose**slope + midpoint**slope)


def screen() -> tuple[AnnData, pd.DataFrame]:
    """Counts whose log rates move by the response times the perturbation's effect; and the true shares at HELD_OUT."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.5, GENES)
    effects = {p: rng.normal(size=GENES) * (rng.random(GENES) < 0.4) for p in CURVES}
    given = [(p, d) for p in CURVES for d in DOSES for _ in range(CELLS)]
    obs = pd.DataFrame([("control", 0.0)] * 300 + given, columns=["perturbation", "dose"]).rename(index=str)
    shift = np.stack([response(d, *CURVES[p]) * effects[p] if d else np.zeros(GENES) for p, d in obs.to_numpy()])
    states = rng.normal(0, 0.3, (len(obs), 2)) @ rng.normal(size=(2, GENES))
    rate = np.exp(base + shift + states)
    counts = rng.poisson(LIBRARY * rate / rate.sum(1, keepdims=True)).astype(np.float32)
    valid = rng.random(len(obs)) < 0.1
    obs["split"] = np.where(obs["dose"] == HELD_OUT, "test", np.where(valid, "valid", "train"))
    share = rate / rate.sum(1, keepdims=True)
    truth = {p: share[(obs["perturbation"] == p) & (obs["dose"] == HELD_OUT)] for p in CURVES}
    profile = pd.DataFrame({p: np.log1p(1e4 * s).mean(0) for p, s in truth.items()}).T
    return AnnData(sp.csr_matrix(counts), obs=obs), profile


@pytest.mark.slow
def test_hill_predicts_a_dose_that_was_left_out() -> None:
    adata, truth = screen()
    asked = pd.DataFrame(np.eye(len(CURVES)) * HELD_OUT, index=list(CURVES), columns=list(CURVES))
    error, model = {}, None
    for kind in ("linear", "hill"):
        scvi.settings.seed = 0
        data = adata.copy()
        pv.SAMSVAE.setup_anndata(data, perturbation_key="perturbation", control="control", dosage_key="dose")
        model = pv.SAMSVAE(data, n_latent=6, n_hidden=32, dose_response=kind)  # type: ignore[arg-type]
        model.train(
            split_key="split",
            max_epochs=200,
            batch_size=256,
            accelerator="cpu",
            enable_progress_bar=False,
            check_val_every_n_epoch=10,
            plan_kwargs={"lr": 1e-3},
        )
        predicted = model.predict_perturbation(asked, n_cells=300, output="mean", library_size=1e4, key_added=None)
        mean = pd.DataFrame(np.log1p(predicted.layers["mean"]), index=predicted.obs["perturbation"].astype(str))
        mean = mean.groupby(level=0).mean().loc[list(CURVES)]
        error[kind] = np.sqrt(((mean.to_numpy() - truth.to_numpy()) ** 2).mean(axis=1))
    assert error["hill"].mean() < 0.5 * error["linear"].mean()
    # at a fifth of the largest dose the linear response gives a fifth of the effect to all three
    assert error["hill"][0] < 0.5 * error["linear"][0]
    assert error["hill"][2] < 0.5 * error["linear"][2]
    assert model is not None
    curves = model.get_dose_response()
    found = {p: response(HELD_OUT, curves.loc[p, "slope"], curves.loc[p, "midpoint"]) for p in CURVES}
    for p, parameters in CURVES.items():
        assert abs(found[p] - response(HELD_OUT, *parameters)) < 0.15
    assert found["B"] < 0.3 < 0.5 < found["C"] < found["A"]
