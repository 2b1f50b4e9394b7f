"""Latents, programs, treatment effects, likelihoods: shapes, keys, values that must hold for every model."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from pertvae._storage import read_tables

from ._screens import COMPONENTS, CONTROL, dense, fit, screen

GENES = [f"gene{j}" for j in range(30)]


def state():
    """Return the global random states."""
    return torch.get_rng_state().numpy().copy(), np.random.get_state()[1].copy()  # noqa: NPY002


def test_latents_are_returned_and_written(case, trained):
    adata = trained.adata
    control = (adata.obs["perturbation"].astype(str) == CONTROL).to_numpy()
    for kind in case.cls.capabilities.latent_kinds:
        z = trained.get_latent_representation(kind=kind)
        assert z.dtype == np.float32
        assert z.shape[0] == adata.n_obs
        assert z.shape[1] >= 1
        assert np.isfinite(z).all()
        key = f"X_{case.name}" if kind == "full" else f"X_{case.name}_{kind}"
        np.testing.assert_array_equal(adata.obsm[key], z)
        if kind in ("perturbation", "responsive"):
            assert (z[control] == 0).all()
            assert (z[~control] != 0).any()
            for _, rows in adata.obs.groupby("_scvi_condition", observed=True).indices.items():
                np.testing.assert_allclose(z[rows], z[rows[:1]].repeat(len(rows), 0), atol=1e-6)
    assert len(adata.obsm) == 1 + len(case.cls.capabilities.latent_kinds)


def test_latents_of_some_cells(case, trained):
    z = trained.get_latent_representation(key_added=None)
    rows = np.array([5, 3, 100, 3])
    np.testing.assert_array_equal(trained.get_latent_representation(indices=rows), z[rows])
    mask = np.zeros(len(z), bool)
    mask[[7, 9]] = True
    np.testing.assert_array_equal(trained.get_latent_representation(indices=mask), z[[7, 9]])
    assert trained.get_latent_representation(indices=[]).shape == (0, z.shape[1])
    assert not [k for k in trained.adata.obsm if k.startswith("X_")]
    trained.get_latent_representation(key_added="mine")
    assert "mine" in trained.adata.obsm
    with pytest.raises(ValueError, match="from 0 to 119"):
        trained.get_latent_representation(indices=[120])
    with pytest.raises(ValueError, match="120 cells"):
        trained.get_latent_representation(indices=np.array([True, False]))


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_latents_do_not_depend_on_batch_size(trained, batch_size):
    np.testing.assert_array_equal(
        trained.get_latent_representation(batch_size=batch_size), trained.get_latent_representation()
    )


def test_draws_of_latents_are_seeded(trained):
    first = trained.get_latent_representation(give_mean=False, seed=1, key_added=None)
    np.testing.assert_array_equal(
        trained.get_latent_representation(give_mean=False, seed=1, key_added=None, batch_size=5), first
    )
    assert not np.array_equal(trained.get_latent_representation(give_mean=False, seed=2, key_added=None), first)
    assert not np.array_equal(trained.get_latent_representation(key_added=None), first)


def test_unknown_kind_names_the_kinds(case, trained):
    with pytest.raises(ValueError, match=r"kind='latent'.*full"):
        trained.get_latent_representation(kind="latent")


def test_programs(case, trained):
    programs = trained.get_perturbation_programs()
    names = list(programs.effects.columns)
    assert list(programs.effects.index) == COMPONENTS
    assert list(programs.inclusion.index) == COMPONENTS
    assert list(programs.inclusion.columns) == names
    assert list(programs.loadings.index) == names
    assert list(programs.loadings.columns) == GENES
    assert programs.inclusion.to_numpy().min() >= 0
    assert programs.inclusion.to_numpy().max() <= 1
    assert np.isfinite(programs.effects.to_numpy()).all()
    assert np.abs(programs.loadings.to_numpy()).max() > 0
    stored = trained.adata.uns[f"{case.name}_programs"]
    assert list(stored["loadings"].index) == GENES  # genes are rows in storage
    for name, table in read_tables(trained.adata.uns, f"{case.name}_programs").items():
        pd.testing.assert_frame_equal(table, getattr(programs, name), check_index_type=False, check_column_type=False)
    del trained.adata.uns[f"{case.name}_programs"]
    trained.get_perturbation_programs(key_added=None)
    assert not [k for k in trained.adata.uns if not k.startswith("_scvi")]
    trained.get_perturbation_programs(key_added="mine")
    assert set(read_tables(trained.adata.uns, "mine")) == {"effects", "inclusion", "loadings", "library"}


def test_programs_hold_the_effects_on_total_counts(trained):
    library = trained.get_perturbation_programs().library
    assert library is not None
    assert list(library.index) == COMPONENTS
    totals = []
    for choice in ("observed", "predicted"):
        predicted = trained.predict_perturbation("A", library_size=choice, key_added=None)
        totals.append(predicted[predicted.obs["generated"].to_numpy()].layers["mean"].sum())
    assert library.loc["A", "log2_fold_change"] == pytest.approx(np.log2(totals[1] / totals[0]), rel=1e-3, abs=1e-4)


def test_real_values_have_no_total_counts(case):
    if "normal" not in case.likelihoods:
        pytest.skip("counts only")
    adata = screen()
    adata.X = np.log1p(adata.X.toarray())
    kwargs, setup = case.kwargs | {"gene_likelihood": "normal"}, case.setup | {"is_count_data": False}
    model = fit(replace(case, kwargs=kwargs, setup=setup), adata, max_epochs=1)
    assert model.get_perturbation_programs().library is None
    assert set(read_tables(adata.uns, f"{case.name}_programs")) == {"effects", "inclusion", "loadings"}


def test_treatment_effects(case, trained):
    if not case.cls.capabilities.credible_effects:
        with pytest.raises(ValueError, match=rf"{case.cls.__name__}.*predict_perturbation"):
            trained.get_treatment_effects()
        return
    effects = trained.get_treatment_effects(n_samples=20)
    for table in (effects.mean, effects.lower, effects.upper):
        assert list(table.index) == COMPONENTS
        assert list(table.columns) == GENES
        assert np.isfinite(table.to_numpy()).all()
    assert (effects.lower <= effects.upper).to_numpy().all()
    assert (effects.lower < effects.upper).to_numpy().any()
    for name, table in read_tables(trained.adata.uns, f"{case.name}_effects").items():
        pd.testing.assert_frame_equal(table, getattr(effects, name), check_index_type=False, check_column_type=False)
    # the other labels asked for, and their order, do not matter; canonical spelling does not either
    some = trained.get_treatment_effects(["B+A", CONTROL, "B"], n_samples=20, key_added=None)
    pd.testing.assert_series_equal(some.mean.loc["B"], effects.mean.loc["B"])
    again = trained.get_treatment_effects(["A+B"], n_samples=20, key_added=None)
    np.testing.assert_array_equal(again.lower.loc["A+B"], some.lower.loc["B+A"])
    assert (some.upper.loc[CONTROL] == 0).all()
    narrow = trained.get_treatment_effects(["B"], n_samples=20, credible=0.5, key_added=None)
    assert (narrow.lower.to_numpy() >= effects.lower.loc[["B"]].to_numpy()).all()
    doses = pd.DataFrame({"A": [0.0, 2.0]}, index=["none", "twice"])
    dosed = trained.get_treatment_effects(doses, n_samples=20, space="log2_fold_change", key_added=None)
    assert (dosed.mean.loc["none"] == 0).all()
    assert (dosed.mean.loc["twice"] != 0).any()
    for wrong in ({"space": "counts"}, {"credible": 1.0}, {"protocol": "other"}, {"perturbations": "Z"}):
        with pytest.raises(ValueError, match=repr(next(iter(wrong.values())))):
            trained.get_treatment_effects(**wrong)


def test_treatment_effects_in_the_protocol_of_the_paper(case, trained):
    before = state()
    effects = trained.get_treatment_effects(["A", "B+A", CONTROL], protocol="paper", n_samples=40)
    for ours, theirs in zip(state(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (effects.lower.loc["A"] < effects.mean.loc["A"]).any()
    assert (effects.mean.loc[CONTROL] == 0).all()
    alone = trained.get_treatment_effects("A+B", protocol="paper", n_samples=40, key_added=None)
    np.testing.assert_array_equal(alone.mean.loc["A+B"], effects.mean.loc["B+A"])
    stored = read_tables(trained.adata.uns, f"{case.name}_effects")
    pd.testing.assert_frame_equal(stored["mean"], effects.mean, check_index_type=False, check_column_type=False)


def test_marginal_likelihood(case, trained):
    if not case.cls.capabilities.marginal_ll:
        with pytest.raises(ValueError, match=case.cls.__name__):
            trained.get_marginal_ll()
        return
    cells = trained.get_marginal_ll(n_mc_samples=12, return_mean=False)
    assert cells.shape == (trained.adata.n_obs,)
    assert torch.isfinite(cells).all()
    assert (cells < 0).all()
    mean = trained.get_marginal_ll(n_mc_samples=12, batch_size=9)
    assert isinstance(mean, float)
    assert mean == pytest.approx(float(cells.mean()), rel=1e-6)
    few = trained.get_marginal_ll(n_mc_samples=1)
    assert trained.get_marginal_ll(n_mc_samples=200) > few  # the bound tightens
    assert trained.get_marginal_ll(indices=[1, 4], n_mc_samples=2, return_mean=False).shape == (2,)


def test_scvi_tools_getters(trained):
    adata = trained.adata
    assert np.isfinite(trained.get_elbo())
    assert np.isfinite(trained.get_elbo(indices=[0, 1, 2]))
    expression = trained.get_normalized_expression(library_size=1, n_samples=2)
    assert expression.shape == adata.shape
    assert list(expression.columns) == GENES
    assert (expression.to_numpy() >= 0).all()
    np.testing.assert_allclose(expression.sum(axis=1), 1.0, rtol=1e-4)
    some = trained.get_normalized_expression(indices=[2, 5], gene_list=["gene3"], transform_batch="b1")
    assert some.shape == (2, 1)
    table = trained.differential_expression(groupby="perturbation", group1="A", group2=CONTROL, silent=True)
    assert set(table.index) == set(GENES)
    assert np.isfinite(table["bayes_factor"]).all()


def test_history_has_the_objective(trained):
    assert {"elbo_train", "objective_train", "objective_validation", "kl_local_train"} <= set(trained.history)
    assert np.isfinite(trained.history["objective_validation"].astype(float).to_numpy()).all()


def test_getters_leave_the_global_random_state_alone(case, trained):
    calls = {
        "latent": lambda: trained.get_latent_representation(give_mean=False),
        "programs": trained.get_perturbation_programs,
        "predict": lambda: trained.predict_perturbation(["A", "B+C/2"], n_cells=60),
    }
    if "prior" in case.cls.capabilities.basal:
        calls["prior"] = lambda: trained.predict_perturbation("A", basal="prior")
    if case.cls.capabilities.credible_effects:
        calls["effects"] = lambda: trained.get_treatment_effects(n_samples=3)
    if case.cls.capabilities.marginal_ll:
        calls["marginal"] = lambda: trained.get_marginal_ll(n_mc_samples=2)
    for name, call in calls.items():
        before = state()
        call()
        for ours, theirs in zip(state(), before, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.mark.parametrize("n_genes", [30, 5000])
def test_everything_written_survives_h5ad(case, trained, n_genes, tmp_path):
    if n_genes == 30:
        model = trained
    else:
        model = fit(case, screen(n_genes, {CONTROL: 20, "A": 20, "C/2": 20}), max_epochs=1)
    adata = model.adata
    latents = {k: model.get_latent_representation(kind=k) for k in case.cls.capabilities.latent_kinds}
    programs = model.get_perturbation_programs()
    predicted = model.predict_perturbation(["A", "C/2", "C/2+A"], n_cells=10)
    effects = model.get_treatment_effects(n_samples=3) if case.cls.capabilities.credible_effects else None
    adata.write_h5ad(tmp_path / "screen.h5ad")
    predicted.write_h5ad(tmp_path / "predicted.h5ad")
    again, predicted_again = ad.read_h5ad(tmp_path / "screen.h5ad"), ad.read_h5ad(tmp_path / "predicted.h5ad")
    for kind, z in latents.items():
        np.testing.assert_array_equal(again.obsm[f"X_{case.name}" + ("" if kind == "full" else f"_{kind}")], z)
    tables = {f"{case.name}_programs": programs, **({f"{case.name}_effects": effects} if effects else {})}
    for key, value in tables.items():
        for name, table in read_tables(again.uns, key).items():
            expected = getattr(value, name)
            assert list(table.index) == list(expected.index)
            assert list(table.columns) == list(expected.columns)
            np.testing.assert_array_equal(table.to_numpy(), expected.to_numpy())
    for uns in (again.uns, predicted_again.uns):
        names = uns[f"{case.name}_predictions_names"]["name"].astype(str).tolist()
        assert names == ["A", "C/2", "C/2+A"]
        np.testing.assert_array_equal(
            uns[f"{case.name}_predictions"].to_numpy(), predicted.uns[f"{case.name}_predictions"].to_numpy()
        )
    np.testing.assert_array_equal(dense(predicted_again.X), dense(predicted.X))
    np.testing.assert_array_equal(predicted_again.layers["mean"], predicted.layers["mean"])
    assert predicted_again.obs["perturbation"].astype(str).tolist() == predicted.obs["perturbation"].tolist()
    assert predicted_again.uns["pertvae"]["model"] == case.cls.__name__
    assert predicted_again.uns["pertvae"]["settings"]["n_cells"] == 10
    assert list(again.obs["_scvi_condition"].astype(str)) == list(adata.obs["_scvi_condition"].astype(str))
