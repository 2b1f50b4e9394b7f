"""Options beyond the paper, through the model: hyperpriors of masks, further posteriors of effects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData

import pertvae as pv

OPTIONS: dict[str, dict[str, Any]] = {
    "gated": {"embedding_inference": "gated"},
    "low_rank": {"embedding_inference": "low_rank", "embedding_rank": 2},
    "per_perturbation": {"mask_hyperprior": "perturbation"},
    "per_latent": {"mask_hyperprior": "latent", "embedding_inference": "correlated"},
    "linear_decoder": {"n_layers_decoder": 0},
}


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("sparsify", ["rotate", "published"])
def test_option_trains_predicts_and_is_saved(
    name: str, sparsify: str, small_screen: AnnData, model_of: Callable, quiet: dict, tmp_path: Path
) -> None:
    model = model_of(small_screen, sparsify=sparsify, **OPTIONS[name])
    model.train(max_epochs=8, batch_size=128, **quiet)
    assert not model.module.effects.open
    assert all(bool(torch.isfinite(p).all()) for p in model.module.parameters())
    assert all(p.grad is None or p.grad.abs().sum() > 0 for p in model.module.effects.parameters())
    masks = model.get_masks().to_numpy()
    assert ((masks > 0) & (masks < 1)).all()
    assert np.isfinite(model.get_marginal_ll(n_mc_samples=3))
    assert np.isfinite(model.get_elbo())
    credible = model.get_treatment_effects(["P001"], n_samples=20, key_added=None)
    assert (credible.lower <= credible.upper).all(axis=None)

    def predict(m: pv.SAMSVAE) -> np.ndarray:
        return np.asarray(m.predict_perturbation(["P001+P002"], n_cells=10, key_added=None).layers["mean"])

    model.save(str(tmp_path / "model"))
    loaded = pv.SAMSVAE.load(str(tmp_path / "model"), model.adata, accelerator="cpu")
    np.testing.assert_array_equal(predict(model), predict(loaded))


@pytest.mark.parametrize("name", ["SAMSVAE", "CPAVAE", "SVAEPlus", "ConditionalVAE"])
def test_depth_of_the_decoder_alone(name: str, small_screen: AnnData, quiet: dict) -> None:
    cls, adata = getattr(pv, name), small_screen.copy()
    cls.setup_anndata(adata, perturbation_key="perturbation", control="control", batch_key="batch")
    model = cls(adata, n_latent=4, n_hidden=16, n_layers=2, n_layers_decoder=0)
    assert model.module.decoder.mlp is None
    assert len(model.module.encoder.rest) == 1
    model.train(max_epochs=2, batch_size=128, **quiet)
    found = model.predict_perturbation(["P001+P002"], n_cells=5, key_added=None)
    assert np.isfinite(found.layers["mean"]).all()


def test_factors_have_the_learning_rate_of_effects(small_screen: AnnData, model_of: Callable) -> None:
    module = model_of(small_screen, embedding_inference="low_rank").module
    assert any(p is module.effects.factor for p in module.global_parameters())


@pytest.mark.parametrize(
    ("argument", "value"),
    [("mask_hyperprior", "entry"), ("embedding_inference", "lowrank"), ("embedding_rank", 0), ("n_layers_decoder", -1)],
)
def test_values_that_are_not_accepted(argument: str, value: Any, small_screen: AnnData, model_of: Callable) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value!r}"):
        model_of(small_screen, **{argument: value})
