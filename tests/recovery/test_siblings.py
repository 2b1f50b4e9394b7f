"""SAMS-VAE and its siblings find the effects of a simulated screen, and add them up for doubles held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scvi
from anndata import AnnData

import pertvae as pv
from pertvae._predictions import predicted_shifts

KEYS = {"perturbation_key": "perturbation", "control": "control"}


@pytest.fixture(scope="module")
def screen() -> AnnData:
    """12 singles, 12 doubles, half of them held out; doubles move a profile by about 10 units of log1p CP10k."""
    adata = pv.datasets.simulate_screen(
        n_genes=150,
        n_perturbations=12,
        n_doubles=12,
        cells_per_perturbation=70,
        cells_per_double=40,
        n_controls=300,
        n_latent=6,
        n_oracle=300,
        seed=1,
    )
    label = adata.obs["perturbation"].astype(str)
    doubles = sorted(p for p in label.unique() if "+" in p)
    adata.obs["split"] = np.where(label.isin(doubles[::2]), "test", "train")
    return adata


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SAMSVAE", "SVAEPlus", "SVAEPlus genentech", "ConditionalVAE"])
def test_held_out_doubles(screen: AnnData, name: str) -> None:
    cls, *variant = name.split()
    arguments: dict[str, Any] = {"variant": variant[0]} if variant else {}
    adata, model_cls = screen.copy(), getattr(pv, cls)
    model_cls.setup_anndata(adata, **KEYS, batch_key="batch")
    scvi.settings.seed = 0
    model = model_cls(adata, n_latent=8, n_hidden=64, **arguments)
    model.train(split_key="split", accelerator="cpu", enable_progress_bar=False, plan_kwargs={"lr": 1e-3})
    test = sorted(set(adata.obs.loc[adata.obs["split"] == "test", "perturbation"].astype(str)))
    assert len(test) == 6
    predicted = model.predict_perturbation(test, n_cells=300, library_size="observed", key_added=None)
    found = predicted_shifts(predicted)
    truth = pv.datasets.read_truth(adata).shifts.loc[found.index, found.columns]
    r = [np.corrcoef(found.loc[p], truth.loc[p])[0, 1] for p in test]
    slope = [np.polyfit(truth.loc[p], found.loc[p], 1)[0] for p in test]
    error = np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)
    ridge = pv.reference.RidgeAdditive().fit(adata, **KEYS, split_key="split").predict_perturbation(test)
    additive = np.linalg.norm(predicted_shifts(ridge).loc[test, found.columns] - truth.loc[test], axis=1)
    additive /= np.linalg.norm(truth.loc[test], axis=1)
    print(name, np.round([np.mean(r), np.mean(slope), np.mean(error), np.mean(additive)], 3))
    assert np.mean(r) > 0.9
    assert 0.65 < np.mean(slope) < 1.15
    assert np.mean(error) < 0.4
    if name == "SAMSVAE":
        assert np.mean(error) < 0.85 * np.mean(additive)
