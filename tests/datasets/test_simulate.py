"""Simulated screens: the truth that is stored must be the truth the data follow."""

import inspect

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae.datasets import Truth, example, read_truth, simulate_screen
from pertvae.datasets._generator import orthogonal
from pertvae.datasets._kinds import KINDS

SMALL = {
    "n_genes": 150,
    "n_perturbations": 10,
    "n_doubles": 5,
    "cells_per_perturbation": 120,
    "cells_per_double": 120,
    "n_controls": 1500,
    "n_latent": 6,
    "n_oracle": 1500,
}


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return simulate_screen(**SMALL, seed=3)


@pytest.fixture(scope="module")
def truth(screen: ad.AnnData) -> Truth:
    return read_truth(screen)


@pytest.fixture(scope="module")
def authors() -> ad.AnnData:
    return simulate_screen("samsvae_authors", n_perturbations=40, cells_per_split=(100, 20, 20), seed=1)


def test_layout(screen: ad.AnnData) -> None:
    assert screen.shape == (1500 + 10 * 120 + 5 * 120, 150)
    assert sp.issparse(screen.X)
    assert screen.X.format == "csr"
    assert screen.X.dtype == np.float32
    assert (screen.X.data == np.round(screen.X.data)).all()
    assert screen.X.data.min() >= 1
    counts = screen.obs["perturbation"].value_counts()
    assert counts["control"] == 1500
    assert counts["P001"] == 120
    doubles = [c for c in counts.index if "+" in c]
    assert len(set(doubles)) == 5
    assert all(a < b for a, b in (d.split("+") for d in doubles))
    assert set(screen.obs["batch"]) == {"batch1", "batch2"}
    # random order: a model or a splitter that reads position as meaning is found out
    assert screen.obs["perturbation"].iloc[:200].nunique() > 5


def test_effects_follow_the_law() -> None:
    truth = read_truth(
        simulate_screen(
            n_genes=20, n_perturbations=400, n_doubles=0, cells_per_perturbation=1, n_controls=5, n_oracle=2, seed=0
        )
    )
    mask, effects = truth.mask.to_numpy(), truth.effects.to_numpy()
    assert mask.shape == (400, 20)
    assert (mask.sum(axis=1) >= 1).all()
    expected = 0.1 + 0.9**20 / 20  # empty rows get one
    assert abs(mask.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / mask.size)
    np.testing.assert_array_equal(effects != 0, mask == 1)
    size = np.abs(effects[mask == 1])
    assert abs(size.mean() - 2.5) < 0.08
    assert abs(size.std() - 0.5) < 0.06
    assert 0.45 < (effects[mask == 1] > 0).mean() < 0.55


def test_latents_add_up(screen: ad.AnnData, truth: Truth) -> None:
    basal, latent = screen.obsm["X_truth_basal"], screen.obsm["X_truth_latent"]
    offset = pd.DataFrame(latent - basal).groupby(screen.obs["perturbation"].to_numpy()).agg(["min", "max"])
    for label in screen.obs["perturbation"].cat.categories:
        parts = [] if label == "control" else label.split("+")
        expected = truth.effects.loc[parts].sum().to_numpy()
        found = offset.loc[label].to_numpy().reshape(-1, 2)
        np.testing.assert_allclose(found, np.stack([expected, expected], axis=1), atol=2e-5)
    assert np.abs(basal.mean(axis=0)).max() < 0.08
    assert np.abs(np.cov(basal.T) - np.eye(6)).max() < 0.1


def test_counts_are_negative_binomial(screen: ad.AnnData, truth: Truth, decode) -> None:
    batch = screen.obs["batch"].astype(str).to_numpy()
    rates = decode(truth, screen.obsm["X_truth_latent"].astype(float)) + truth.genes["baseline"].to_numpy()
    rates = np.exp(rates + truth.genes[["batch1", "batch2"]].T.loc[batch].to_numpy())
    mu = rates / rates.sum(axis=1, keepdims=True) * screen.obs["truth_library"].to_numpy()[:, None]
    x = screen.X.toarray()
    bulk = x.sum(axis=0) / mu.sum(axis=0)
    assert np.abs(bulk - 1).max() < 0.15
    assert abs(bulk.mean() - 1) < 0.01
    theta = truth.genes["theta"].to_numpy()
    ratio = (x - mu) ** 2 / (mu + mu**2 / theta)
    assert abs(ratio.mean() - 1) < 0.03
    assert abs(np.median(ratio.mean(axis=0)) - 1) < 0.05
    # neither Poisson nor a common dispersion would do
    assert ((x - mu) ** 2 / mu).mean() > 2
    low, high = theta < np.quantile(theta, 0.3), theta > np.quantile(theta, 0.7)
    assert abs(ratio[:, low].mean() - 1) < 0.1
    assert abs(ratio[:, high].mean() - 1) < 0.1


def test_parameters_follow_the_law(screen: ad.AnnData, truth: Truth, decode) -> None:
    library = np.log(screen.obs["truth_library"].to_numpy())
    assert abs(library.mean() - np.log(3000)) < 0.03
    assert abs(library.std() - 0.35) < 0.02
    out = decode(truth, np.random.default_rng(0).standard_normal((20000, 6)))
    np.testing.assert_allclose(out.std(axis=0), 0.6, rtol=0.05)
    assert np.abs(out.mean(axis=0)).max() < 0.05
    assert abs(truth.genes["baseline"].std() - 1.2) < 0.25
    assert abs(np.log(truth.genes["theta"]).std() - 0.7) < 0.15
    assert abs(truth.genes[["batch1", "batch2"]].to_numpy().std() - 0.1) < 0.02
    w = truth.decoder["layer2"]
    np.testing.assert_allclose(w @ w.T, np.eye(64), atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    q = orthogonal(np.random.default_rng(0), *shape)
    assert q.shape == shape
    small = q @ q.T if shape[0] <= shape[1] else q.T @ q
    np.testing.assert_allclose(small, np.eye(min(shape)), atol=1e-12)


def test_oracle_is_the_expectation(screen: ad.AnnData, truth: Truth, log_profiles) -> None:
    profiles = log_profiles(screen)
    assert list(truth.shifts.index) == [c for c in screen.obs["perturbation"].cat.categories if c != "control"]
    np.testing.assert_allclose(profiles.loc["control"], truth.control_profile, atol=0.2)
    x = screen.X.toarray().astype(float)
    y = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))
    for label in truth.shifts.index:
        expected = truth.control_profile + truth.shifts.loc[label]
        cells = y[(screen.obs["perturbation"] == label).to_numpy()]
        z = (cells.mean(axis=0) - expected) / (cells.std(axis=0, ddof=1) / np.sqrt(len(cells)) + 1e-12)
        shift = profiles.loc[label] - profiles.loc["control"]
        assert np.corrcoef(shift, truth.shifts.loc[label])[0, 1] > 0.95
        # squared z-scores average 1 where only sampling separates data and oracle
        assert 0.4 < (z**2).mean() < 2.2, label


def test_oracle_coupling_is_exact(log_profiles) -> None:
    # shifts from coupled counts against those of a screen of very many cells of one perturbation
    big = simulate_screen(
        n_genes=30,
        n_perturbations=1,
        n_doubles=0,
        cells_per_perturbation=12000,
        n_controls=12000,
        n_latent=4,
        n_oracle=12000,
        library_size=60.0,
        seed=5,
    )
    truth, profiles = read_truth(big), log_profiles(big[np.asarray(big.X.sum(axis=1)).ravel() > 0])
    shift = profiles.loc["P001"] - profiles.loc["control"]
    assert np.linalg.norm(shift) > 3
    assert np.abs(shift - truth.shifts.loc["P001"]).max() < 0.13


def test_seeds(screen: ad.AnnData) -> None:
    np.random.seed(11)  # noqa: NPY002 (the global state is what is tested)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    again = simulate_screen(**SMALL, seed=3)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert (again.X != screen.X).nnz == 0
    pd.testing.assert_frame_equal(again.obs, screen.obs)
    pd.testing.assert_frame_equal(read_truth(again).shifts, read_truth(screen).shifts)
    other = simulate_screen(**SMALL, seed=4)
    assert (other.X != screen.X).nnz > 0
    assert not np.allclose(read_truth(other).effects, read_truth(screen).effects)


def test_h5ad_round_trip(tmp_path, screen: ad.AnnData, truth: Truth) -> None:
    screen.write_h5ad(tmp_path / "screen.h5ad")
    back = ad.read_h5ad(tmp_path / "screen.h5ad")
    found = read_truth(back)
    for name in ("mask", "effects", "shifts", "genes"):
        pd.testing.assert_frame_equal(
            getattr(found, name), getattr(truth, name), check_index_type=False, check_column_type=False
        )
    np.testing.assert_array_equal(found.control_profile, truth.control_profile)
    assert found.settings == truth.settings
    assert found.settings["n_doubles"] == 5
    assert found.kind == "sparse_additive"
    np.testing.assert_array_equal(found.decoder["layer1"], truth.decoder["layer1"])
    assert (back.X != screen.X).nnz == 0
    assert back.obs["perturbation"].dtype == "category"


def test_fixed_sizes() -> None:
    # the fixed benchmark screen: these numbers are not to drift
    defaults = {k: p.default for k, p in inspect.signature(KINDS["sparse_additive"]).parameters.items()}
    assert defaults == {
        "n_genes": 1000,
        "n_perturbations": 100,
        "n_doubles": 62,
        "cells_per_perturbation": 150,
        "cells_per_double": 100,
        "n_controls": 2000,
        "n_latent": 20,
        "n_batches": 2,
        "mask_density": 0.1,
        "effect_size": 2.5,
        "effect_sd": 0.5,
        "decoder_sd": 0.6,
        "baseline_sd": 1.2,
        "library_size": 3000.0,
        "library_sd": 0.35,
        "theta": 2.0,
        "theta_sd": 0.7,
        "batch_sd": 0.1,
        "n_oracle": 1000,
        "seed": 0,
    }


def test_example() -> None:
    adata = example()
    assert adata.shape == (1500, 200)
    labels = [c for c in adata.obs["perturbation"].cat.categories if c != "control"]
    assert sum("+" in c for c in labels) == 6
    assert len(labels) == 18
    assert adata.obs["batch"].nunique() == 2
    assert (adata.X != example().X).nnz == 0
    assert adata.X.sum(axis=1).min() > 0


def test_authors_values(authors: ad.AnnData, decode) -> None:
    truth = read_truth(authors)
    assert authors.shape == (500 + 40 * 140, 100)
    assert not sp.issparse(authors.X)
    clean = decode(truth, authors.obsm["X_truth_latent"].astype(float))
    np.testing.assert_allclose(clean.std(axis=0), 1, atol=1e-3)
    noise = authors.X - clean
    assert abs(noise.var() - 0.2) < 0.005
    assert abs(noise.mean()) < 0.01
    assert len([k for k in truth.decoder if k.startswith("layer")]) == 5
    assert truth.decoder["layer2"].shape == (50, 50)
    sizes = np.abs(truth.effects.to_numpy()[truth.mask.to_numpy() == 1])
    assert abs(sizes.mean() - 5) < 0.25
    assert abs(truth.mask.to_numpy().mean() - 2 / 15) < 0.06
    controls = (authors.obs["perturbation"] == "control").to_numpy()
    np.testing.assert_array_equal(authors.obsm["X_truth_latent"][controls], authors.obsm["X_truth_basal"][controls])
    assert truth.shift_space == "identity"
    found = pd.DataFrame(authors.X).groupby(authors.obs["perturbation"].to_numpy()).mean()
    found = found.loc[truth.shifts.index].to_numpy() - found.loc["control"].to_numpy()
    assert np.corrcoef(found.ravel(), truth.shifts.to_numpy().ravel())[0, 1] > 0.98


def test_authors_splits(authors: ad.AnnData) -> None:
    table = pd.crosstab(authors.obs["perturbation"], authors.obs["split"])
    assert (table.drop("control").to_numpy() == [100, 20, 20]).all()
    np.testing.assert_allclose(table.loc["control"] / 500, [5 / 7, 1 / 7, 1 / 7], atol=0.005)


def test_authors_without_controls_and_as_counts(log_profiles, decode) -> None:
    settings = {"n_perturbations": 5, "cells_per_split": (300, 20, 0), "n_genes": 40}
    adata = simulate_screen("samsvae_authors", n_controls=0, **settings)
    assert "control" not in set(adata.obs["perturbation"])
    counts = simulate_screen("samsvae_authors", counts=True, **settings)
    assert sp.issparse(counts.X)
    assert (counts.X.data == np.round(counts.X.data)).all()
    truth = read_truth(counts)
    clean = decode(truth, counts.obsm["X_truth_latent"].astype(float))
    assert abs(counts.X.sum() / np.exp(clean).sum() - 1) < 0.01
    assert truth.shift_space == "log1p_cp10k"
    profiles = log_profiles(counts)
    found = (profiles.loc[truth.shifts.index] - profiles.loc["control"]).to_numpy()
    assert np.corrcoef(found.ravel(), truth.shifts.to_numpy().ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"kind": "sparse_aditive"}, ValueError, "Did you mean 'sparse_additive'"),
        ({"kind": "nonsense"}, ValueError, "samsvae_authors"),
        ({"n_gene": 5}, TypeError, "n_genes"),
        ({"n_genes": 0}, ValueError, "n_genes=0"),
        ({"n_genes": 10.5}, ValueError, "n_genes=10.5"),
        ({"n_perturbations": 3, "n_doubles": 4}, ValueError, "3 pairs"),
        ({"kind": "samsvae_authors", "cells_per_split": (5, 5)}, ValueError, "cells_per_split"),
    ],
)
def test_errors(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words.replace("(", r"\(")):
        simulate_screen(**arguments)


def test_read_truth_needs_a_simulated_screen() -> None:
    with pytest.raises(KeyError, match="simulate_screen"):
        read_truth(ad.AnnData(np.ones((2, 2))))
