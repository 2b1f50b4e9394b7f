"""Credible intervals of treatment effects."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.stats import norm

import pertvae as pv


def test_intervals_follow_the_posterior_of_the_effects(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    """One component, mask certain, one latent: the interval is the image of the effect's quantiles."""
    model = model_of(small_screen, embedding_inference="mean_field", n_latent=1)
    model.train(max_epochs=2, **quiet)
    effects = model.module.effects
    with torch.no_grad():
        effects.mask_logits.fill_(30.0)
        effects.loc.fill_(0.5)
        effects.log_sd.fill_(float(np.log(0.2)))
        model.module.decoder.mlp.first.weight.mul_(3)
    wide = model.get_treatment_effects(["P001"], n_samples=2000, credible=0.9, key_added=None)
    narrow = model.get_treatment_effects(["P001"], n_samples=2000, credible=0.5, key_added=None)
    assert ((wide.lower <= narrow.lower) & (narrow.upper <= wide.upper)).all(axis=None)
    assert ((wide.lower <= wide.mean) & (wide.mean <= wide.upper)).all(axis=None)

    def image(e: float) -> np.ndarray:
        z, covariates = model._control_states(model.adata, 100)
        space = "log1p_cp10k"
        change = model._expression(z + e, covariates, space) - model._expression(z, covariates, space)
        return change.mean(0).detach().numpy()

    for table, low, high in ((wide, 0.05, 0.95), (narrow, 0.25, 0.75)):
        ends = np.sort([image(float(norm.ppf(q, 0.5, 0.2))) for q in (low, high)], axis=0)
        scale = float(ends[1].max() - ends[0].min())
        np.testing.assert_allclose(table.lower.to_numpy()[0], ends[0], atol=0.04 * scale)
        np.testing.assert_allclose(table.upper.to_numpy()[0], ends[1], atol=0.04 * scale)
    # without doubt about the effect the interval is a point; a control has no effect
    with torch.no_grad():
        effects.log_sd.fill_(-30.0)
    sure = model.get_treatment_effects(["P001", "control"], n_samples=50, key_added=None)
    assert (sure.upper - sure.lower).to_numpy().max() < 0.01 * scale
    assert sure.mean.loc["control"].abs().max() == 0


@pytest.mark.slow
def test_intervals_shrink_with_more_cells(quiet: dict) -> None:
    """The same perturbations with 6 and with 200 cells each."""
    full = pv.datasets.simulate_screen(
        n_genes=80,
        n_perturbations=4,
        n_doubles=0,
        cells_per_perturbation=200,
        n_controls=400,
        n_latent=4,
        mask_density=0.5,
        n_oracle=10,
        seed=2,
    )
    labels = full.obs["perturbation"].astype(str)
    rank = labels.groupby(labels).cumcount()
    few = full[(labels == "control") | (rank < 6)].copy()
    widths: dict[str, pd.Series] = {}
    for name, adata in (("few", few), ("many", full)):
        pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
        model = pv.SAMSVAE(
            adata,
            n_latent=4,
            n_hidden=32,
            embedding_inference="mean_field",
            mask_prior=0.9,
            effect_prior_scale=2.0,
            n_particles=4,
        )
        with torch.no_grad():  # masks held open, so that the widths are those of the effects
            model.module.effects.mask_logits.fill_(15.0)
        model.module.effects.mask_logits.requires_grad_(False)
        model.train(
            max_epochs=3000, max_steps=1000, batch_size=256, early_stopping=False, plan_kwargs={"lr": 2e-2}, **quiet
        )
        effects = model.get_treatment_effects(n_samples=400, key_added=None)
        inside = (effects.lower <= effects.mean + 1e-3) & (effects.mean <= effects.upper + 1e-3)
        assert inside.to_numpy().mean() > 0.95
        widths[name] = (effects.upper - effects.lower).mean(axis=1)
    assert (widths["many"] < 0.8 * widths["few"]).all(), widths
    assert widths["many"].mean() < 0.65 * widths["few"].mean(), widths
