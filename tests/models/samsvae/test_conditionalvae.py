"""Conditional VAE: what encoder and decoder read, what a prediction swaps, what programs are read from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

import pertvae as pv
from pertvae.models.base import ModuleShape
from pertvae.models.samsvae import ConditionalVAEModule

GENES, LATENT, HIDDEN = 10, 4, 8
DOSES = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [2, 0, 0], [0, 0.5, 3]]).float()
N = len(DOSES)


def module(**settings: Any) -> ConditionalVAEModule:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "n_latent": LATENT,
        "n_hidden": HIDDEN,
        "n_layers": 1,
        "n_particles": 1,
        "gene_likelihood": "nb",
    }
    made = ConditionalVAEModule(ModuleShape(GENES, 3, n_batch=3), **(arguments | settings))
    with torch.no_grad():
        made.encoder_doses.normal_()
        made.decoder_doses.normal_()
    return made


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((N, GENES), 5.0), generator=g)
    return {"x": x, "doses": DOSES, "batch_index": torch.arange(N)[:, None].float() % 3}


def build(adata: AnnData, setup: dict[str, Any] | None = None, **arguments: Any) -> pv.ConditionalVAE:
    adata = adata.copy()
    pv.ConditionalVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", **(setup or {}))
    return pv.ConditionalVAE(adata, **({"n_latent": 5, "n_hidden": 16} | arguments))


def test_doses_enter_the_first_layers_linearly(batch: dict) -> None:
    """With first layers that stay positive all is linear: effects of components add up and scale with the dose."""
    model = module().double()
    x, covariates = batch["x"].double(), torch.eye(N)[:, :3].double()
    with torch.no_grad():
        model.encoder.first.bias.fill_(100.0)
        model.decoder.mlp.first.bias.fill_(100.0)
        z, size = torch.randn(N, LATENT).double(), torch.ones(N, 1).double()

        def encoded(doses: torch.Tensor) -> torch.Tensor:
            return model.encode(x, doses.double(), covariates)[0]

        def decoded(doses: torch.Tensor) -> torch.Tensor:
            scores = model.decode(z, doses.double(), covariates, size).scale.log()
            return scores - scores.mean(1, keepdim=True)

        zero, a, b = torch.zeros(N, 3), torch.eye(3)[[0]].expand(N, 3), torch.eye(3)[[1]].expand(N, 3)
        for read in (encoded, decoded):
            nothing = read(zero)
            first, second = read(a) - nothing, read(b) - nothing
            assert first.abs().min() > 1e-6
            torch.testing.assert_close(read(a + b) - nothing, first + second, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(read(2.5 * a) - nothing, 2.5 * first, rtol=1e-6, atol=1e-8)


def test_one_row_of_doses_serves_all_cells() -> None:
    model = module()
    z, covariates, size = torch.randn(7, N, LATENT), torch.eye(N)[:, :3], torch.full((N, 1), 100.0)
    with torch.no_grad():
        one = model.decode(z, DOSES[3:4], covariates, size).mean
        all_ = model.decode(z, DOSES[3:4].repeat(N, 1), covariates, size).mean
    torch.testing.assert_close(one, all_)


def test_the_encoder_runs_once_for_all_particles(batch: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = module(n_particles=5)
    calls = []
    forward = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda *a, **k: calls.append(a[0].shape) or forward(*a, **k))
    out = model.inference(**batch)
    assert calls == [torch.Size([N, GENES])]
    assert out["z"].shape == (5, N, LATENT)
    assert len(out["z"][:, 0, 0].unique()) == 5
    assert torch.equal(out["basal_mean"][0], out["basal_mean"][4])
    assert torch.equal(out["z"], out["z_basal"])  # no shift: the perturbation acts in the decoder


def test_every_parameter_learns_but_what_is_found_later(batch: dict) -> None:
    model = module(n_particles=2)
    tensors = {"X": batch["x"], "perturbation": DOSES, "batch": batch["batch_index"]}
    _, _, out = model(tensors, loss_kwargs={"n_obs": N})
    out.loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("posterior_"), name
    assert out.kl_global_sum == 0


def test_a_component_without_cells_has_no_effect(small_screen: AnnData, quiet: dict) -> None:
    adata = small_screen.copy()
    adata.obs["split"] = np.where(adata.obs["perturbation"].str.contains("P003"), "test", "train")
    model = build(adata)
    model.train(max_epochs=3, split_key="split", **quiet)
    unseen = model.perturbation_names.index("P003")
    assert (model.module.decoder_doses[unseen] == 0).all()
    assert (model.module.decoder_doses.abs().sum(1) > 0).sum() == 7
    predicted = model.predict_perturbation(["P003", "control"], n_cells=20, output="mean", library_size="observed")
    rows = {p: (predicted.obs["perturbation"] == p) & predicted.obs["generated"] for p in ("P003", "control")}
    np.testing.assert_array_equal(predicted.X[rows["P003"]], predicted.X[rows["control"]])


def test_prediction_encodes_under_the_own_label_and_swaps_the_dose(small_screen: AnnData, quiet: dict) -> None:
    model = build(small_screen, {"batch_key": "batch"})
    model.train(max_epochs=5, **quiet)
    m = model.module
    with torch.no_grad():
        m.head.log_variance.weight.zero_()
        m.head.log_variance.bias.fill_(-30.0)  # sd 0.01
    names = model.perturbation_names
    rows = np.flatnonzero(model.adata.obs["perturbation"] == "P002")[:6]
    doses = pd.DataFrame({"P001": [1.0, 0.0], "P004": [0.5, 0.0]}, index=["target", "none"])
    predicted = model.predict_perturbation(doses, indices=rows, output="mean", library_size="observed")
    x = torch.as_tensor(model.adata.X[rows].toarray())
    batches = torch.nn.functional.one_hot(torch.as_tensor(model.adata.obs["_scvi_batch"].to_numpy()[rows]).long(), 2)
    own, target = torch.zeros(6, len(names)), torch.zeros(6, len(names))
    own[:, names.index("P002")] = 1.0
    target[:, names.index("P001")], target[:, names.index("P004")] = 1.0, 0.5
    with torch.no_grad():
        z, _ = m.encode(x, own, batches.float())
        for label, d in (("target", target), ("none", torch.zeros_like(own))):
            expected = m.decode(z, d, batches.float(), x.sum(1, keepdim=True)).mean.numpy()
            made = predicted[(predicted.obs["perturbation"] == label) & predicted.obs["generated"]]
            np.testing.assert_allclose(made.X, expected, rtol=0.1, atol=0.05)
    # the other dose is another prediction by more than that
    assert np.abs(predicted.X[:6] - predicted.X[6:12]).max() > 0.3


def test_programs_are_the_shifts_of_the_training_cells(small_screen: AnnData, quiet: dict) -> None:
    adata = small_screen[~small_screen.obs["perturbation"].str.contains("+", regex=False)].copy()
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 4 == 0, "test", "train")
    model = build(adata)
    model.train(max_epochs=30, split_key="split", batch_size=64, **quiet)
    z = model.get_latent_representation(key_added=None)
    train = np.zeros(adata.n_obs, bool)
    train[model.train_indices] = True
    label = adata.obs["perturbation"].to_numpy()
    programs = model.get_perturbation_programs(key_added=None)
    control = z[train & (label == "control")].mean(0)
    for name in model.perturbation_names:
        expected = z[train & (label == name)].mean(0) - control
        np.testing.assert_allclose(programs.effects.loc[name], expected, atol=1e-4)
        shift = model.get_latent_representation(kind="perturbation", key_added=None)[label == name]
        np.testing.assert_allclose(shift, programs.effects.loc[[name]].to_numpy().repeat(len(shift), 0), atol=1e-6)
    basal = model.get_latent_representation(kind="basal", key_added=None)
    np.testing.assert_allclose(
        basal, z - model.get_latent_representation(kind="perturbation", key_added=None), atol=1e-6
    )
    assert ((programs.inclusion >= 0) & (programs.inclusion <= 1)).all(axis=None)


def test_programs_see_what_the_decoder_was_not_told(quiet: dict) -> None:
    """With doses that cannot learn, the posterior carries the perturbations, and the programs say so."""
    adata = pv.datasets.simulate_screen(
        n_genes=60, n_perturbations=6, n_doubles=0, cells_per_perturbation=60, n_controls=150, n_latent=4, n_oracle=10
    )
    size = {}
    for name, frozen in (("told", False), ("not told", True)):
        model = build(adata)
        for table in (model.module.encoder_doses, model.module.decoder_doses):
            table.requires_grad_(not frozen)
        model.train(max_epochs=60, batch_size=128, early_stopping=False, plan_kwargs={"lr": 3e-3}, **quiet)
        programs = model.get_perturbation_programs(key_added=None)
        size[name] = float(np.linalg.norm(programs.effects))
        if frozen:
            assert (programs.inclusion > 0.95).any(axis=1).all()
    assert size["told"] < 0.5 * size["not told"]


def test_train_has_the_signature_of_the_others() -> None:
    assert inspect.signature(pv.ConditionalVAE.train) == inspect.signature(pv.SAMSVAE.train)
    assert pv.ConditionalVAE.train.__doc__ == pv.SAMSVAE.train.__doc__


@pytest.mark.parametrize(
    "argument", [{"n_latent": 0}, {"n_particles": 0}, {"n_layers": 0}, {"gene_likelihood": "zinb"}]
)
def test_arguments_not_accepted(small_screen: AnnData, argument: dict, model_of: Callable) -> None:
    name, value = next(iter(argument.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        build(small_screen, **argument)
