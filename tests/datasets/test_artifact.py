"""Screens with artifacts: who has one, what it does to counts, and an oracle that knows nothing of it."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency

from pertvae.datasets import read_truth, simulate_screen

SMALL = {
    "n_genes": 150,
    "n_perturbations": 6,
    "n_doubles": 4,
    "cells_per_perturbation": 400,
    "cells_per_double": 300,
    "n_controls": 1500,
    "n_latent": 5,
    "n_oracle": 800,
}


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return simulate_screen("artifact", **SMALL, seed=1)


@pytest.fixture(scope="module")
def confounded() -> ad.AnnData:
    return simulate_screen("artifact_confounded", **SMALL, seed=1)


@pytest.fixture(scope="module")
def plain() -> ad.AnnData:
    return simulate_screen("sparse_additive", **SMALL, seed=1)


def spoilt(adata: ad.AnnData) -> np.ndarray:
    return adata.obs["artifact"].to_numpy() == 1


def test_who_is_an_artifact(screen: ad.AnnData, plain: ad.AnnData) -> None:
    bad, low = spoilt(screen), screen.obs["truth_low_depth"].to_numpy()
    assert set(screen.obs["artifact"]) == {0, 1}
    n = screen.n_obs
    assert abs(bad.mean() - 0.3) < 4 * np.sqrt(0.21 / n)
    assert abs(low[bad].mean() - 0.5) < 4 * np.sqrt(0.25 / bad.sum())
    assert not low[~bad].any()
    # of nothing else in the screen
    for name in ("perturbation", "batch"):
        assert chi2_contingency(pd.crosstab(screen.obs[name], bad)).pvalue > 0.01
    other = np.column_stack([screen.obsm["X_truth_basal"], np.log(plain.obs["truth_library"])])
    for status in (bad, low):
        assert np.abs(np.corrcoef(other.T, status)[-1, :-1]).max() < 4 / np.sqrt(n)


def test_module_and_depth(screen: ad.AnnData, plain: ad.AnnData, rho) -> None:
    truth = read_truth(screen)
    module = truth.genes["module"].to_numpy()
    assert module.sum() == 50
    bad, low = spoilt(screen), screen.obs["truth_low_depth"].to_numpy()
    library = plain.obs["truth_library"].to_numpy()
    np.testing.assert_allclose(screen.obs["truth_library"] / library, np.where(low, 0.4, 1.0))
    expected = rho(truth, screen.obsm["X_truth_latent"], screen.obs["batch"]) * library[:, None]
    x = screen.X.toarray()
    for cells, fold, depth in ((~bad, 1, 1), (bad & ~low, 3, 1), (low, 3, 0.4)):
        assert abs(x[cells].sum() / library[cells].sum() - depth) < 0.01
        ratio = np.log(x[cells].sum(axis=0) / expected[cells].sum(axis=0))
        assert abs(ratio[module].mean() - ratio[~module].mean() - np.log(fold)) < 0.02
        # all of the module alike, and nobody else: what the others lose is the module's gain in the softmax
        assert ratio[module].std() < 0.1
        assert ratio[~module].std() < 0.1


def test_oracle_is_of_clean_cells(screen: ad.AnnData, plain: ad.AnnData, log_cells, misfit) -> None:
    truth, bad, y = read_truth(screen), spoilt(screen), log_cells(screen)
    pd.testing.assert_frame_equal(truth.shifts, read_truth(plain).shifts)
    pd.testing.assert_series_equal(truth.control_profile, read_truth(plain).control_profile)
    module = truth.genes["module"].to_numpy()
    for label in ["control", *truth.shifts.index]:
        rows = (screen.obs["perturbation"] == label).to_numpy()
        expected = truth.control_profile + (0 if label == "control" else truth.shifts.loc[label])
        assert 0.4 < misfit(y[rows & ~bad], expected)[module].mean() < 2.2, label
        assert misfit(y[rows], expected)[module].mean() > 2.5, label


def test_confounded(screen: ad.AnnData, confounded: ad.AnnData) -> None:
    truth = read_truth(confounded)
    assert truth.settings["confounded_perturbation"] == "P001"
    share = pd.Series(spoilt(confounded)).groupby(confounded.obs["perturbation"].to_numpy()).mean()
    doubles = [c for c in share.index if c.startswith("P001+")]
    assert doubles
    assert abs(share["P001"] - 0.8) < 0.08
    assert (share.drop("P001") - 0.3).abs().max() < 0.1
    # the same screen but for cells of that perturbation, none of which becomes clean
    own = (screen.obs["perturbation"] == "P001").to_numpy()
    for name in ("artifact", "truth_low_depth"):
        pd.testing.assert_series_equal(screen.obs[name][~own], confounded.obs[name][~own])
        assert (confounded.obs[name][own] >= screen.obs[name][own]).all()
    found = read_truth(screen)
    pd.testing.assert_frame_equal(truth.shifts, found.shifts)
    assert (truth.genes["module"] == found.genes["module"]).all()
    assert "confounded_perturbation" not in found.settings


def test_confounded_by_another() -> None:
    settings = {**SMALL, "n_genes": 60, "n_controls": 300, "n_oracle": 2, "module_size": 5}
    adata = simulate_screen(
        "artifact_confounded",
        **settings,
        artifact_fraction=0.0,
        confounded_perturbation="P004",
        confounded_fraction=1.0,
        low_depth_fraction=1.0,
    )
    own = (adata.obs["perturbation"] == "P004").to_numpy()
    np.testing.assert_array_equal(spoilt(adata), own)
    np.testing.assert_array_equal(adata.obs["truth_low_depth"], own)
    assert read_truth(adata).genes["module"].sum() == 5


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("artifact", {"artifact_fraction": 1.3}, "artifact_fraction=1.3"),
        ("artifact", {"low_depth_fraction": -0.1}, "low_depth_fraction=-0.1"),
        ("artifact", {"n_genes": 30}, "module_size=50 must be a whole number from 1 to n_genes=30"),
        ("artifact", {"module_fold": 0.0}, "module_fold=0.0"),
        ("artifact", {"depth_factor": 0.0}, "depth_factor=0.0"),
        ("artifact_confounded", {"confounded_fraction": 2.0}, "confounded_fraction=2.0"),
        ("artifact_confounded", {"confounded_perturbation": "P1"}, "'P1' is not a perturbation of the screen. Did you"),
    ],
)
def test_errors(kind: str, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simulate_screen(kind, **{**SMALL, **settings})
