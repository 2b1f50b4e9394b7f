"""Masks of a screen whose doses were registered in another unit."""

from __future__ import annotations

import pytest
import scvi

import pertvae as pv


@pytest.mark.filterwarnings("ignore:Doses go up to")
@pytest.mark.parametrize("unit", [1.0, 100.0, 0.01])
def test_masks_are_found_in_any_unit(unit: float) -> None:
    """With the prior's scale in that unit: as good as with doses of 1."""
    adata = pv.datasets.simulate_screen(
        n_genes=80,
        n_perturbations=16,
        n_doubles=0,
        cells_per_perturbation=60,
        n_controls=150,
        n_latent=4,
        n_batches=1,
        n_oracle=10,
        library_size=5000.0,
        decoder_sd=0.5,
    )
    adata.obs["dose"] = unit
    scvi.settings.seed = 0
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", dosage_key="dose")
    model = pv.SAMSVAE(adata, n_latent=4, n_hidden=32, effect_prior_scale=1 / unit)
    model.train(
        max_epochs=80,
        batch_size=128,
        early_stopping=False,
        accelerator="cpu",
        enable_progress_bar=False,
        plan_kwargs={"lr": 3e-3},
    )
    assert pv.metrics.mask_f1(model.get_masks(), pv.datasets.read_truth(adata).mask).f1 > 0.85
