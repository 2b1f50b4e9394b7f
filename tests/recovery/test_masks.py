"""Training with a rotation finds the true masks of simulated screens, and the published training does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scvi
from anndata import AnnData

import pertvae as pv

QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}


def counts_screen() -> AnnData:
    """30 perturbations of 100 cells, 200 genes, 6 latents."""
    return pv.datasets.simulate_screen(
        n_genes=200,
        n_perturbations=30,
        n_doubles=0,
        cells_per_perturbation=100,
        n_controls=300,
        n_latent=6,
        n_batches=1,
        n_oracle=10,
        library_size=5000.0,
        decoder_sd=0.5,
    )


def authors_screen() -> AnnData:
    """40 perturbations of 100 training cells, 60 real values, 8 latents."""
    return pv.datasets.simulate_screen(
        "samsvae_authors",
        seed=1,
        n_latent=8,
        n_perturbations=40,
        n_genes=60,
        cells_per_split=(100, 20, 20),
        n_controls=100,
    )


SCREENS = {"counts": counts_screen, "authors": authors_screen}
EPOCHS = {"counts": 100, "authors": 250}


def fitted(adata: AnnData, max_epochs: int, **settings: Any) -> pv.SAMSVAE:
    counts = "split" not in adata.obs
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", is_count_data=counts)
    arguments = {"n_hidden": 64} | ({} if counts else {"gene_likelihood": "normal", "effect_prior_scale": 5.0})
    model = pv.SAMSVAE(adata, **(arguments | settings))
    model.train(max_epochs=max_epochs, batch_size=128, split_key=None if counts else "split", **QUIET)
    return model


def f1(model: pv.SAMSVAE) -> float:
    return pv.metrics.mask_f1(model.get_masks(), pv.datasets.read_truth(model.adata).mask).f1


@pytest.mark.slow
@pytest.mark.parametrize("screen", SCREENS)
def test_masks_of_small_screens(screen: str) -> None:
    adata = SCREENS[screen]()
    n_latent = pv.datasets.read_truth(adata).mask.shape[1]
    model = fitted(adata, EPOCHS[screen], n_latent=n_latent)
    assert f1(model) >= 0.85


@pytest.mark.slow
def test_published_training_does_not_find_them() -> None:
    """Also with as many epochs."""
    assert f1(fitted(authors_screen(), EPOCHS["authors"], n_latent=8, sparsify="published")) < 0.6


@pytest.mark.slow
def test_latents_to_spare_stay_empty() -> None:
    adata = counts_screen()
    model = fitted(adata, EPOCHS["counts"], n_latent=10)
    assert f1(model) >= 0.85
    assert ((model.get_masks() > 0.5).sum() <= 1).sum() >= 3


def few_perturbations() -> AnnData:
    """10 perturbations of 150 cells, 300 genes, 10 latents: many have a latent for themselves."""
    return pv.datasets.simulate_screen(
        n_genes=300,
        n_perturbations=10,
        n_doubles=0,
        cells_per_perturbation=150,
        n_controls=400,
        n_latent=10,
        mask_density=0.12,
        n_batches=1,
        batch_sd=0.0,
        n_oracle=10,
    )


@pytest.mark.slow
def test_every_perturbation_keeps_a_latent_of_its_own() -> None:
    """What validation cells close is noise."""
    model = fitted(few_perturbations(), 200, n_latent=20)
    assert ((model.get_masks() > 0.5).sum(axis=1) >= 1).all()


@pytest.mark.slow
def test_simulation_of_the_authors() -> None:
    """Full size, 150 cells a treatment: true masks, intervals, and a basal encoder that reads the shift fits better."""
    adata = pv.datasets.simulate_screen("samsvae_authors", seed=3, cells_per_split=(150, 20, 20), n_controls=150)
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", is_count_data=False)
    test = np.flatnonzero((adata.obs["split"] == "test").to_numpy())
    truth = pv.datasets.read_truth(adata).shifts
    found, fit, covered = {}, {}, {}
    for basal in ("correlated", "mean_field"):
        model = pv.SAMSVAE(adata, n_latent=15, gene_likelihood="normal", basal_inference=basal)  # type: ignore[arg-type]
        model.train(split_key="split", **QUIET)
        found[basal], fit[basal] = f1(model), float(model.get_marginal_ll(indices=test))
        effects = model.get_treatment_effects(key_added=None)
        expected = truth.loc[effects.mean.index, effects.mean.columns]
        covered[basal] = ((expected > effects.lower) & (expected < effects.upper)).to_numpy().mean()
    print(found, fit, covered)
    assert found["correlated"] >= 0.9
    assert fit["correlated"] >= fit["mean_field"] + 3
    # of 90%: masks, effects and errors of the leak correction vary in them, the decoder does not
    assert all(0.5 < share < 0.75 for share in covered.values())


@pytest.mark.slow
def test_a_perturbation_in_many_of_the_cells_keeps_its_mask() -> None:
    """A screen of one drug: 40% of the cells have it."""
    adata = pv.datasets.simulate_screen(
        seed=1,
        n_genes=100,
        n_perturbations=1,
        n_doubles=0,
        cells_per_perturbation=400,
        n_controls=600,
        n_batches=1,
        effect_size=8.0,
        mask_density=0.05,
    )
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    scvi.settings.seed = 0
    model = pv.SAMSVAE(adata, n_latent=20)
    model.train(max_epochs=600, batch_size=256, **QUIET)
    # with a cost that does not know how many cells there are: 0.68 and 1.02
    assert model.get_masks().to_numpy().max() > 0.95
    assert float(model.module.leak.norm()) < 0.4
