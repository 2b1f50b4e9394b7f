"""Small screens for the tests of SAMS-VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from anndata import AnnData

import pertvae as pv


@pytest.fixture(scope="session")
def small_screen() -> AnnData:
    """440 cells, 60 genes, 8 singles, 3 doubles, two batches; not registered."""
    return pv.datasets.simulate_screen(
        n_genes=60,
        n_perturbations=8,
        n_doubles=3,
        cells_per_perturbation=35,
        cells_per_double=20,
        n_controls=100,
        n_latent=4,
        n_oracle=10,
        seed=0,
    )


@pytest.fixture
def adata(small_screen: AnnData) -> AnnData:
    """The small screen, of which every fourth cell validates."""
    adata = small_screen.copy()
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 4 == 0, "valid", "train")
    return adata


@pytest.fixture
def model_of() -> Callable[..., pv.SAMSVAE]:
    """Register a copy of a screen and build a small model on it."""

    def build(adata: AnnData, setup: dict[str, Any] | None = None, **arguments: Any) -> pv.SAMSVAE:
        adata = adata.copy()
        pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", **(setup or {}))
        return pv.SAMSVAE(adata, **({"n_latent": 5, "n_hidden": 16} | arguments))

    return build


@pytest.fixture
def quiet() -> dict[str, Any]:
    """Keyword arguments of a short, silent training on one CPU."""
    return {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
