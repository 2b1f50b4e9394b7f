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
    with pytest.raises(ValueError, match=r"dose_response='hil' is not one of \['linear', 'hill', 'categories'\]"):
        model_of(dosed, dose_response="hil")
    model = trained(model_of, quiet, dosed, dose_response="linear")
    with pytest.raises(ValueError, match="dose_response='hill'"):
        model.get_dose_response()
    with pytest.raises(ValueError, match="dose_levels=... needs dose_response='categories'"):
        model_of(dosed, dose_response="hill", dose_levels=[("P001", 0.5)])


# ------------------------------------------------------------------------ doses as categories


def categories(
    model_of: Callable, quiet: dict, adata: AnnData, cls: type = pv.SAMSVAE, train: dict | None = None, **arguments: Any
) -> Any:
    scvi.settings.seed = 0
    adata = adata.copy()
    cls.setup_anndata(adata, perturbation_key="perturbation", control="control", dosage_key="dose")
    model = cls(adata, **({"n_latent": 5, "n_hidden": 16, "dose_response": "categories"} | arguments))
    model.train(**({"max_epochs": 4, "batch_size": 64, "split_key": "split"} | (train or {})), **quiet)
    return model


def test_categories_are_the_doses_of_the_data(model_of: Callable, quiet: dict, dosed: AnnData) -> None:
    """Those of test cells have a place, but are not known."""
    model = categories(model_of, quiet, dosed)
    levels = model.module.levels
    given = [0.25, 0.5, 2.0]
    assert model.init_params_["non_kwargs"]["dose_levels"] == [(p, d) for p in model.perturbation_names for d in given]
    known = {(p, d) for p in model.perturbation_names for d in given} - {("P001", 2.0)}
    table = model.get_dose_response()
    assert set(table.index) == known
    assert table.index.names == ["perturbation", "dose"]
    train = model.adata[model.train_indices].obs
    has = train["perturbation"].astype(str).str.split("+")
    for name, dose in known:
        n = sum(name in labels and d == dose for labels, d in zip(has, train["dose"], strict=True))
        assert table.loc[(name, dose), "n_cells"] == n
        row = torch.zeros(1, 8)
        row[0, model.perturbation_names.index(name)] = dose
        np.testing.assert_allclose(table.loc[(name, dose), "size"], model.module.offset(row).detach().norm(), rtol=1e-4)
    assert int(levels.free.sum()) == len(known)
    # more training cells make the dose known
    model.train(max_epochs=1, batch_size=64, train_size=0.9, **quiet)
    assert ("P001", 2.0) in model.get_dose_response().index


def test_unknown_doses_raise_before_anything_runs(
    model_of: Callable, quiet: dict, dosed: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = categories(model_of, quiet, dosed)
    monkeypatch.setattr(model, "_validate_anndata", lambda *a, **k: pytest.fail("ran"))
    for name in ("predict_perturbation", "get_treatment_effects"):
        ask = getattr(model, name)
        with pytest.raises(ValueError, match=r"'P001' at dose 2 \(in 'high'\).* The nearest: 0\.25, 0\.5\. .*'hill'"):
            ask(pd.DataFrame({"P002": [0.5], "P001": [2.0]}, index=["high"]))
        with pytest.raises(ValueError, match=r"'P002' at dose 1 \(in 'P002'\).*nearest: 0\.25, 0\.5, 2\. .*DataFrame"):
            ask(["P002"])
        with pytest.raises(ValueError, match="not known|unknown|is not"):
            ask(["P999"])


def test_perturbations_without_training_cells_raise(model_of: Callable, quiet: dict, dosed: AnnData) -> None:
    dosed.obs.loc[dosed.obs["perturbation"].astype(str).str.contains("P002"), "split"] = "test"
    model = categories(model_of, quiet, dosed)
    with pytest.raises(ValueError, match="No training cell was given 'P002' \\(in 'low'\\)"):
        model.predict_perturbation(pd.DataFrame({"P002": [0.5]}, index=["low"]))
    assert "P002" not in model.get_treatment_effects(n_samples=3, key_added=None).mean.index.str[:4]


@pytest.mark.parametrize("cls", [pv.SAMSVAE, pv.CPAVAE])
def test_categories_predict_and_are_saved(
    model_of: Callable, quiet: dict, dosed: AnnData, tmp_path: Path, cls: Any
) -> None:
    model = categories(model_of, quiet, dosed, cls)
    rows = pd.DataFrame({"P002": [0.25, 2.0, 0.5], "P003": [0.0, 0.0, 2.0]}, index=["low", "high", "both"])
    again = cls.load(str(_saved(model, tmp_path)), model.adata, accelerator="cpu")
    a, b = (m.predict_perturbation(rows, n_cells=30, key_added=None) for m in (model, again))
    np.testing.assert_array_equal(a.X.toarray(), b.X.toarray())
    assert a.n_obs == 120
    pd.testing.assert_frame_equal(again.get_dose_response(), model.get_dose_response())
    # without data, or with data that have fewer doses, the levels are those of the training
    bare = cls.load(str(tmp_path / "model"), adata=False, accelerator="cpu")
    pd.testing.assert_frame_equal(bare.get_dose_response(), model.get_dose_response())
    few = model.adata[model.adata.obs["dose"] == 0.5].copy()
    other = cls.load(str(tmp_path / "model"), few, accelerator="cpu")
    c = other.predict_perturbation(rows, n_cells=10, key_added=None)
    assert c.n_obs == 40
    # test cells at a dose that is not known are described by the effect of the other doses
    unknown = np.flatnonzero((model.adata.obs["perturbation"] == "P001") & (model.adata.obs["dose"] == 2.0))
    shift = model.get_latent_representation(indices=unknown, kind="perturbation")
    shared = (model.module.effects.expected() + model.module.leak)[0].detach()
    np.testing.assert_allclose(shift, shared.expand(len(unknown), -1), atol=1e-6)
    assert (
        model.get_latent_representation(kind="perturbation")[model.adata.obs["perturbation"] == "control"] == 0
    ).all()


def _saved(model: Any, folder: Path) -> Path:
    model.save(folder / "model")
    return folder / "model"


def test_treatment_effects_name_each_dose_and_their_intervals_hold_its_deviation(
    model_of: Callable, quiet: dict, dosed: AnnData
) -> None:
    dosed.obs.loc[dosed.obs["perturbation"].astype(str).str.contains("P002"), "dose"] = 0.5
    model = categories(model_of, quiet, dosed, pv.CPAVAE, leak_correction=False)
    effects = model.get_treatment_effects(n_samples=5)
    assert list(effects.mean.index[:4]) == ["P001 (0.25)", "P001 (0.5)", "P002", "P003 (0.25)"]
    with torch.no_grad():
        model.module.effects.log_sd.fill_(-6.0)
        model.module.levels.log_sd.fill_(-6.0)
    narrow = model.get_treatment_effects(n_samples=40, key_added=None)
    with torch.no_grad():
        model.module.levels.log_sd.fill_(-1.0)
    wide = model.get_treatment_effects(n_samples=40, key_added=None)
    width = ((wide.upper - wide.lower) / (narrow.upper - narrow.lower)).median(axis=1)
    assert width["P003 (0.25)"] > 20
    np.testing.assert_allclose(width["P002"], 1.0)
    paper = model.get_treatment_effects(n_samples=50, protocol="paper", key_added=None)
    assert list(paper.mean.index) == list(wide.mean.index)


@pytest.mark.parametrize(
    "options",
    [
        {"embedding_inference": "correlated", "n_particles": 2},
        {"embedding_inference": "gated", "sparsify": "published", "global_kl": "plate"},
        {"embedding_inference": "low_rank", "basal_inference": "mean_field"},
        {"objective": "iwae", "n_particles": 3, "mask_gradient": "identity"},
        {"basal_posterior": "flow", "mask_hyperprior": "perturbation"},
        {"gene_likelihood": "normal"},
    ],
)
def test_categories_with_other_options(model_of: Callable, quiet: dict, dosed: AnnData, options: dict) -> None:
    model = categories(model_of, quiet, dosed, **options)
    assert (model.module.levels.loc != 0).any()
    table = model.get_dose_response()
    assert np.isfinite(table).all(axis=None)
    assert np.isfinite(model.get_marginal_ll(n_mc_samples=4))
    assert np.isfinite(model.get_elbo())
    assert np.isfinite(model.get_perturbation_programs().effects).all(axis=None)
    model.predict_perturbation(pd.DataFrame({"P002": [0.25]}, index=["low"]), n_cells=5)
    assert np.isfinite(model.adata.uns["samsvae_predictions"]).all(axis=None)


def test_numbers_of_categories_do_not_matter(model_of: Callable, quiet: dict, dosed: AnnData) -> None:
    other = dosed.copy()
    other.obs["dose"] = other.obs["dose"].map({0.25: 7.0, 0.5: 9.5, 2.0: 1000.0})
    a, b = (categories(model_of, quiet, d) for d in (dosed, other))
    for name, value in a.module.state_dict().items():
        if name != "levels.dose":
            assert torch.equal(value, b.module.state_dict()[name]), name


def test_categories_without_data(model_of: Callable, quiet: dict, dosed: AnnData) -> None:
    model = model_of(dosed, {"dosage_key": "dose"}, dose_response="categories")
    registry = model.adata_manager.registry
    with pytest.raises(ValueError, match=r"without data needs dose_levels=\[\(perturbation, dose\)"):
        pv.SAMSVAE(registry=registry, dose_response="categories")
    made = pv.SAMSVAE(registry=registry, dose_response="categories", dose_levels=[("P002", 0.1), ("P002", 3)])
    assert made.module.levels.levels() == [(1, float(np.float32(0.1))), (1, 3.0)]
    with pytest.raises(ValueError, match="'P02' is not a registered perturbation. Did you mean 'P002'"):
        model_of(dosed, {"dosage_key": "dose"}, dose_response="categories", dose_levels=[("P02", 1.0)])
    with pytest.raises(ValueError, match=r"dose -1\.0 of 'P002' is not positive"):
        model_of(dosed, {"dosage_key": "dose"}, dose_response="categories", dose_levels=[("P002", -1.0)])
    with pytest.raises(ValueError, match="dose_deviation_scale=0 is not positive"):
        model_of(dosed, {"dosage_key": "dose"}, dose_response="categories", dose_deviation_scale=0)


def test_continuous_doses_warn(model_of: Callable, dosed: AnnData) -> None:
    dosed.obs["dose"] = np.random.default_rng(0).uniform(0.1, 1.0, dosed.n_obs)
    with pytest.warns(UserWarning, match=r"has \d+ doses, and dose_response='categories' learns an effect of each"):
        model_of(dosed, {"dosage_key": "dose"}, dose_response="categories")
