"""The Hill response in SAMS-VAE: everything that reads doses reads it, and without it nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from anndata import AnnData

import pertvae as pv
from pertvae._constants import PERTURBATION_REGISTRY_KEY
from pertvae.models.base import ModuleShape
from pertvae.models.samsvae import SAMSVAEModule

DOSES = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0.25, 0], [2, 0.5, 0], [0, 0, 4], [1, 1, 1]]).float()
N, GENES, LATENT = len(DOSES), 10, 4
SLOPE, MIDPOINT, LARGEST = np.array([0.7, 3.0, 1.0]), np.array([0.2, 0.5, 2.0]), np.array([2.0, 1.0, 4.0])


def module(dose_response: str = "hill", **settings: Any) -> SAMSVAEModule:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "n_latent": LATENT,
        "n_hidden": 8,
        "n_layers": 1,
        "n_particles": 1,
        "gene_likelihood": "nb",
        "mask_prior": 0.1,
        "effect_prior_scale": 1.0,
        "embedding_inference": "mean_field",
        "basal_inference": "correlated",
        "dose_response": dose_response,
    }
    made = SAMSVAEModule(ModuleShape(GENES, 3), **(arguments | settings))
    with torch.no_grad():
        made.effects.loc.normal_()
        made.effects.mask_logits.normal_()
        if made.hill is not None:
            made.hill.log_slope.copy_(torch.as_tensor(np.log(SLOPE)))
            made.hill.log_midpoint.copy_(torch.as_tensor(np.log(MIDPOINT)))
            made.hill.set_largest_dose(torch.as_tensor(LARGEST).float())
    return made


def response() -> torch.Tensor:
    u = DOSES.double().numpy() / LARGEST
    return torch.as_tensor(u**SLOPE * (1 + MIDPOINT**SLOPE) / (u**SLOPE + MIDPOINT**SLOPE)).float()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    x = torch.poisson(torch.full((N, GENES), 5.0), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(N, 1)
    return {"X": x, PERTURBATION_REGISTRY_KEY: DOSES, "batch": zeros, "labels": zeros}


def test_every_shift_reads_the_response(tensors: dict) -> None:
    model = module()
    sample = model.draw_globals(1)
    out = model.inference(**model._get_inference_input(tensors), globals_=sample)
    torch.testing.assert_close(out["z"] - out["z_basal"], response() @ sample.effect[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.offset(DOSES), response() @ model.effects.expected(), rtol=1e-4, atol=1e-5)
    g = torch.Generator().manual_seed(2)
    components = torch.tensor([2, 0])
    uniform, normal = (f(5, 2, LATENT, generator=g) for f in (torch.rand, torch.randn))
    drawn = model.draw_offset(components, torch.tensor([4.0, 1.0]), uniform, normal)
    effect = model.effects.draw(components, uniform, normal)
    expected = response()[4, 2] * effect[:, 0] + response()[1, 0] * effect[:, 1]
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)


def test_the_prior_of_the_curves_is_part_of_the_bound(tensors: dict) -> None:
    kwargs = {"loss_kwargs": {"n_obs": 50}}
    model = module()
    penalty = 0.5 * ((np.log(SLOPE) / 0.5) ** 2 + (np.log(MIDPOINT) / 1.5) ** 2)
    torch.manual_seed(3)
    _, _, out = model(tensors, **kwargs)
    torch.manual_seed(3)
    without = model.effects.sample(1).kl.sum()
    np.testing.assert_allclose(out.kl_global_sum.detach(), float(without.detach()) + penalty.sum(), rtol=1e-5)
    parts = (out.reconstruction_loss_sum + out.kl_local_sum) / N + out.kl_global_sum / 50
    torch.testing.assert_close(out.loss, parts)
    out.loss.backward()
    for parameter in model.hill.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert (parameter.grad != 0).all()


def test_plate_weights_read_doses_not_responses(tensors: dict) -> None:
    """A response that underflows still belongs to a cell that was given the perturbation."""
    model = module(global_kl="plate")
    model.cells_per_component.copy_((DOSES > 0).sum(0))
    with torch.no_grad():
        model.hill.log_slope.fill_(7.0)
    torch.manual_seed(3)
    _, _, out = model(tensors, loss_kwargs={"n_obs": N})
    torch.manual_seed(3)
    torch.testing.assert_close(out.kl_global_sum, model.draw_globals(1).kl.sum())


@pytest.mark.parametrize("kind", ["linear", "hill"])
def test_doses_of_one_act_as_before(tensors: dict, kind: str) -> None:
    """With the largest dose everywhere the curve does not matter; linear models have none and get doses as they are."""
    model = module(kind)
    if kind == "linear":
        assert model.respond(DOSES) is DOSES
        assert not any("hill" in name or "flow" in name for name in model.state_dict())
        return
    ones = (DOSES > 0).float()
    assert torch.equal(model.respond(ones * model.hill.largest_dose), ones)


def test_modules_start_from_the_same_weights() -> None:
    plain, hill = module("linear").state_dict(), module("hill").state_dict()
    assert set(hill) - set(plain) == {"hill.log_slope", "hill.log_midpoint", "hill.largest_dose"}
    for name, value in plain.items():
        assert torch.equal(value, hill[name])


@pytest.fixture
def dosed(small_screen: AnnData) -> AnnData:
    adata = small_screen.copy()
    rng = np.random.default_rng(0)
    adata.obs["dose"] = rng.choice([0.25, 0.5, 2.0], adata.n_obs)
    adata.obs["split"] = rng.choice(["train", "valid", "test"], adata.n_obs, p=[0.7, 0.15, 0.15])
    first = (adata.obs["perturbation"] == "P001") & (adata.obs["split"] == "train")
    adata.obs.loc[first & (adata.obs["dose"] == 2.0), "dose"] = 0.5
    with_first = adata.obs["perturbation"].astype(str).str.split("+").map(lambda p: "P001" in p and len(p) > 1)
    adata.obs.loc[with_first, "split"] = "test"
    return adata


def trained(model_of: Callable, quiet: dict, adata: AnnData, **arguments: Any) -> pv.SAMSVAE:
    scvi.settings.seed = 0
    model = model_of(adata, {"dosage_key": "dose"}, **({"dose_response": "hill"} | arguments))
    model.train(max_epochs=4, batch_size=64, split_key="split", **quiet)
    return model


def test_largest_doses_are_those_of_the_training_cells(model_of: Callable, quiet: dict, dosed: AnnData) -> None:
    model = trained(model_of, quiet, dosed)
    largest = model.get_dose_response()["largest_dose"]
    assert largest["P001"] == 0.5
    assert (largest.drop("P001") == 2.0).all()
    model.train(max_epochs=1, batch_size=64, train_size=0.9, **quiet)  # more cells, larger doses of P001
    pd.testing.assert_series_equal(model.get_dose_response()["largest_dose"], largest)


def test_units_of_the_dose_do_not_matter(model_of: Callable, quiet: dict, dosed: AnnData) -> None:
    other = dosed.copy()
    other.obs["dose"] *= 64.0
    a, b = (trained(model_of, quiet, d) for d in (dosed, other))
    pd.testing.assert_frame_equal(a.history["objective_validation"], b.history["objective_validation"], rtol=1e-6)
    curves = [m.get_dose_response() for m in (a, b)]
    np.testing.assert_allclose(curves[0]["midpoint"] * 64, curves[1]["midpoint"], rtol=1e-3)
    np.testing.assert_allclose(curves[0]["slope"], curves[1]["slope"], rtol=1e-3)


def test_predictions_and_effects_follow_the_curve(model_of: Callable, quiet: dict, dosed: AnnData) -> None:
    model = trained(model_of, quiet, dosed, gene_likelihood="nb", sparsify="published")
    m = model.module
    with torch.no_grad():
        m.effects.loc.fill_(1.0)
        m.effects.log_sd.fill_(-9.0)
        m.effects.mask_logits.fill_(9.0)
        m.hill.log_slope.fill_(float(np.log(3.0)))
        m.hill.log_midpoint.fill_(float(np.log(0.5)))
    name = model.perturbation_names[2]
    dose = 1.0  # half of the largest: h = (1/8) (9/8) / (1/4)
    share = 0.5625
    rows = pd.DataFrame({name: [dose, 2.0 * share, 2.0, 3.0]}, index=["part", "other", "full", "beyond"])
    torch.testing.assert_close(m.offset(torch.eye(8)[2:3] * dose)[0], share * (m.effects.expected() + m.leak)[2])
    settings: dict[str, Any] = {"n_cells": 40, "output": "mean", "library_size": "observed", "key_added": None}
    predicted = model.predict_perturbation(rows, **settings)
    mean = pd.DataFrame(predicted.layers["mean"], index=predicted.obs["perturbation"].astype(str))
    mean = np.log(mean.groupby(level=0).mean())
    # the same shift, got from the full effect scaled by hand
    kept = m.effects.loc.detach().clone()
    with torch.no_grad():
        m.effects.loc.mul_(share)
    by_hand = model.predict_perturbation(pd.DataFrame({name: [2.0]}, index=["full"]), **settings)
    with torch.no_grad():
        m.effects.loc.copy_(kept)
    by_hand = np.log(pd.DataFrame(by_hand.layers["mean"][by_hand.obs["generated"].astype(bool)]).mean())
    np.testing.assert_allclose(mean.loc["part"], by_hand, atol=2e-3)
    assert np.abs(mean.loc["other"] - by_hand).max() > 5e-3
    # beyond the largest dose the curve goes on to its plateau
    assert np.abs(mean.loc["beyond"] - mean.loc["full"]).max() > 0
    for protocol, samples in (("matched", 20), ("paper", 400)):
        effects = model.get_treatment_effects(
            rows, n_samples=samples, protocol=protocol, space="log1p_cp10k", key_added=None
        ).mean
        assert np.linalg.norm(effects.loc["part"]) < np.linalg.norm(effects.loc["full"])


def test_negative_doses_raise_and_no_dose_is_control(model_of: Callable, quiet: dict, dosed: AnnData) -> None:
    model = trained(model_of, quiet, dosed)
    name = model.perturbation_names[0]
    with pytest.raises(ValueError, match=r"dose -0\.5 of 'P001' in row 'low' is negative"):
        model.predict_perturbation(pd.DataFrame({name: [-0.5]}, index=["low"]))
    none = model.predict_perturbation(pd.DataFrame({name: [0.0]}, index=["none"]), n_cells=20)
    assert (model.adata.uns["samsvae_predictions"]["none"] == 0).all()
    assert none.n_obs == 40


def test_save_and_load(model_of: Callable, quiet: dict, dosed: AnnData, tmp_path: Path) -> None:
    model = trained(model_of, quiet, dosed)
    model.save(tmp_path / "model")
    again = pv.SAMSVAE.load(str(tmp_path / "model"), model.adata, accelerator="cpu")
    assert again.module.hill is not None
    pd.testing.assert_frame_equal(again.get_dose_response(), model.get_dose_response())
    rows = pd.DataFrame({model.perturbation_names[0]: [0.3]}, index=["some"])
    a, b = (m.predict_perturbation(rows, n_cells=30, key_added=None) for m in (model, again))
    np.testing.assert_array_equal(a.X.toarray(), b.X.toarray())


def test_arguments(model_of: Callable, quiet: dict, dosed: AnnData) -> None:
    with pytest.raises(ValueError, match=r"dose_response='hil' is not one of \['linear', 'hill'\]"):
        model_of(dosed, dose_response="hil")
    model = trained(model_of, quiet, dosed, dose_response="linear")
    with pytest.raises(ValueError, match="dose_response='hill'"):
        model.get_dose_response()
