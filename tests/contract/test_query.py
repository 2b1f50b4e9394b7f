"""Data the model was not trained on: without controls, unseen combinations, other genes, other batches."""

import numpy as np
import pandas as pd
import pytest

from pertvae._predictions import predicted_shifts

from ._screens import CONTROL, UNSEEN, assert_same, block, dense, fit, frozen, screen


@pytest.fixture
def query():
    """Other cells of the same screen, without controls, with an unseen combination."""
    adata = screen(labels={"A": 6, UNSEEN: 5, "C/2": 4}, seed=1)
    adata.obs_names = [f"query{i}" for i in range(adata.n_obs)]
    return adata


def test_query_data_without_controls(case, trained, query):
    z = trained.get_latent_representation(query)
    assert z.shape[0] == query.n_obs
    np.testing.assert_array_equal(query.obsm[f"X_{case.name}"], z)
    assert not [k for k in trained.adata.obsm if k.startswith("X_")]  # written where the data came from
    conditions = query.obs["_scvi_condition"].astype(str)
    assert set(conditions) == {"A", UNSEEN, "C/2"}
    assert np.isfinite(trained.get_elbo(query))
    with pytest.raises(ValueError, match="no control cells.*indices"):
        trained.predict_perturbation("B", adata=query)
    with pytest.raises(ValueError, match="no control cells"):
        trained.get_perturbation_programs(query)
    predicted = trained.predict_perturbation("B", adata=query, indices=np.arange(4))
    assert block(predicted, "B").index.tolist() == query.obs_names[:4].tolist()
    assert f"{case.name}_predictions" in query.uns
    assert f"{case.name}_predictions" not in trained.adata.uns
    counts = dense(predicted[~predicted.obs["generated"].to_numpy()].X)
    np.testing.assert_array_equal(counts, dense(query.X)[:4])


def test_query_data_few_cells_warn_nothing(trained, query, recwarn):
    trained.get_latent_representation(query)
    assert not [w for w in recwarn if "fewer than" in str(w.message)]


def test_a_cell_is_predicted_alike_wherever_it_stands(trained):
    """The same cells, in another order in other data, under the same names."""
    base = trained.predict_perturbation(["A", UNSEEN], library_size="observed")
    controls = np.flatnonzero(trained.adata.obs["perturbation"].astype(str) == CONTROL)
    # the registration of the copy goes through a transfer: drop the one of the original
    original = screen()
    assert list(original.obs_names) == list(trained.adata.obs_names)
    copy = original[np.random.default_rng(0).permutation(controls)[:25]].copy()
    other = trained.predict_perturbation([UNSEEN, "A"], adata=copy, library_size="observed")
    for label in ("A", UNSEEN):
        expected = block(base, label).loc[copy.obs_names]
        pd.testing.assert_frame_equal(block(other, label), expected, check_names=False)
    np.testing.assert_array_equal(
        trained.get_latent_representation(copy),
        trained.get_latent_representation(indices=trained.adata.obs_names.get_indexer(copy.obs_names)),
    )


def test_unknown_component_in_query(trained, query):
    query.obs["perturbation"] = query.obs["perturbation"].astype(str).replace({UNSEEN: "B+C/3"})
    before = frozen(query)
    with pytest.raises(ValueError, match=r"'C/3' \(in 'B\+C/3'\).*'C/2'"):
        trained.get_latent_representation(query)
    assert_same(query, before)


def test_missing_genes_in_query(trained, query):
    few = query[:, [0, 1, *range(4, 30)]].copy()
    before = frozen(few)
    with pytest.raises(ValueError, match=r"2 of the 30 genes.*'gene2'"):
        trained.get_latent_representation(few)
    assert_same(few, before)


def test_shuffled_genes_in_query(trained, query):
    shuffled = query[:, ::-1].copy()
    before = frozen(shuffled)
    with pytest.raises(ValueError, match="order"):
        trained.predict_perturbation("A", adata=shuffled, indices=[0])
    assert_same(shuffled, before)
    mended = shuffled[:, trained.get_var_names()].copy()
    np.testing.assert_array_equal(trained.get_latent_representation(mended), trained.get_latent_representation(query))


@pytest.mark.parametrize(("column", "key"), [("batch", "batch_key"), ("cell_type", "labels_key")])
def test_unseen_category_in_query(trained, query, column, key):
    query.obs[column] = query.obs[column].astype(str)
    query.obs.iloc[3, query.obs.columns.get_loc(column)] = "new7"
    before = frozen(query)
    with pytest.raises(ValueError, match=rf"{column}.*{key}.*'new7'"):
        trained.get_latent_representation(query)
    assert_same(query, before)


def test_unseen_covariate_category_in_query(case, query):
    model = fit(case, screen(), {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]})
    assert np.isfinite(model.get_latent_representation(query.copy())).all()
    query.obs["donor"] = query.obs["donor"].astype(str).replace({"d1": "d7"})
    before = frozen(query)
    with pytest.raises(ValueError, match=r"donor.*categorical_covariate_keys.*'d7'.*'d1'"):
        model.get_latent_representation(query)
    assert_same(query, before)


def test_query_with_missing_column_or_bad_counts(trained, query):
    for spoil, error, message in (
        (lambda a: a.obs.pop("batch"), KeyError, "batch"),
        (lambda a: a.obs.pop("perturbation"), KeyError, "perturbation"),
        (lambda a: a.X.data.__setitem__(0, -3.0), ValueError, "-3"),
    ):
        data = query.copy()
        spoil(data)
        before = frozen(data)
        with pytest.raises(error, match=message):
            trained.get_latent_representation(data)
        assert_same(data, before)


def test_subsets_of_the_registered_data(trained):
    """A view, and a copy that still carries the registration's columns."""
    z = trained.get_latent_representation(key_added=None)
    np.testing.assert_array_equal(
        trained.get_latent_representation(trained.adata[10:20].copy(), key_added=None), z[10:20]
    )
    np.testing.assert_array_equal(trained.get_latent_representation(trained.adata[30:40], key_added=None), z[30:40])


def test_changed_labels_are_read_again(case):
    """Labels edited after registration are encoded anew when the registered data are passed on."""
    adata = screen()
    model = fit(case, adata)
    query = adata.copy()
    query.obs["perturbation"] = CONTROL
    shift = predicted_shifts(model.predict_perturbation("A", adata=query, n_cells=query.n_obs))
    assert np.abs(shift.to_numpy()).max() > 0
    assert set(query.obs["_scvi_condition"].astype(str)) == {CONTROL}


def test_two_models_on_one_anndata(case):
    """Each registration is replayed when its model is used."""
    adata = screen()
    first = fit(case, adata, {"batch_key": "batch"})
    z = first.get_latent_representation(key_added=None)
    second = fit(case, adata, {"labels_key": "cell_type", "control": [CONTROL, "A"]})
    assert second.perturbation_names == ["B", "C/2"]
    assert adata.obsm["_scvi_perturbation"].shape == (120, 2)
    np.testing.assert_array_equal(first.get_latent_representation(key_added=None), z)
    assert adata.obsm["_scvi_perturbation"].shape == (120, 3)
    assert "A" not in second.predict_perturbation("B", n_cells=3).obs["perturbation"].tolist()
