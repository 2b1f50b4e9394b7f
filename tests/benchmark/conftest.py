"""A small simulated screen, and a stand-in for a model that needs no training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

import pertvae as pv
from pertvae._constants import UNS_PROVENANCE_KEY
from pertvae._predictions import predicted_shifts
from pertvae._storage import write_table


class StandIn:
    """Looks like a model: an additive reference whose shifts are multiplied by ``scale``."""

    calls: ClassVar[list[dict[str, Any]]] = []

    @classmethod
    def setup_anndata(cls, adata, **kwargs):
        adata.obs["_scvi_stand_in"] = 1
        cls.registered = kwargs

    def __init__(self, adata, scale=1.0):
        self.adata, self.scale = adata, scale
        self.history = {}

    def train(self, split_key, max_epochs=3, broken=False, **trainer_kwargs):
        type(self).calls.append({"split_key": split_key, "max_epochs": max_epochs})
        if broken:
            raise RuntimeError("the loss\nis not a number")
        keys = self.registered
        self.reference = pv.reference.Additive().fit(
            self.adata, keys["perturbation_key"], keys["control"], split_key, sep=keys["sep"]
        )
        epochs = pd.Index(range(max_epochs), name="epoch")
        values = np.linspace(10, 5, max_epochs)
        self.history = {f"elbo_{s}": pd.DataFrame({f"elbo_{s}": values}, index=epochs) for s in ("train", "validation")}

    def predict_perturbation(self, perturbations, indices=None, n_cells=None, seed=0, key_added="auto"):
        type(self).calls.append({"indices": np.asarray(indices), "perturbations": list(perturbations)})
        assert key_added is None
        made = self.reference.predict_perturbation(
            perturbations, self.adata, indices, n_cells=n_cells, seed=seed, unseen="ignore"
        )
        provenance = dict(made.uns[UNS_PROVENANCE_KEY])
        del provenance["control_profile"]  # models are scored by their cells
        write_table(made.uns, provenance["shifts"], predicted_shifts(made) * self.scale)
        made.uns[UNS_PROVENANCE_KEY] = provenance
        return made

    def get_perturbation_programs(self, key_added="auto"):
        names, latent = ["P001", "P002"], ["z0", "z1"]
        loadings = pd.DataFrame(np.eye(2, self.adata.n_vars), latent, self.adata.var_names)
        square = pd.DataFrame(np.eye(2), names, latent)
        return SimpleNamespace(effects=square, inclusion=square, loadings=loadings)


@pytest.fixture(scope="package", autouse=True)
def few_resamplings():
    """Intervals of single conditions from few draws: what they are around is tested, not their smoothness."""
    from pertvae.benchmark import _cells_figure, _score

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_score, "N_RESAMPLES", 30)
        patch.setattr(_cells_figure, "_umap", lambda x: x[:, :2])  # seconds each; one test draws the real one
        yield


@pytest.fixture(scope="session")
def stand_in_class():
    return StandIn


@pytest.fixture
def stand_in(stand_in_class):
    stand_in_class.calls.clear()
    return stand_in_class


@pytest.fixture(scope="session")
def screen():
    return pv.datasets.simulate_screen(
        n_genes=60,
        n_perturbations=8,
        n_doubles=6,
        cells_per_perturbation=30,
        cells_per_double=20,
        n_controls=80,
        n_latent=4,
        n_oracle=100,
        effect_size=4.0,
        mask_density=0.4,
    )


@pytest.fixture
def options():
    """What keeps a run small."""
    return {"n_cells": 40, "progress": False, "references": ["NoChange", "Additive"]}
