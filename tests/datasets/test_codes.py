"""The screen of discrete states: frequencies, states, effects and the oracle follow what the truth says."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import chisquare

from pertvae.datasets import Truth, read_truth, simulate_screen

SMALL = {
    "n_genes": 80,
    "n_perturbations": 6,
    "n_doubles": 6,
    "cells_per_perturbation": 700,
    "cells_per_double": 700,
    "n_controls": 3000,
    "n_latent": 8,
    "mask_density": 0.3,
    "n_oracle": 1200,
}


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return simulate_screen("codes", **SMALL, seed=4)


@pytest.fixture(scope="module")
def truth(screen: ad.AnnData) -> Truth:
    return read_truth(screen)


@pytest.fixture(scope="module")
def many() -> Truth:
    settings = {**SMALL, "n_perturbations": 300, "cells_per_perturbation": 1, "cells_per_double": 1, "n_controls": 1}
    return read_truth(simulate_screen("codes", **{**settings, "n_genes": 5, "n_latent": 200, "n_oracle": 12}, seed=0))


def test_frequencies_are_the_weights(screen: ad.AnnData, truth: Truth) -> None:
    weights = truth.tables["state_weights"]
    table = pd.crosstab(screen.obs["perturbation"], screen.obs["truth_state"])
    assert list(weights.index) == ["control", *truth.shifts.index]
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    for label, row in weights.iterrows():
        found = table.loc[label, weights.columns]
        assert chisquare(found, row * found.sum()).pvalue > 1e-3, label
        if label != "control" and np.abs(row - weights.loc["control"]).sum() > 0.2:
            assert chisquare(found, weights.loc["control"] * found.sum()).pvalue < 1e-3, label


def test_control_states_are_those_of_controls(screen: ad.AnnData, truth: Truth) -> None:
    # every cell has a control state with the controls' weights, and leaves it as seldom as two such laws allow
    weights = truth.tables["state_weights"]
    table = pd.crosstab(screen.obs["perturbation"], screen.obs["truth_control_state"])
    left = screen.obs["truth_state"].astype(str) != screen.obs["truth_control_state"].astype(str)
    for label, row in weights.iterrows():
        found = table.loc[label, weights.columns]
        assert chisquare(found, weights.loc["control"] * found.sum()).pvalue > 1e-3, label
        distance = np.maximum(row - weights.loc["control"], 0).sum()
        rows = (screen.obs["perturbation"] == label).to_numpy()
        assert abs(left[rows].mean() - distance) <= 4 * np.sqrt(distance * (1 - distance) / rows.sum()), label


def test_weights_follow_the_law(many: Truth) -> None:
    weights, changes = many.tables["state_weights"], many.tables["log_weights"]
    assert changes.shape == (300, 12)
    assert ((changes != 0).sum(axis=1) == 3).all()
    assert ((changes != 0).mean() - 0.25).abs().max() < 0.1
    values = changes.to_numpy()[changes.to_numpy() != 0]
    assert abs(values.std() - 1.2) < 0.12
    assert abs(values.mean()) < 0.16
    for label in weights.index[1:]:  # of doubles too: log-weight changes add up
        log_ratio = np.log(weights.loc[label] / weights.loc["control"]) - changes.loc[label.split("+")].sum()
        np.testing.assert_allclose(log_ratio, log_ratio.iloc[0], atol=1e-9)
    assert any("+" in label for label in weights.index)
    controls = [
        read_truth(simulate_screen("codes", **SPARSE, seed=s)).tables["state_weights"].iloc[0] for s in range(12)
    ]
    assert abs(np.std(controls) - np.sqrt(1 / 12 * 11 / 12 / 61)) < 0.006


SPARSE = {
    "n_genes": 2,
    "n_perturbations": 1,
    "n_doubles": 0,
    "cells_per_perturbation": 1,
    "n_controls": 1,
    "n_oracle": 1,
}


def test_half_have_effects(many: Truth) -> None:
    moving = many.mask.any(axis=1)
    assert moving.sum() == 150
    assert not many.effects[~moving].to_numpy().any()
    assert abs(np.abs(many.effects.to_numpy()[many.mask.to_numpy() == 1]).mean() - 2.5) < 0.05


def test_centers_follow_the_law(many: Truth) -> None:
    centers = many.tables["state_centers"].to_numpy()
    assert centers.shape == (12, 200)
    assert abs(centers.std() - 2) < 0.1
    assert abs(centers.mean()) < 0.15


def test_latents(screen: ad.AnnData, truth: Truth) -> None:
    centers = truth.tables["state_centers"]
    labels = pd.Series(screen.obs["perturbation"].astype(str))
    known = {c: truth.effects.loc[[p for p in c.split("+") if p != "control"]].sum() for c in labels.unique()}
    offset = pd.DataFrame(known).T.loc[labels].to_numpy()
    assert np.abs(offset).max() > 4
    within = screen.obsm["X_truth_latent"] - centers.loc[screen.obs["truth_state"].astype(str)].to_numpy() - offset
    before = screen.obsm["X_truth_basal"] - centers.loc[screen.obs["truth_control_state"].astype(str)].to_numpy()
    np.testing.assert_allclose(within, before, atol=2e-5)
    assert np.abs(within.std(axis=0) - 0.5).max() < 0.02
    assert np.abs(within.mean(axis=0)).max() < 0.03
    per_state = pd.DataFrame(within).groupby(screen.obs["truth_state"].to_numpy()).mean()
    assert np.abs(per_state).to_numpy().max() < 0.12


def test_oracle_against_cells(screen: ad.AnnData, truth: Truth, log_cells, misfit) -> None:
    y, fit = log_cells(screen), {}
    for label in ["control", *truth.shifts.index]:
        expected = truth.control_profile + (0 if label == "control" else truth.shifts.loc[label])
        fit[label] = misfit(y[(screen.obs["perturbation"] == label).to_numpy()], expected).mean()
    # genes err together, because frequencies do
    assert 0.5 < np.mean(list(fit.values())) < 2
    assert max(fit.values()) < 5
    assert {truth.mask.loc[c.split("+")].to_numpy().any() for c in truth.shifts.index} == {True, False}


def test_oracle_against_the_sum_over_states(rho) -> None:
    # hardly any noise but that within states, so that the sum over states can be taken by another road
    sharp = {"library_size": 1e6, "library_sd": 0.01, "theta": 1e5, "theta_sd": 0.01, "batch_sd": 0.0}
    sizes = {**SMALL, "cells_per_perturbation": 1, "cells_per_double": 1, "n_controls": 1, "n_oracle": 1500}
    truth = read_truth(simulate_screen("codes", **sizes, **sharp, seed=4))
    noise = 0.5 * np.random.default_rng(0).standard_normal((1500, 8))

    def expected(label: str) -> np.ndarray:
        offset = truth.effects.loc[[] if label == "control" else label.split("+")].sum().to_numpy()
        total = np.zeros(80)
        for state, weight in truth.tables["state_weights"].loc[label].items():
            z = truth.tables["state_centers"].loc[state].to_numpy() + offset + noise
            total += weight * np.log1p(1e4 * rho(truth, z)).mean(axis=0)
        return total

    control = expected("control")
    np.testing.assert_allclose(truth.control_profile, control, atol=0.04)
    for label in truth.shifts.index[::2]:
        np.testing.assert_allclose(truth.shifts.loc[label], expected(label) - control, atol=0.06)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_states": 0}, "n_states=0"),
        ({"n_states": 3, "states_moved": 4}, "states_moved=4 is more than n_states=3"),
        ({"mean_fraction": 1.5}, "mean_fraction=1.5"),
        ({"weight_concentration": 0.0}, "weight_concentration=0.0"),
        ({"within_sd": -1.0}, "within_sd=-1.0"),
        ({"weight_sd": 0.0}, "weight_sd=0.0"),
    ],
)
def test_errors(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simulate_screen("codes", **{**SMALL, **settings})
