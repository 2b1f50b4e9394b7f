"""The unit of linear doses: with the prior's scale in the same unit, nothing depends on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from anndata import AnnData

import pertvae as pv
from pertvae.nn import SparseEffects

KINDS = ("mean_field", "correlated", "gated", "low_rank")


@pytest.fixture
def dosed(small_screen: AnnData) -> AnnData:
    adata = small_screen.copy()
    rng = np.random.default_rng(0)
    adata.obs["dose"] = rng.choice([0.25, 0.5, 2.0], adata.n_obs)
    adata.obs["split"] = rng.choice(["train", "valid", "test"], adata.n_obs, p=[0.7, 0.15, 0.15])
    return adata


def trained(adata: AnnData, factor: float, quiet: dict, cls: Any = pv.SAMSVAE, **arguments: Any) -> Any:
    """A model of the screen with all doses multiplied, trained through all phases."""
    scvi.settings.seed = 0
    adata = adata.copy()
    adata.obs["dose"] = adata.obs["dose"] * factor
    cls.setup_anndata(adata, perturbation_key="perturbation", control="control", dosage_key="dose")
    model = cls(adata, **({"n_latent": 5, "n_hidden": 16, "effect_prior_scale": 1 / factor} | arguments))
    model.train(max_epochs=12, batch_size=64, split_key="split", plan_kwargs={"lr": 3e-3}, **quiet)
    return model


@pytest.mark.filterwarnings("ignore:Doses go up to")
@pytest.mark.parametrize("factor", [128.0, 1 / 128])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_do_not_depend_on_the_unit(dosed: AnnData, quiet: dict, kind: str, factor: float) -> None:
    a, b = (trained(dosed, f, quiet, embedding_inference=kind, mask_prior=0.3) for f in (1.0, factor))
    assert a.get_masks().to_numpy().std() > 0.01
    pd.testing.assert_frame_equal(a.get_masks(), b.get_masks(), rtol=1e-5)
    effects = [m.get_perturbation_programs(key_added=None).effects for m in (a, b)]
    assert float(np.abs(effects[0]).max(axis=None)) > 0
    pd.testing.assert_frame_equal(effects[0], effects[1] * factor, rtol=1e-4, atol=1e-7)
    row = torch.eye(8)[:1]
    offsets = [m.module.offset(row * f).detach().numpy() for m, f in ((a, 1.0), (b, factor))]
    np.testing.assert_allclose(*offsets, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        a.get_latent_representation(kind="full", key_added=None),
        b.get_latent_representation(kind="full", key_added=None),
        atol=1e-4,
    )


@pytest.mark.filterwarnings("ignore:Doses go up to")
def test_inclusion_of_cpavae_does_not_depend_on_the_unit(dosed: AnnData, quiet: dict) -> None:
    a, b = (trained(dosed, f, quiet, pv.CPAVAE) for f in (1.0, 1 / 64))
    tables = [m.get_perturbation_programs(key_added=None).inclusion for m in (a, b)]
    assert tables[0].to_numpy().std() > 0.01
    pd.testing.assert_frame_equal(*tables, rtol=1e-4)


def test_typical_dose_is_the_root_mean_square_of_the_first_training_cells(dosed: AnnData, quiet: dict) -> None:
    held_out = dosed.obs["perturbation"].astype(str).str.contains("P003")
    dosed.obs.loc[held_out, "split"] = "test"
    model = trained(dosed, 1.0, quiet)
    typical = pd.Series(model.module.effects.typical_dose[:, 0].numpy(), model.perturbation_names)
    doses = pd.DataFrame(model.adata.obsm["_scvi_perturbation"].toarray(), columns=model.perturbation_names)
    root = np.sqrt((doses.iloc[model.train_indices].replace(0.0, np.nan) ** 2).mean())
    pd.testing.assert_series_equal(typical.drop("P003"), root.drop("P003"), rtol=1e-5, check_dtype=False)
    assert root.drop("P003").min() <= typical["P003"] <= root.drop("P003").max()
    # effects belong to these doses for good
    model.train(max_epochs=1, batch_size=64, train_size=0.5, **quiet)
    np.testing.assert_array_equal(model.module.effects.typical_dose[:, 0], typical)


def test_doses_of_one_and_curves_need_no_unit(small_screen: AnnData, dosed: AnnData, quiet: dict) -> None:
    pv.SAMSVAE.setup_anndata(dosed, perturbation_key="perturbation", control="control", dosage_key="dose")
    plain = small_screen.copy()
    pv.SAMSVAE.setup_anndata(plain, perturbation_key="perturbation", control="control")
    for adata, kind in ((plain, "linear"), (dosed, "hill"), (dosed, "categories")):
        model = pv.SAMSVAE(adata, n_latent=5, n_hidden=16, dose_response=kind)  # type: ignore[arg-type]
        model.train(max_epochs=1, train_size=0.9, **quiet)
        assert (model.module.effects.typical_dose == 1.0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_those_of_a_dose_of_one(kind: str) -> None:
    """With the same noise: a tenth of the effects where what is learned belongs to a dose of ten; the KL follows."""
    torch.manual_seed(0)
    effects = [
        SparseEffects(3, 4, mask_prior=0.1, effect_prior_scale=s, embedding_inference=kind)  # type: ignore[arg-type]
        for s in (1.0, 0.1)
    ]
    with torch.no_grad():
        for parameter in effects[0].parameters():
            parameter.normal_(0, 0.3)
    effects[1].load_state_dict(effects[0].state_dict())
    with torch.no_grad():
        effects[1].expected()  # what it keeps must not outlive the change
    effects[1].set_typical_dose(torch.tensor([10.0, 0.0, 10.0]))
    assert effects[1].typical_dose.flatten().tolist() == [10.0] * 3
    noise = torch.rand(5, 2, 4), torch.randn(5, 2, 4)
    found = []
    for e in effects:
        sample = e.sample(7, torch.Generator().manual_seed(1))
        drawn = e.draw(torch.tensor([2, 0]), *noise, deviation=(torch.zeros(2, 4), torch.zeros(2, 4)))
        with torch.no_grad():
            expected = e.expected()
        found.append((sample.effect, drawn, expected, sample.kl))
    for first, second in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(first, 10 * second, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0][3], found[1][3], rtol=1e-4, atol=1e-4)
    for e in effects:
        e.open = True
    assert np.isclose(*(e.start_masks(0.9) for e in effects), rtol=1e-5)
    torch.testing.assert_close(effects[0].mask_logits, effects[1].mask_logits, rtol=1e-4, atol=1e-4)
