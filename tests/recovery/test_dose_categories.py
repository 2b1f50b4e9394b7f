"""Known effects of single doses that no curve describes: the second dose acts the other way, the third elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
from anndata import AnnData

import pertvae as pv

NAMES, DOSES = ("A", "B"), (0.5, 1.0, 2.0)
GENES, CELLS, LIBRARY = 40, 120, 2000


def screen() -> tuple[AnnData, pd.DataFrame]:
    """Counts whose log rates move by an effect of each dose; and the true profiles of each dose."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.5, GENES)
    shifts = {}
    for name in NAMES:
        first, other = rng.normal(size=(2, GENES)) * (rng.random((2, GENES)) < 0.4)
        for dose, shift in zip(DOSES, (first, -0.8 * first, 0.4 * first + other), strict=True):
            shifts[name, dose] = shift
    obs = pd.DataFrame(
        [("control", 0.0)] * 200 + [given for given in shifts for _ in range(CELLS)], columns=["perturbation", "dose"]
    ).rename(index=str)
    zero = np.zeros(GENES)
    shift = np.stack([shifts.get((p, d), zero) for p, d in obs.to_numpy()])
    rate = np.exp(base + shift + rng.normal(0, 0.2, (len(obs), 2)) @ rng.normal(size=(2, GENES)))
    share = rate / rate.sum(1, keepdims=True)
    profiles = pd.DataFrame(np.log1p(1e4 * share)).groupby([obs["perturbation"].array, obs["dose"].array]).mean()
    return AnnData(sp.csr_matrix(rng.poisson(LIBRARY * share).astype(np.float32)), obs=obs), profiles


def fitted(cls: Any, kind: str, max_epochs: int) -> tuple[Any, pd.Series]:
    """A trained model, and the error of its profile of each dose, root mean square over genes."""
    adata, truth = screen()
    scvi.settings.seed = 0
    cls.setup_anndata(adata, perturbation_key="perturbation", control="control", dosage_key="dose")
    model = cls(adata, n_latent=6, n_hidden=32, dose_response=kind)
    model.train(
        max_epochs=max_epochs,
        batch_size=128,
        early_stopping=False,
        accelerator="cpu",
        enable_progress_bar=False,
        plan_kwargs={"lr": 3e-3},
    )
    rows = {f"{p} {d}": {p: d} for p in NAMES for d in DOSES}
    predicted = model.predict_perturbation(
        pd.DataFrame.from_dict(rows, orient="index"), n_cells=200, output="mean", library_size=1e4, key_added=None
    )
    mean = pd.DataFrame(np.log1p(predicted.layers["mean"]), index=predicted.obs["perturbation"].astype(str))
    mean = mean.groupby(level=0).mean()
    error = {
        row: float(np.sqrt(((mean.loc[row] - truth.loc[(p, d)].to_numpy()) ** 2).mean()))
        for row, (p, d) in zip(rows, ((p, d) for p in NAMES for d in DOSES), strict=True)
    }
    return model, pd.Series(error)


@pytest.mark.slow
def test_categories_recover_what_no_curve_can() -> None:
    errors = {}
    for kind in ("linear", "hill", "categories"):
        model, errors[kind] = fitted(pv.SAMSVAE, kind, 100)
    for kind in ("linear", "hill"):
        assert errors["categories"].mean() < 0.4 * errors[kind].mean()
    assert (errors["categories"] < 0.2).all()
    # the middle dose acts the other way
    along = model.get_dose_response()["along_mean"].unstack()
    assert (along[1.0] < 0).all()
