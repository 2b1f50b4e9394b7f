"""Screens with interactions: what is said to interact does, by as much as the truth says, and nothing else."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pertvae.datasets import Truth, read_truth, simulate_screen

SMALL = {
    "n_genes": 120,
    "n_perturbations": 8,
    "n_doubles": 12,
    "cells_per_perturbation": 60,
    "cells_per_double": 400,
    "n_controls": 600,
    "n_latent": 4,
    "mask_density": 0.4,
    "n_oracle": 1000,
}
# hardly any noise but that of the basal states: log1p CP10k is then a function of the true proportions
SHARP = {"library_size": 1e6, "library_sd": 0.01, "theta": 1e5, "theta_sd": 0.01, "batch_sd": 0.0}


@pytest.fixture(scope="module")
def structured() -> ad.AnnData:
    return simulate_screen("interacting_structured", **SMALL, seed=2)


@pytest.fixture(scope="module")
def random() -> ad.AnnData:
    return simulate_screen("interacting_random", **SMALL, deviating_fraction=0.1, seed=2)


@pytest.fixture(scope="module")
def additive() -> ad.AnnData:
    return simulate_screen("sparse_additive", **SMALL, seed=2)


def doubles_of(truth: Truth) -> list[str]:
    return [c for c in truth.shifts.index if "+" in c]


def rows(adata: ad.AnnData, label: str) -> np.ndarray:
    return (adata.obs["perturbation"] == label).to_numpy()


def test_saturation(structured: ad.AnnData) -> None:
    truth = read_truth(structured)
    offset = structured.obsm["X_truth_latent"] - structured.obsm["X_truth_basal"]
    strongest = 0.0
    for label in ["control", *truth.shifts.index]:
        total = truth.effects.loc[[] if label == "control" else label.split("+")].sum().to_numpy()
        found = offset[rows(structured, label)]
        np.testing.assert_allclose(found, np.tile(4 * np.tanh(total / 4), (len(found), 1)), atol=2e-5)
        strongest = max(strongest, np.abs(total - found[0]).max())
    assert strongest > 1.5  # an additive screen would be told from it


def test_saturation_setting() -> None:
    tiny = {**SMALL, "cells_per_double": 3, "n_oracle": 5}
    loose = simulate_screen("interacting_structured", **tiny, saturation=1e7, seed=2)
    plain = simulate_screen("sparse_additive", **tiny, seed=2)
    np.testing.assert_allclose(loose.obsm["X_truth_latent"], plain.obsm["X_truth_latent"], atol=1e-5)
    tight = simulate_screen("interacting_structured", **tiny, saturation=0.5, seed=2)
    assert np.abs(tight.obsm["X_truth_latent"] - tight.obsm["X_truth_basal"]).max() <= 0.5 + 1e-5


@pytest.mark.parametrize("name", ["structured", "random"])
def test_doubles_follow_the_oracle(name: str, request: pytest.FixtureRequest, log_cells, misfit) -> None:
    adata = request.getfixturevalue(name)
    truth, y = read_truth(adata), log_cells(adata)
    assert list(truth.additive_shifts.index) == doubles_of(truth)
    interaction = (truth.shifts.loc[doubles_of(truth)] - truth.additive_shifts).abs()
    expressed, fit = (adata.X > 0).mean(axis=0).A1 > 0.2, {}
    for label in truth.additive_shifts.index:
        cells = y[rows(adata, label)]
        with_it = misfit(cells, truth.control_profile + truth.shifts.loc[label])
        without = misfit(cells, truth.control_profile + truth.additive_shifts.loc[label])
        fit[label] = with_it[expressed].mean()
        strong = expressed & (interaction.loc[label] > 0.25).to_numpy()
        if strong.sum() >= 3:
            assert without[strong].mean() > 30, label
            assert without[strong].mean() > 10 * with_it[strong].mean(), label
    assert ((interaction > 0.25).sum(axis=1) >= 3).sum() >= 4
    # genes of a double err together (four latents), so single doubles scatter around 1
    assert 0.7 < np.mean(list(fit.values())) < 1.8
    assert max(fit.values()) < 4


def test_no_shared_latent_no_interaction(structured: ad.AnnData) -> None:
    truth = read_truth(structured)
    shared = {d: (truth.mask.loc[d.split("+")].sum() == 2).any() for d in doubles_of(truth)}
    gap = (truth.shifts.loc[doubles_of(truth)] - truth.additive_shifts).abs().max(axis=1)
    assert set(shared.values()) == {True, False}
    # equal offsets give equal counts: no noise is left between the two oracles
    assert max(gap[d] for d in shared if not shared[d]) < 1e-9
    assert np.median([gap[d] for d in shared if shared[d]]) > 0.5


@pytest.mark.parametrize("kind", ["interacting_structured", "interacting_random"])
def test_additive_shifts_are_those_of_summed_singles(kind: str, rho) -> None:
    # against the latents of the single perturbations as they are, decoded by another road
    adata = simulate_screen(kind, **{**SMALL, **SHARP, "cells_per_double": 2, "n_oracle": 1200}, seed=2)
    truth = read_truth(adata)
    offset = pd.DataFrame(adata.obsm["X_truth_latent"] - adata.obsm["X_truth_basal"])
    offset = offset.groupby(adata.obs["perturbation"].to_numpy()).mean()
    gaps, basal = {}, np.random.default_rng(0).standard_normal((6000, 4))
    control = np.log1p(1e4 * rho(truth, basal)).mean(axis=0)
    np.testing.assert_allclose(truth.control_profile, control, atol=0.05)
    for label in doubles_of(truth)[3:6]:
        moved = basal + offset.loc[label.split("+")].sum().to_numpy()
        expected = np.log1p(1e4 * rho(truth, moved)).mean(axis=0) - control
        found = truth.additive_shifts.loc[label].to_numpy()
        np.testing.assert_allclose(found, expected, atol=0.15)
        gaps[label] = np.abs(truth.shifts.loc[label].to_numpy() - expected).max()
    assert max(gaps.values()) > 0.3


def test_deviations_follow_the_law() -> None:
    settings = {"n_genes": 1000, "n_perturbations": 40, "cells_per_perturbation": 1, "cells_per_double": 1}
    truth = read_truth(simulate_screen("interacting_random", **settings, n_controls=1, n_oracle=2, seed=0))
    table = truth.interactions.to_numpy()
    assert list(truth.interactions.index) == doubles_of(truth)
    assert list(truth.interactions.columns) == list(truth.shifts.columns)
    assert ((table != 0).sum(axis=1) == 60).all()
    values = table[table != 0]
    assert abs(values.std() - 0.5) < 0.03
    assert abs(values.mean()) < 0.04
    # every double has its own genes: pairs of doubles share 6% of 60 on average
    deviating = (table != 0).astype(int)
    common = (deviating @ deviating.T)[np.triu_indices(62, k=1)]
    assert abs(common.mean() - 3.6) < 0.3


def test_deviations_are_in_the_counts(rho) -> None:
    sizes = {**SMALL, "n_doubles": 4, "cells_per_double": 1500, "cells_per_perturbation": 300, "n_oracle": 2}
    adata = simulate_screen("interacting_random", **sizes, library_size=20000.0, deviating_fraction=0.2, seed=3)
    truth = read_truth(adata)
    without = rho(truth, adata.obsm["X_truth_latent"], adata.obs["batch"])
    without *= adata.obs["truth_library"].to_numpy()[:, None]
    x = adata.X.toarray()
    for label in ["control", "P001", *doubles_of(truth)]:
        cells = rows(adata, label)
        gap = np.log(x[cells].sum(axis=0) / without[cells].sum(axis=0))
        if "+" in label:
            planted = truth.interactions.loc[label].to_numpy()
            gap -= np.median(gap[planted == 0])  # the softmax takes from every gene what the deviating ones gain
            assert abs(np.polyfit(planted[planted != 0], gap[planted != 0], 1)[0] - 1) < 0.06
            assert np.corrcoef(planted, gap)[0, 1] > 0.95
        else:
            planted = np.zeros(120)
        assert np.abs(gap - planted).max() < 0.3
        assert (gap - planted).std() < 0.07


def test_singles_stay_those_of_the_additive_screen(random: ad.AnnData, additive: ad.AnnData) -> None:
    singles = [f"P{i:03d}" for i in range(1, 9)]
    found, plain = read_truth(random), read_truth(additive)
    pd.testing.assert_frame_equal(found.shifts.loc[singles], plain.shifts.loc[singles])
    none = simulate_screen("interacting_random", **SMALL, deviating_fraction=0.0, seed=2)
    assert (none.X != additive.X).nnz == 0
    truth = read_truth(none)
    pd.testing.assert_frame_equal(truth.additive_shifts, truth.shifts.loc[doubles_of(truth)])
    assert not truth.interactions.to_numpy().any()


def test_only_the_interacting_have_interactions(structured: ad.AnnData, additive: ad.AnnData) -> None:
    assert read_truth(structured).interactions is None
    plain = read_truth(additive)
    assert plain.interactions is None
    assert plain.additive_shifts is None
    assert plain.tables == {}


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("interacting_structured", {"saturation": 0.0}, "saturation=0.0"),
        ("interacting_random", {"deviating_fraction": 1.2}, "deviating_fraction=1.2"),
        ("interacting_random", {"deviation_sd": -1.0}, "deviation_sd=-1.0"),
    ],
)
def test_errors(kind: str, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simulate_screen(kind, **settings)
