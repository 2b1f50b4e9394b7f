"""What sparse effects leave in the basal state goes to the perturbation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData

import pertvae as pv
from pertvae.models.base._access import covariate_groups
from pertvae.models.base._posterior_shifts import least_squares_shifts, posterior_shifts, shrunken_shifts


def design(n_each: int, n_components: int, rng: np.random.Generator) -> sp.csr_matrix:
    """Return controls, singles and the double of the first two components."""
    rows = np.repeat(np.vstack([np.zeros(n_components), np.eye(n_components)]), n_each, axis=0)
    double = np.zeros((n_each, n_components))
    double[:, :2] = 1
    return sp.csr_matrix(rng.permutation(np.vstack([rows, double])))


def test_shrinkage_follows_the_noise() -> None:
    rng = np.random.default_rng(0)
    doses, n_latent = design(200, 4, rng), 20
    true = np.zeros((4, n_latent))
    true[0], true[1, :5] = 0.5, 1.0
    latent = doses @ true + rng.normal(size=(doses.shape[0], n_latent)) * np.linspace(0.5, 2, n_latent)
    groups = np.zeros(doses.shape[0], dtype=int)
    raw, variance, _ = least_squares_shifts(latent, doses, groups)
    found, sd = shrunken_shifts(latent, doses, groups)
    factor = found / raw
    np.testing.assert_allclose(factor, np.broadcast_to(factor[:, :1], factor.shape))  # one factor a component
    assert (factor[:2] > 0.9).all()
    assert (factor[2:] < 0.5).all()
    assert ((found - true) ** 2).sum() < ((raw - true) ** 2).sum()
    # mean and variance of the posterior share the factor: f shift, f error^2
    error = np.std(latent - doses @ raw, axis=0) * np.sqrt(variance)[:, None]
    np.testing.assert_allclose(sd**2, factor * error**2, rtol=0.05)
    x = doses.toarray()
    gram = np.linalg.inv(np.hstack([np.ones((len(x), 1)), x]).T @ np.hstack([np.ones((len(x), 1)), x]))
    np.testing.assert_allclose(variance, np.diag(gram)[1:], rtol=1e-3)
    np.testing.assert_allclose(raw, posterior_shifts(latent, doses, groups)[0])


def test_nothing_for_a_component_without_cells_or_latents_that_do_not_vary() -> None:
    rng = np.random.default_rng(0)
    doses = sp.hstack([design(30, 2, rng), sp.csr_matrix((120, 1))], format="csr")
    latent = rng.normal(size=(120, 5)) + doses[:, [0]].toarray()
    latent[:, 3] = 0.0
    found, sd = shrunken_shifts(latent, doses, np.zeros(120, dtype=int))
    for table in (found, sd):
        assert not table[2].any()
        assert not table[:, 3].any()
        assert table[0, 0] != 0


def test_the_unit_of_a_dose_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    doses = design(100, 3, rng)
    true = rng.normal(size=(3, 8)) * 2
    latent = doses @ true + rng.normal(size=(doses.shape[0], 8))
    unit = np.array([1e-3, 1.0, 1e3])
    groups = rng.integers(0, 2, doses.shape[0])
    plain = shrunken_shifts(latent, doses, groups)
    scaled = shrunken_shifts(latent, sp.csr_matrix(doses.multiply(unit)), groups)
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(other * unit[:, None], one, rtol=1e-3, atol=1e-6)


def test_credible_intervals_know_the_noise_of_the_leak(fits: tuple) -> None:
    _, model, _ = fits
    kept = {k: v.clone() for k, v in model.module.state_dict().items()}
    try:
        with torch.no_grad():
            model.module.effects.mask_logits.fill_(-20.0)  # nothing but the leak is left
            model.module.leak.fill_(0.01)
            model.module.leak_sd.fill_(0.1)
        effects = model.get_treatment_effects(["P001"], n_samples=200, key_added=None)
        inside = (effects.lower <= 0) & (effects.upper >= 0)
        assert float(inside.to_numpy().mean()) > 0.9
        with torch.no_grad():
            model.module.leak.fill_(1.0)
            model.module.leak_sd.fill_(1e-4)
        effects = model.get_treatment_effects(["P001"], n_samples=200, key_added=None)
        inside = (effects.lower <= 0) & (effects.upper >= 0)
        assert float(inside.to_numpy().mean()) < 0.1
    finally:
        model.module.load_state_dict(kept)


@pytest.fixture(scope="module")
def fits() -> tuple[AnnData, pv.SAMSVAE, pv.SAMSVAE]:
    adata = pv.datasets.example()
    pv.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    models = []
    for correction in (True, False):
        scvi.settings.seed = 0
        model = pv.SAMSVAE(adata, n_latent=6, n_hidden=32, leak_correction=correction)
        model.train(max_epochs=30, batch_size=128, enable_progress_bar=False)
        models.append(model)
    return adata, models[0], models[1]


def test_basal_and_perturbation_still_sum_to_full(fits: tuple) -> None:
    _, model, plain = fits
    full, basal, shift = (
        model.get_latent_representation(kind=k, key_added=None) for k in ("full", "basal", "perturbation")
    )
    np.testing.assert_allclose(basal + shift, full, atol=1e-5)
    np.testing.assert_allclose(full, plain.get_latent_representation(key_added=None), atol=1e-5)
    assert model.module.leak.any()
    assert not plain.module.leak.any()


def test_the_basal_state_is_free_of_what_was_moved(fits: tuple) -> None:
    adata, model, plain = fits
    rows = np.sort(model.train_indices)
    doses = adata.obsm["_scvi_perturbation"][rows]
    left = [
        least_squares_shifts(
            m.get_latent_representation(kind="basal", key_added=None)[rows], doses, np.zeros(len(rows), dtype=int)
        )[0]
        for m in (model, plain)
    ]
    leak = model.module.leak.detach().numpy()
    np.testing.assert_allclose(left[0], left[1] - leak, atol=1e-4)
    assert np.linalg.norm(left[0]) < 0.5 * np.linalg.norm(left[1])


def test_controls_masks_programs_and_likelihood_are_untouched(fits: tuple) -> None:
    adata, model, plain = fits
    control = np.flatnonzero(adata.obs["perturbation"] == "control")
    for kind in ("full", "basal"):
        one, other = (m.get_latent_representation(indices=control, kind=kind, key_added=None) for m in (model, plain))
        np.testing.assert_array_equal(one, other)
    assert not model.get_latent_representation(indices=control, kind="perturbation", key_added=None).any()
    for name, table in vars(plain.get_perturbation_programs(key_added=None)).items():
        np.testing.assert_array_equal(vars(model.get_perturbation_programs(key_added=None))[name], table)
    few = np.arange(0, adata.n_obs, 20)
    assert model.get_marginal_ll(indices=few, n_mc_samples=5) == plain.get_marginal_ll(indices=few, n_mc_samples=5)


def test_the_papers_protocol_corrects_nothing(fits: tuple) -> None:
    _, model, plain = fits
    arguments = {"perturbations": ["P001"], "n_samples": 50, "key_added": None}
    one, other = (m.get_treatment_effects(protocol="paper", **arguments).mean for m in (model, plain))
    np.testing.assert_allclose(one, other, atol=1e-5)
    matched = [m.get_treatment_effects(**arguments).mean.to_numpy() for m in (model, plain)]
    assert not np.allclose(*matched, atol=1e-3)


def test_draws_and_expectation_move_alike(fits: tuple) -> None:
    _, model, plain = fits
    components, doses = torch.tensor([1, 3]), torch.tensor([2.0, 1.0])
    row = torch.zeros(1, len(model.perturbation_names))
    row[0, components] = doses
    noise = torch.rand(7, 2, 6), torch.randn(7, 2, 6)
    drawn = [m.module.draw_offset(components, doses, *noise) for m in (model, plain)]
    expected = [m.module.offset(row) for m in (model, plain)]
    torch.testing.assert_close(drawn[0] - drawn[1], (expected[0] - expected[1]).expand(7, -1))
    torch.testing.assert_close(expected[0] - expected[1], 2 * model.module.leak[[1]] + model.module.leak[[3]])


def test_means_of_all_categorical_covariates_are_nuisance(small_screen: AnnData) -> None:
    """What a covariate does that goes with a perturbation is not the perturbation's."""
    adata = small_screen.copy()
    adata.obs["site"] = np.where(np.arange(adata.n_obs) % 3 == 0, "a", "b")
    pv.SAMSVAE.setup_anndata(
        adata,
        perturbation_key="perturbation",
        control="control",
        batch_key="batch",
        categorical_covariate_keys=["site"],
    )
    groups = covariate_groups(pv.SAMSVAE(adata, n_latent=3, n_hidden=8).adata_manager)
    pairs = list(zip(adata.obs["batch"].astype(str), adata.obs["site"], strict=True))
    assert len(set(zip(groups, pairs, strict=True))) == len(set(groups)) == len(set(pairs)) == 4
