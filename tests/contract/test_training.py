"""Splits, statistics of the training cells, and data at the edge of what can be trained on."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from ._screens import COMPONENTS, CONTROL, UNSEEN, dense, fit, register, screen


def with_split(adata, seed=0):
    """Add a split column: most of A+C/2 is test, a tenth valid."""
    rng = np.random.default_rng(seed)
    split = rng.choice(["train", "train", "train", "valid", "test"], adata.n_obs).astype(object)
    split[(adata.obs["perturbation"].astype(str) == "A+C/2").to_numpy()] = "test"
    adata.obs["split"] = split
    return adata


def check(model, label="A"):
    """Assert that a model gives finite numbers all over."""
    assert all(torch.isfinite(v).all() for v in model.module.state_dict().values())
    assert np.isfinite(model.get_latent_representation()).all()
    predicted = model.predict_perturbation(label, n_cells=12)
    assert np.isfinite(dense(predicted.X)).all()
    assert np.isfinite(dense(predicted.layers["mean"])).all()
    programs = model.get_perturbation_programs()
    assert np.isfinite(programs.loadings.to_numpy()).all()
    assert np.isfinite(model.get_elbo())
    if type(model).capabilities.credible_effects:
        assert np.isfinite(model.get_treatment_effects(label, n_samples=3).lower.to_numpy()).all()
    if type(model).capabilities.marginal_ll:
        assert np.isfinite(model.get_marginal_ll(n_mc_samples=2))


def test_split_key(case):
    adata = with_split(screen())
    model = fit(case, adata, split_key="split")
    for name, indices in (
        ("train", model.train_indices),
        ("valid", model.validation_indices),
        ("test", model.test_indices),
    ):
        assert sorted(indices) == np.flatnonzero(adata.obs["split"] == name).tolist()
    aliased = screen()
    aliased.obs["split"] = adata.obs["split"].replace({"valid": "validation", "test": "ood"})
    again = fit(case, aliased, split_key="split")
    assert sorted(again.validation_indices) == sorted(model.validation_indices)
    assert sorted(again.test_indices) == sorted(model.test_indices)


def test_split_key_of_text_with_few_classes(case):
    adata = with_split(screen())
    adata.obs["split"] = adata.obs["split"].replace({"valid": "train"}).astype("category")
    model = fit(case, adata, split_key="split")
    train, valid = set(model.train_indices), set(model.validation_indices)
    assert train | valid == set(np.flatnonzero(adata.obs["split"] == "train"))
    conditions = adata.obs["_scvi_condition"].astype(str).to_numpy()
    for condition in set(conditions[list(valid)]):
        of_it = np.flatnonzero((conditions == condition) & (adata.obs["split"] == "train").to_numpy())
        assert len(set(of_it) & valid) == len(of_it) // 10


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (None, KeyError, "split_key='spilt'.*'split'"),
        ({"test": "holdout"}, ValueError, "'holdout'.*'train'.*'ood'"),
        ({"train": "test"}, ValueError, "no 'train' cell"),
        ({"test": None}, ValueError, "missing"),
    ],
)
def test_split_errors(case, values, error, message):
    adata = with_split(screen())
    if values is not None:
        adata.obs["split"] = [values.get(v, v) for v in adata.obs["split"]]
    with pytest.raises(error, match=message):
        fit(case, adata, split_key="spilt" if values is None else "split")


def test_split_key_excludes_sizes(case):
    with pytest.raises(ValueError, match="split_key='split'.*train_size"):
        fit(case, with_split(screen()), split_key="split", train_size=0.8)


def test_sizes_and_indices_as_in_scvi_tools(case):
    model = fit(case, screen(), train_size=0.5, validation_size=0.25)
    assert [len(x) for x in (model.train_indices, model.validation_indices, model.test_indices)] == [60, 30, 30]
    indices = [list(range(80)), list(range(80, 100)), list(range(100, 120))]
    model = fit(case, screen(), datasplitter_kwargs={"external_indexing": [np.array(i) for i in indices]})
    assert sorted(model.test_indices) == indices[2]


def test_test_cells_enter_no_statistic(case):
    """Counts of the test cells are replaced: nothing that was learned may change."""
    adata, spoiled = with_split(screen()), with_split(screen())
    test = (adata.obs["split"] == "test").to_numpy()
    x = spoiled.X.toarray()
    x[test] = np.random.default_rng(3).poisson(1000.0, x[test].shape)
    spoiled.X = sp.csr_matrix(x)
    ours, theirs = (fit(case, a, {"batch_key": "batch"}, split_key="split") for a in (adata, spoiled))
    for (name, value), other in zip(ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert dict(ours.module.named_buffers()).keys() == dict(theirs.module.named_buffers()).keys()
    np.testing.assert_array_equal(ours.library_effects_.effects, theirs.library_effects_.effects)
    for name in ("use", "control_median", "log_likelihood", "log_likelihood_control"):
        assert getattr(ours.library_effects_, name) == getattr(theirs.library_effects_, name)
    for key in ("objective_train", "objective_validation"):
        np.testing.assert_array_equal(ours.history[key].to_numpy(), theirs.history[key].to_numpy())


def test_training_cells_do_enter(case):
    """The mirror of the test above, which could pass when nothing is learned at all."""
    adata, spoiled = with_split(screen()), with_split(screen())
    train = (adata.obs["split"] == "train").to_numpy()
    x = spoiled.X.toarray()
    x[train] = np.random.default_rng(3).poisson(1000.0, x[train].shape)
    spoiled.X = sp.csr_matrix(x)
    ours, theirs = (fit(case, a, split_key="split") for a in (adata, spoiled))
    assert any(
        not torch.equal(v, w)
        for v, w in zip(ours.module.state_dict().values(), theirs.module.state_dict().values(), strict=True)
    )
    assert ours.library_effects_.control_median != theirs.library_effects_.control_median


def test_a_component_without_training_cells(case):
    adata = with_split(screen())
    adata.obs.loc[adata.obs["perturbation"].astype(str).str.contains("B"), "split"] = "test"
    model = fit(case, adata, split_key="split")
    assert model.perturbation_names == COMPONENTS
    check(model, "B")


def test_one_perturbation(case):
    model = fit(case, screen(labels={CONTROL: 30, "A": 30}))
    assert model.perturbation_names == ["A"]
    check(model)


def test_gene_without_variance(case):
    adata = screen()
    x = adata.X.toarray()
    x[:, 4] = 0
    x[:, 5] = 3
    adata.X = sp.csr_matrix(x)
    check(fit(case, adata))


def test_empty_cell(case):
    adata = screen()
    x = adata.X.toarray()
    control = np.flatnonzero(adata.obs["perturbation"].astype(str) == CONTROL)
    x[[control[0], 0, 1]] = 0
    adata.X = sp.csr_matrix(x)
    model = fit(case, adata)
    check(model)
    predicted = model.predict_perturbation("A", indices=control[:1], library_size="observed")
    assert np.isfinite(dense(predicted.X)).all()


def test_single_control(case):
    adata = screen(labels={CONTROL: 1, "A": 30, "B": 30})
    model = fit(case, adata)
    check(model)
    assert model.predict_perturbation("A+B").n_obs == 2


def test_without_validation_cells(case):
    """Three cells a condition: no tenth to hold out."""
    adata = screen(labels={CONTROL: 9, "A": 9, "B": 9, "A+B": 6})
    with pytest.warns(UserWarning, match="[Ee]arly stopping is off"):
        model = fit(case, adata)
    assert len(model.validation_indices) == 0
    check(model)
    predicted = model.predict_perturbation("A", n_cells=2)
    assert predicted.uns["pertvae"]["settings"]["library_size"] == "observed"
    with pytest.raises(ValueError, match=r"early_stopping=True.*valid"):
        fit(case, screen(labels={CONTROL: 9, "A": 9}), early_stopping=True)


def test_a_rare_component_warns_once_and_trains(case):
    adata = screen(labels={CONTROL: 30, "A": 30, "B": 2, "C/2": 1})
    with pytest.warns(UserWarning, match=r"2 of 3 perturbations have fewer than 5 cells: 'B' \(2\), 'C/2' \(1\)"):
        register(case, adata)
    check(fit(case, adata), UNSEEN)


def test_last_minibatch_of_one_cell(case):
    model = fit(case, screen(labels={CONTROL: 33, "A": 32}), batch_size=64, early_stopping=False, split_key=None)
    check(model)


def test_epochs_and_early_stopping(case):
    model = fit(case, screen(), max_epochs=3, early_stopping=False)
    assert len(model.history["objective_train"]) == 3
    assert model.is_trained
    stopped = fit(case, screen(), max_epochs=30, early_stopping_patience=1, early_stopping_min_delta=1e9)
    assert len(stopped.history["objective_train"]) < 30


def test_sparse_tensors_give_the_same_weights(case):
    ours, theirs = (fit(case, screen(), load_sparse_tensor=flag) for flag in (False, True))
    for (name, value), other in zip(ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("max_epochs", [0, -1])
def test_no_epochs(case, max_epochs):
    with pytest.raises(ValueError, match=f"max_epochs={max_epochs}"):
        fit(case, screen(), max_epochs=max_epochs)
