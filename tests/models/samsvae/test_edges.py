"""Data at the edge of what a screen can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData

import pertvae as pv


def finite(model: pv.SAMSVAE) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.module.state_dict().values())


def train(model: pv.SAMSVAE, quiet: dict, **kwargs: object) -> pv.SAMSVAE:
    model.train(**({"max_epochs": 2, "batch_size": 64} | quiet | kwargs))
    return model


def test_silent_genes_and_empty_cells(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    adata = small_screen.copy()
    x = adata.X.toarray()
    x[:, 3] = 0.0  # a gene without variance, at zero
    x[:, 4] = 2.0  # and one above it
    x[[0, 7, 200]] = 0.0
    adata.X = sp.csr_matrix(x)
    model = train(model_of(adata, setup={"batch_key": "batch"}), quiet)
    assert finite(model)
    assert float(model.module.input_sd[3]) == 1.0
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.get_marginal_ll(n_mc_samples=3))
    predicted = model.predict_perturbation(["P001"], n_cells=20)
    assert np.isfinite(predicted.X.toarray()).all()
    # an empty source cell stays empty in expectation, but for the floor of the mean
    empty = model.predict_perturbation(["P001"], indices=[0], library_size="observed")
    assert empty.layers["mean"][0].sum() < 60 * 1e-4 + 1e-3


def test_single_control(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    control = np.flatnonzero(small_screen.obs["perturbation"] == "control")
    adata = small_screen[np.setdiff1d(np.arange(small_screen.n_obs), control[1:])].copy()
    model = train(model_of(adata), quiet)
    predicted = model.predict_perturbation(["P002"], n_cells=5)
    generated = predicted.obs["generated"]
    assert generated.sum() == 5
    assert (~generated).sum() == 1
    assert finite(model)


def test_single_perturbation(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    adata = small_screen[small_screen.obs["perturbation"].isin(["control", "P001"])].copy()
    for embedding in ("mean_field", "correlated"):
        model = train(model_of(adata, embedding_inference=embedding), quiet)
        assert model.perturbation_names == ["P001"]
        assert model.get_masks().shape == (1, 5)
        assert finite(model)
        assert model.predict_perturbation("P001", n_cells=5).obs["generated"].sum() == 5


def test_unseen_combination_is_the_sum_of_its_components(
    small_screen: AnnData, model_of: Callable, quiet: dict
) -> None:
    model = train(model_of(small_screen), quiet)
    seen = set(small_screen.obs["perturbation"].astype(str))
    unseen = next(f"P00{i}+P00{j}" for i in range(1, 9) for j in range(i + 1, 9) if f"P00{i}+P00{j}" not in seen)
    predicted = model.predict_perturbation([unseen], n_cells=10)
    assert set(predicted.obs.loc[predicted.obs["generated"], "perturbation"]) == {unseen}
    a, b = (model.perturbation_names.index(c) for c in unseen.split("+"))
    effects = model.get_perturbation_programs(key_added=None).effects.to_numpy() + model.module.leak.numpy()
    doses = torch.zeros(1, 8)
    doses[0, [a, b]] = 1.0
    shift = model.module.offset(doses).detach().numpy()[0]
    np.testing.assert_allclose(shift, effects[a] + effects[b], rtol=1e-5, atol=1e-6)


def test_unseen_single_is_refused_or_ignored(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    model = train(model_of(small_screen), quiet)
    with pytest.raises(ValueError, match=r"P099"):
        model.predict_perturbation(["P099"])
    with pytest.warns(UserWarning, match="P099"):
        ignored = model.predict_perturbation(["P099", "control"], n_cells=30, unseen="ignore")
    label, mean = ignored.obs["perturbation"].to_numpy(), np.asarray(ignored.layers["mean"])
    generated = ignored.obs["generated"].to_numpy(dtype=bool)
    np.testing.assert_array_equal(mean[generated & (label == "P099")], mean[generated & (label == "control")])
    assert "P099" in list(ignored.uns["pertvae"]["unknown"])


def test_save_and_load_are_equal_to_the_bit(
    small_screen: AnnData, model_of: Callable, quiet: dict, tmp_path: Path
) -> None:
    model = train(model_of(small_screen, setup={"batch_key": "batch"}), quiet)
    model.save(str(tmp_path / "model"))
    loaded = pv.SAMSVAE.load(str(tmp_path / "model"), model.adata)
    state, again = model.module.state_dict(), loaded.module.state_dict()
    assert set(state) == set(again)
    assert {"input_mean", "input_sd", "cells_per_component"} <= set(state)
    for name, value in state.items():
        assert torch.equal(value, again[name]), name
    assert loaded.library_effects_ is not None
    np.testing.assert_array_equal(loaded.library_effects_.effects, model.library_effects_.effects)
    a, b = (m.predict_perturbation(["P001+P002"], n_cells=10) for m in (model, loaded))
    assert (a.X != b.X).nnz == 0
    assert model.get_marginal_ll(n_mc_samples=3) == loaded.get_marginal_ll(n_mc_samples=3)
    np.testing.assert_array_equal(model.get_latent_representation(), loaded.get_latent_representation())


@pytest.mark.parametrize("kind", ["dense", "csr", "csc", "csr_array"])
def test_storage_of_counts_does_not_matter(small_screen: AnnData, model_of: Callable, quiet: dict, kind: str) -> None:
    dense = small_screen.X.toarray()
    convert = {"dense": np.asarray, "csr": sp.csr_matrix, "csc": sp.csc_matrix, "csr_array": sp.csr_array}
    results = []
    for x in (sp.csr_matrix(dense), convert[kind](dense)):
        scvi.settings.seed = 0
        adata = small_screen.copy()
        adata.X = x
        results.append(train(model_of(adata), quiet))
    for (name, value), other in zip(
        results[0].module.state_dict().items(), results[1].module.state_dict().values(), strict=True
    ):
        # buffers are summed in another order
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)


def test_unknown_design_column_is_named(small_screen: AnnData, quiet: dict) -> None:
    adata = small_screen.copy()
    labels = adata.obs["perturbation"].astype(str)
    names = [f"P00{i}" for i in range(1, 9)]
    design = pd.DataFrame({n: labels.str.contains(n).astype(float) for n in names}, index=adata.obs_names)
    adata.obsm["design"] = design
    pv.SAMSVAE.setup_anndata(adata, perturbation_obsm_key="design")
    model = train(pv.SAMSVAE(adata, n_latent=4, n_hidden=16), quiet)
    query = AnnData(adata.X[:20], var=adata.var, obs=adata.obs[["perturbation"]].iloc[:20])
    query.obsm["design"] = design.iloc[:20].assign(P999=[1.0] + [0.0] * 19)
    before = set(query.obsm)
    with pytest.raises(ValueError, match="P999"):
        model.get_latent_representation(query)
    assert set(query.obsm) == before
    query.obsm["design"] = design.iloc[:20]
    np.testing.assert_allclose(
        model.get_latent_representation(query), model.get_latent_representation()[:20], rtol=1e-4, atol=1e-5
    )


def test_a_training_set_smaller_than_a_batch(small_screen: AnnData, model_of: Callable, quiet: dict) -> None:
    adata = small_screen[::8].copy()
    model = train(model_of(adata), quiet, batch_size=512)
    assert finite(model)
    assert len(model.history["train_loss"]) == 2
