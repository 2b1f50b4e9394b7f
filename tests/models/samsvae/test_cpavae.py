"""CPA-VAE: SAMS-VAE with all masks open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scvi
import torch
from anndata import AnnData
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

import pertvae as pv
from pertvae.models.base import ModuleShape
from pertvae.models.samsvae import CPAVAEModule

SMALL = {"n_latent": 3, "n_hidden": 8, "n_layers": 1}


def module(**kwargs: object) -> CPAVAEModule:
    torch.manual_seed(0)
    arguments = SMALL | {
        "n_particles": 1, "gene_likelihood": "nb", "effect_prior_scale": 2.0, "embedding_inference": "mean_field",
        "basal_inference": "correlated", "effect_threshold": 0.5,
    }  # fmt: skip
    made = CPAVAEModule(ModuleShape(5, 2), **(arguments | kwargs))  # type: ignore[arg-type]
    with torch.no_grad():
        made.effects.loc.normal_()
        made.effects.log_sd.uniform_(-2, 0)
    return made


@pytest.fixture(scope="module")
def screen() -> AnnData:
    adata = pv.datasets.example()
    pv.CPAVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    return adata


def test_the_global_kl_is_that_of_effects_alone() -> None:
    made = module()
    sample = made.draw_globals(3)
    q = Normal(made.effects.loc, made.effects.log_sd.exp() + 1e-4)
    expected = kl_divergence(q, Normal(torch.zeros(2, 3), torch.full((2, 3), 2.0))).sum(-1)
    torch.testing.assert_close(sample.kl, expected.expand(3, -1))
    assert (sample.effect != 0).all()


def test_shift_is_dose_times_dense_effect() -> None:
    made = module()
    doses = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 1.0]])
    loc = made.effects.loc
    torch.testing.assert_close(made.offset(doses), torch.stack([0 * loc[0], loc[0], 2 * loc[0] + loc[1]]))


def test_inclusion_is_the_probability_of_a_large_effect() -> None:
    made = module()
    effect, inclusion = (t.detach().numpy() for t in made.program_tables())
    loc, sd = made.effects.loc.detach().numpy(), np.exp(made.effects.log_sd.detach().numpy()) + 1e-4
    np.testing.assert_allclose(effect, loc)
    np.testing.assert_allclose(inclusion, norm.sf(0.5, loc, sd) + norm.cdf(-0.5, loc, sd), rtol=1e-4)


def test_masks_are_no_parameters_to_learn(screen: AnnData, tmp_path: Path) -> None:
    scvi.settings.seed = 0
    model = pv.CPAVAE(screen, n_latent=4, n_hidden=16)
    model.train(max_epochs=3, enable_progress_bar=False)
    assert model.module.effects.open
    assert not model.module.effects.mask_logits.any()
    assert "mask_density_train" not in model.history
    model.save(str(tmp_path / "model"))
    loaded = pv.CPAVAE.load(str(tmp_path / "model"), screen)
    assert loaded.module.effects.open
    shift = model.get_latent_representation(kind="perturbation", key_added=None)
    np.testing.assert_array_equal(loaded.get_latent_representation(kind="perturbation", key_added=None), shift)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embedding_inference": "gated"}, "'gated' is not one of"),
        ({"effect_prior_scale": 0.0}, "effect_prior_scale=0.0 is not positive"),
        ({"effect_threshold": -1.0}, "effect_threshold=-1.0 is negative"),
        ({"n_latent": 0}, "n_latent=0: at least 1"),
        ({"objective": "iwae"}, "n_particles=1"),
    ],
)
def test_bad_arguments(screen: AnnData, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pv.CPAVAE(screen, **arguments)


def test_predicts_held_out_doubles() -> None:
    adata = pv.datasets.simulate_screen(
        n_genes=200, n_perturbations=12, n_doubles=6, cells_per_perturbation=80, cells_per_double=60, n_controls=300,
        n_latent=6, n_oracle=300, seed=1,
    )  # fmt: skip
    truth = pv.datasets.read_truth(adata)
    doubles = sorted({c for c in adata.obs["perturbation"].astype(str) if "+" in c})
    adata.obs["split"] = np.where(adata.obs["perturbation"].isin(doubles), "test", "train")
    pv.CPAVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", batch_key="batch")
    scvi.settings.seed = 0
    model = pv.CPAVAE(adata, n_latent=8, n_hidden=64)
    model.train(max_epochs=150, split_key="split", batch_size=128, enable_progress_bar=False)
    predicted = model.predict_perturbation(doubles, key_added=None).uns["cpavae_predictions"].T
    expected = truth.shifts.loc[doubles].to_numpy()
    assert np.corrcoef(np.asarray(predicted).ravel(), expected.ravel())[0, 1] > 0.85
