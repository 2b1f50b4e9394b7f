"""Saved and loaded models give the same numbers to the bit."""

import numpy as np
import pandas as pd
import pytest
import torch

from pertvae._predictions import predicted_shifts

from ._screens import CONTROL, UNSEEN, block, dense, fit, register, screen


def assert_equal_models(case, ours, theirs, query=None):
    """Assert that two models give the same latents, predictions, programs."""
    for kind in case.cls.capabilities.latent_kinds:
        np.testing.assert_array_equal(
            ours.get_latent_representation(query, kind=kind), theirs.get_latent_representation(query, kind=kind)
        )
    for basal in case.cls.capabilities.basal:
        pair = [m.predict_perturbation(["A", UNSEEN], adata=query, basal=basal) for m in (ours, theirs)]
        np.testing.assert_array_equal(dense(pair[0].X), dense(pair[1].X))
        pd.testing.assert_frame_equal(*(predicted_shifts(p) for p in pair))
    pair = [m.get_perturbation_programs(query) for m in (ours, theirs)]
    pd.testing.assert_frame_equal(pair[0].effects, pair[1].effects)
    pd.testing.assert_frame_equal(pair[0].inclusion, pair[1].inclusion)
    pd.testing.assert_frame_equal(pair[0].loadings, pair[1].loadings)


def test_save_and_load_are_equal_to_the_bit(case, trained, tmp_path):
    trained.save(tmp_path / "model")
    loaded = case.cls.load(tmp_path / "model", screen())
    assert_equal_models(case, loaded, trained)
    for name, value in trained.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], value), name
    np.testing.assert_array_equal(loaded.library_effects_.effects, trained.library_effects_.effects)
    assert loaded.library_effects_.use == trained.library_effects_.use
    assert loaded.perturbation_names == trained.perturbation_names
    np.testing.assert_array_equal(loaded.train_indices, trained.train_indices)
    assert set(loaded.history) == set(trained.history)
    if case.cls.capabilities.credible_effects:
        pair = [m.get_treatment_effects(n_samples=5, key_added=None) for m in (loaded, trained)]
        pd.testing.assert_frame_equal(pair[0].lower, pair[1].lower)
    if case.cls.capabilities.marginal_ll:
        assert loaded.get_marginal_ll(n_mc_samples=3) == trained.get_marginal_ll(n_mc_samples=3)


def test_load_with_the_saved_data(case, trained, tmp_path):
    trained.save(str(tmp_path / "model"), save_anndata=True)
    loaded = case.cls.load(str(tmp_path / "model"))
    assert_equal_models(case, loaded, trained)


def test_load_without_data_then_new_data(case, trained, tmp_path):
    trained.save(tmp_path / "model", prefix="mine_")
    loaded = case.cls.load(tmp_path / "model", adata=False, prefix="mine_")
    assert loaded.perturbation_names == trained.perturbation_names
    with pytest.raises(ValueError, match="no data: pass adata"):
        loaded.get_latent_representation()
    query = screen(labels={CONTROL: 7, "A": 5, UNSEEN: 3}, seed=2)
    expected = trained.get_latent_representation(query.copy())
    np.testing.assert_array_equal(loaded.get_latent_representation(query), expected)
    predicted = loaded.predict_perturbation("A", adata=query)
    assert block(predicted, "A").shape == (7, 30)
    # a second data set, without controls
    other = screen(labels={"B": 4}, seed=3)
    assert loaded.get_latent_representation(other).shape[0] == 4


def test_covariates_and_doses_survive(case, tmp_path):
    setup = {"batch_key": "batch", "categorical_covariate_keys": ["donor"], "dosage_key": "dose_text"}
    model = fit(case, screen(), setup)
    model.save(tmp_path / "model")
    loaded = case.cls.load(tmp_path / "model", screen())
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    query = screen()
    del query.obs["dose_text"]
    with pytest.raises(KeyError, match="dose_text"):
        loaded.get_latent_representation(query)


def test_saving_again_needs_overwrite(trained, tmp_path):
    trained.save(tmp_path / "model")
    with pytest.raises(ValueError, match="overwrite=True"):
        trained.save(tmp_path / "model")
    trained.save(tmp_path / "model", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_training_is_reproducible_and_can_go_on(case):
    models = [fit(case, screen()) for _ in range(2)]
    for (name, ours), theirs in zip(
        models[0].module.state_dict().items(), models[1].module.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    register(case, models[0].adata)
    before = models[0].get_latent_representation(key_added=None)
    models[0].train(**{**case.train, "max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False})
    assert not np.array_equal(models[0].get_latent_representation(key_added=None), before)
