"""Effects of perturbations on library size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import lognorm

from pertvae.models.base._library import LibraryEffects, fit_library_effects

NOISE = 0.4


def screen(
    effects: np.ndarray, seed: int = 0, cells: int = 80, controls: int = 300, doubles: bool = True
) -> dict[str, Any]:
    """Log-normal totals in two batches, singles and doubles of neighbours, every tenth cell for validation."""
    rng = np.random.default_rng(seed)
    t = len(effects)
    rows = [np.zeros(t)] * controls + [np.eye(t)[k] for k in range(t) for _ in range(cells)]
    if doubles:
        rows += [np.eye(t)[k] + np.eye(t)[(k + 1) % t] for k in range(t) for _ in range(cells // 4)]
    doses = np.array(rows)
    n = len(doses)
    groups = rng.integers(0, 2, n)
    log_totals = 8.0 + 0.5 * groups + doses @ effects + NOISE * rng.standard_normal(n)
    valid = np.arange(n) % 10 == 0
    return {
        "totals": np.exp(log_totals),
        "doses": sp.csr_matrix(doses.astype(np.float32)),
        "groups": groups,
        "train": np.flatnonzero(~valid),
        "valid": np.flatnonzero(valid),
    }


def test_planted_factors_come_back() -> None:
    planted = np.log([1.9, 1.4, 1.0, 1.2, 0.5, 1.0, 0.8, 2.5])
    fitted = fit_library_effects(**screen(planted))
    assert fitted.use
    assert fitted.log_likelihood > fitted.log_likelihood_control + 0.02
    np.testing.assert_allclose(fitted.effects, planted, atol=4 * NOISE / np.sqrt(72))
    # less noisy on average than a component's own mean against the controls
    errors = [fit_library_effects(**screen(planted, seed)).effects - planted for seed in range(10)]
    assert np.sqrt(np.square(errors).mean()) < NOISE * np.sqrt(1 / 72 + 1 / 270)


def test_doubles_alone_identify_their_components() -> None:
    planted = np.array([0.6, -0.4, 0.3])
    data = screen(planted, cells=120)
    singles = (np.asarray(data["doses"].sum(1)).ravel() == 1) & (data["doses"].toarray()[:, 0] == 1)
    data["train"] = np.setdiff1d(data["train"], np.flatnonzero(singles))
    np.testing.assert_allclose(fit_library_effects(**data).effects, planted, atol=0.2)


def test_effects_are_linear_in_the_dose() -> None:
    data = screen(np.array([0.5, 0.0, 0.0]), doubles=False)
    halved = data | {"doses": data["doses"] * 2}
    a, b = fit_library_effects(**data).effects, fit_library_effects(**halved).effects
    np.testing.assert_allclose(b, a / 2, atol=0.02)


def test_no_effects_shrink_to_nothing() -> None:
    own_means, fitted, used = [], [], []
    for seed in range(30):
        data = screen(np.zeros(8), seed=seed)
        result = fit_library_effects(**data)
        fitted.append(result.effects)
        used.append(result.use)
        y, train = np.log(data["totals"]) - 0.5 * data["groups"], data["train"]
        d = data["doses"].toarray()[train]
        own_means.append([y[train][(d[:, k] == 1)].mean() - y[train][d.sum(1) == 0].mean() for k in range(8)])
    size = np.sqrt(np.square(fitted).mean())
    assert size < 0.4 * np.sqrt(np.square(own_means).mean())
    assert size < 0.02
    assert np.mean([not e.any() for e in fitted]) > 0.3  # often exactly zero
    assert np.mean(used) < 0.5


def test_zero_variance_of_effects_is_not_used() -> None:
    """An estimate of exactly no spread leaves predictions at the observed library, whatever the likelihoods."""
    results = [fit_library_effects(**screen(np.zeros(8), seed=s)) for s in range(12)]
    none = [r for r in results if not r.effects.any()]
    assert none
    assert not any(r.use for r in none)


def test_shrinkage_grows_with_noise() -> None:
    planted = np.array([0.3, -0.3, 0.3, -0.3, 0.3, -0.3])
    sizes = [
        np.mean([np.abs(fit_library_effects(**screen(planted, s, cells=n)).effects).mean() for s in range(6)])
        for n in (6, 400)
    ]
    assert sizes[0] < sizes[1]
    assert sizes[1] == pytest.approx(0.3, abs=0.03)


def test_only_training_rows_decide_effects() -> None:
    data = screen(np.array([0.7, -0.5, 0.2, 0.0]))
    before = fit_library_effects(**data)
    spoiled = data["totals"].copy()
    n = len(spoiled)
    spoiled[data["valid"]] *= 30
    test = np.arange(n)[-40:]
    data["train"] = np.setdiff1d(data["train"], test)
    base = fit_library_effects(**data)
    spoiled[test] *= 100
    after = fit_library_effects(**(data | {"totals": spoiled}))
    np.testing.assert_array_equal(after.effects, base.effects)
    assert after.control_median == base.control_median
    # validation cells decide on the use only
    assert after.log_likelihood < base.log_likelihood
    assert before.use


def test_validation_cells_decide_the_use() -> None:
    data = screen(np.array([0.9, -0.9, 0.9, -0.9]))
    assert fit_library_effects(**data).use
    # validation cells of a world without effects
    totals = data["totals"].copy()
    totals[data["valid"]] = screen(np.zeros(4))["totals"][data["valid"]]
    result = fit_library_effects(**(data | {"totals": totals}))
    assert not result.use
    assert result.effects.any()


def test_without_validation_cells() -> None:
    data = screen(np.array([0.9, -0.9]))
    result = fit_library_effects(**(data | {"valid": np.array([], dtype=np.int64)}))
    assert not result.use
    assert np.isnan(result.log_likelihood)
    assert np.isnan(result.log_likelihood_control)
    np.testing.assert_allclose(result.effects, [0.9, -0.9], atol=0.2)


def test_log_likelihoods_are_log_normal_densities() -> None:
    data = screen(np.zeros(3), cells=4000, controls=4000)
    result = fit_library_effects(**data)
    valid = data["valid"]
    median = np.exp(8.0 + 0.5 * data["groups"][valid])
    exact = lognorm.logpdf(data["totals"][valid], NOISE, scale=median).mean()
    assert result.log_likelihood == pytest.approx(exact, abs=0.01)
    assert result.log_likelihood_control == pytest.approx(exact, abs=0.01)


def test_covariates_are_not_mistaken_for_effects() -> None:
    # a perturbation seen in the deeper batch only
    rng = np.random.default_rng(0)
    groups = np.r_[np.repeat([0, 1], 200), np.ones(200, int), np.zeros(200, int)]
    doses = np.zeros((800, 2))
    doses[400:600, 0] = doses[600:, 1] = 1
    totals = np.exp(7 + 1.0 * groups + 0.3 * rng.standard_normal(800))
    every = np.arange(800)
    result = fit_library_effects(totals, sp.csr_matrix(doses), groups, every[every % 10 > 0], every[every % 10 == 0])
    assert np.abs(result.effects).max() < 0.1


def test_unseen_components_have_no_effect() -> None:
    data = screen(np.array([0.8, -0.8, 0.5]))
    data["doses"] = sp.hstack([data["doses"], sp.csr_matrix((data["doses"].shape[0], 1))], format="csr")
    result = fit_library_effects(**data)
    assert result.effects[3] == 0.0
    assert result.effects[0] > 0.5


def test_control_median_and_empty_cells() -> None:
    data = screen(np.array([0.9, -0.9]))
    control = data["train"][data["train"] < 300]
    assert fit_library_effects(**data).control_median == pytest.approx(np.median(data["totals"][control]))
    totals = data["totals"].copy()
    totals[[1, 2, 3, 310]] = 0.0
    result = fit_library_effects(**(data | {"totals": totals}))
    assert np.isfinite(result.effects).all()
    assert result.control_median == pytest.approx(np.median(totals[control[~np.isin(control, [1, 2, 3])]]))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_cells(n: int) -> None:
    data = screen(np.array([0.9, -0.9]))
    result = fit_library_effects(**(data | {"train": data["train"][:n]}))
    assert isinstance(result, LibraryEffects)
    assert not result.use
    assert not result.effects.any()
