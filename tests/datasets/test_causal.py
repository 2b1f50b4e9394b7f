"""The causal screen: mechanisms, cuts, moments in closed form, matched pairs, and measurements of both sorts."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae.datasets import Truth, read_truth, simulate_screen

SMALL = {
    "n_genes": 80,
    "n_perturbations": 6,
    "n_doubles": 15,
    "cells_per_perturbation": 1500,
    "cells_per_double": 1500,
    "n_controls": 9000,
    "n_oracle": 3000,
}
N, M = 4, 7
COUNTS = {**SMALL, "cells_per_perturbation": 250, "cells_per_double": 250, "n_controls": 1500, "n_oracle": 1200}


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return simulate_screen("causal", **SMALL, seed=1)


@pytest.fixture(scope="module")
def truth(screen: ad.AnnData) -> Truth:
    return read_truth(screen)


@pytest.fixture(scope="module")
def counts() -> ad.AnnData:
    return simulate_screen("causal", counts=True, **COUNTS, seed=1)


@pytest.fixture(scope="module")
def dense() -> Truth:
    settings = {"n_genes": 2, "n_perturbations": 300, "n_doubles": 5, "cells_per_perturbation": 1, "n_controls": 1}
    return read_truth(simulate_screen("causal", **settings, cells_per_double=1, n_oracle=1, seed=0))


def mechanism(truth: Truth, label: str) -> tuple[np.ndarray, np.ndarray]:
    """L_ni and L_nn of a condition, from the named edges."""
    weights = pd.DataFrame(0.0, index=truth.mask.columns, columns=[*truth.tables["invariant_graph"], *truth.mask])
    for edge, weight in truth.tables["edges"].loc[label].items():
        parent, child = edge.split(">")
        weights.loc[child, parent] = weight
    return weights.iloc[:, :M].to_numpy(), weights.iloc[:, M:].to_numpy()


def cells_of(adata: ad.AnnData, label: str) -> np.ndarray:
    return (adata.obs["perturbation"] == label).to_numpy()


def doubles_of(truth: Truth) -> list[str]:
    return [c for c in truth.shifts.index if "+" in c]


def test_doubles_are_additive_in_the_mechanism(truth: Truth) -> None:
    tables = {**truth.tables, "log_sd": np.log(truth.tables["noise_sd"])}
    for label in doubles_of(truth):
        a, b = label.split("+")
        for name in ("edges", "means", "log_sd"):
            t = tables[name]
            np.testing.assert_allclose(t.loc[label], t.loc[a] + t.loc[b] - t.loc["control"], atol=1e-12)
    total = truth.tables["total_effects"]
    beyond = [np.abs(total.loc[d] - total.loc[d.split("+")].sum()).max() for d in doubles_of(truth)]
    assert np.median(beyond) > 0.3  # but not in what comes of it


def test_cuts(truth: Truth) -> None:
    np.testing.assert_array_equal(truth.tables["cut"], np.eye(6, N))
    for i in range(N):
        weights = np.hstack(mechanism(truth, f"P{i + 1:03d}"))
        assert not weights[i].any()
        assert np.hstack(mechanism(truth, "control"))[i].any()
    # the last two perturbations cut nothing
    edges = truth.tables["edges"]
    np.testing.assert_array_equal(edges.loc[["P005", "P006"]] != 0, edges.loc[["control", "control"]] != 0)


def test_targets(truth: Truth, dense: Truth) -> None:
    for some in (truth, dense):
        assert (some.mask.to_numpy() >= some.tables["cut"].to_numpy()).all()
        assert some.mask.any(axis=1).all()
        rows, control = list(some.mask.index), some.tables["means"].loc["control"]
        np.testing.assert_allclose(some.effects, some.tables["means"].loc[rows] - control, atol=1e-12)
        for name in ("means", "noise_sd"):
            changed = some.tables[name].loc[rows] != some.tables[name].loc["control"]
            np.testing.assert_array_equal(changed, some.mask == 1)
        edges = some.tables["edges"]
        for child in some.mask:
            columns = [c for c in edges if c.endswith(f">{child}") and edges.loc["control", c] != 0]
            changed = (edges.loc[rows, columns] != edges.loc["control", columns]).to_numpy()
            assert (changed == (some.mask[[child]].to_numpy() == 1)).all()
    assert abs(dense.mask.iloc[4:].to_numpy().mean() - (0.5 + 0.5**4 / 4)) < 0.06


def test_ranges(dense: Truth) -> None:
    singles = ["control", *dense.mask.index]
    weights = dense.tables["edges"].loc[singles].to_numpy()
    size = np.abs(weights[weights != 0])
    assert 0.2 <= size.min() < 0.22
    assert 0.98 < size.max() <= 1.0
    assert abs((weights[weights != 0] > 0).mean() - 0.5) < 0.06
    means, sd = dense.tables["means"].loc[singles].to_numpy(), dense.tables["noise_sd"].loc[singles].to_numpy()
    assert -2 <= means.min() < -1.9
    assert 1.9 < means.max() <= 2
    assert 0.5 <= sd.min() < 0.52
    assert 1.48 < sd.max() <= 1.5 + 1e-9


def test_graphs(truth: Truth) -> None:
    for name in ("graph", "invariant_graph"):
        graph = truth.tables[name]
        assert list(graph.index) == list(graph.columns)
        np.testing.assert_array_equal(np.tril(graph), 0)  # parent in row: only later variables are children
    np.testing.assert_array_equal(truth.tables["graph"].T, mechanism(truth, "control")[1])
    chances = {"edge_probability": 1.0, "background_probability": 0.0}
    full = read_truth(simulate_screen("causal", **{**SMALL, "n_oracle": 1, "n_genes": 2}, **chances, seed=0))
    assert (full.tables["graph"].to_numpy() != 0).sum() == 6
    assert not full.tables["invariant_graph"].to_numpy().any()
    assert ((mechanism(full, "control")[0] != 0).sum(axis=1) == 1).all()  # one parent in the background at least


def test_moments_are_those_of_the_closed_form(screen: ad.AnnData, truth: Truth) -> None:
    free = np.eye(M) - truth.tables["invariant_graph"].to_numpy().T
    cov_i = np.linalg.inv(free) @ np.linalg.inv(free).T
    z = screen.obsm["X_truth_latent"].astype(float)
    np.testing.assert_array_equal(screen.obsm["X_truth_basal"], screen.obsm["X_truth_latent"][:, :M])
    for label in ["control", *truth.shifts.index]:
        l_ni, l_nn = mechanism(truth, label)
        inverse = np.linalg.inv(np.eye(N) - l_nn)
        mean = inverse @ truth.tables["means"].loc[label].to_numpy()
        noise = np.diag(truth.tables["noise_sd"].loc[label].to_numpy() ** 2)
        cov = np.block(
            [
                [cov_i, cov_i @ l_ni.T @ inverse.T],
                [inverse @ l_ni @ cov_i, inverse @ (l_ni @ cov_i @ l_ni.T + noise) @ inverse.T],
            ]
        )
        found = z[cells_of(screen, label)]
        sd = np.sqrt(np.diag(cov))
        close = 5 / np.sqrt(len(found))
        assert np.abs(found.mean(axis=0) - np.r_[np.zeros(M), mean]).max() / sd.max() < close, label
        # standard error of a covariance is at most sqrt(2) sd_i sd_j / sqrt(n)
        assert (np.abs(np.cov(found.T) - cov) / np.outer(sd, sd)).max() < np.sqrt(2) * close, label
        np.testing.assert_allclose(
            truth.tables["total_effects"].loc[label],
            mean
            - np.linalg.inv(np.eye(N) - mechanism(truth, "control")[1])
            @ truth.tables["means"].loc["control"].to_numpy(),
            atol=1e-10,
        )


def test_pairs(screen: ad.AnnData, truth: Truth) -> None:
    pair = screen.obs["truth_pair"]
    control = cells_of(screen, "control")
    assert (pair[control].astype(str) == screen.obs_names[control]).all()
    where = screen.obs_names.get_indexer(pair.astype(str))
    assert control[where].all()
    np.testing.assert_array_equal(screen.obsm["X_truth_basal"], screen.obsm["X_truth_basal"][where])
    used = pair[~control].value_counts()
    assert used.max() - used.min() <= 1
    assert pair[cells_of(screen, "P001")].is_unique
    # the noise of what responds is everyone's own: given z_i, pairs have nothing in common
    label = "P006"
    rows = np.flatnonzero(cells_of(screen, label))
    both = []
    for index, name in ((rows, label), (where[rows], "control")):
        l_ni, l_nn = mechanism(truth, name)
        z = screen.obsm["X_truth_latent"][index]
        both.append(z[:, M:] - z[:, M:] @ l_nn.T - z[:, :M] @ l_ni.T - truth.tables["means"].loc[name].to_numpy())
    correlation = np.corrcoef(both[0].T, both[1].T)
    assert np.abs(correlation - np.eye(2 * N)).max() < 4.5 / np.sqrt(len(rows))


def test_values(screen: ad.AnnData, truth: Truth, decode) -> None:
    assert truth.shift_space == "identity"
    assert screen.X.dtype == np.float32
    clean = decode(truth, screen.obsm["X_truth_latent"].astype(float))
    noise = screen.X - clean
    assert abs(noise.std() - 0.1) < 0.001
    assert abs(noise.mean()) < 0.001
    controls = clean[cells_of(screen, "control")]
    np.testing.assert_allclose(controls.std(axis=0), 1, atol=0.06)
    assert np.abs(controls.mean(axis=0)).max() < 0.08
    # one-to-one: 11 to 64 and 64 to 80 both keep every direction
    assert [truth.decoder[f"layer{i}"].shape for i in (1, 2)] == [(11, 64), (64, 80)]
    for i in (1, 2):
        w = truth.decoder[f"layer{i}"]
        np.testing.assert_allclose(w @ w.T, np.eye(len(w)), atol=1e-10)
    assert (truth.decoder["scale"] > 0).all()


def test_oracle_of_values(screen: ad.AnnData, truth: Truth) -> None:
    fit = {}
    for label in ["control", *truth.shifts.index]:
        cells = screen.X[cells_of(screen, label)].astype(float)
        expected = truth.control_profile + (0 if label == "control" else truth.shifts.loc[label])
        # the oracle has its own draws: 3,000, of a shift between coupled cells
        error = cells.var(axis=0) * (1 / len(cells) + (label != "control") / 3000)
        fit[label] = ((cells.mean(axis=0) - expected) ** 2 / error).mean()
    assert 0.4 < np.mean(list(fit.values())) < 1.6
    assert max(fit.values()) < 4
    additive = np.array([truth.shifts.loc[d.split("+")].sum() for d in doubles_of(truth)])
    gap = np.linalg.norm(additive - truth.shifts.loc[doubles_of(truth)], axis=1)
    assert np.median(gap / np.linalg.norm(truth.shifts.loc[doubles_of(truth)], axis=1)) > 0.2


def test_counts(counts: ad.AnnData, rho, decode, log_cells, misfit) -> None:
    truth = read_truth(counts)
    assert sp.issparse(counts.X)
    assert (counts.X.data == np.round(counts.X.data)).all()
    assert truth.shift_space == "log1p_cp10k"
    assert set(counts.obs["batch"]) == {"batch1", "batch2"}
    mu = (
        rho(truth, counts.obsm["X_truth_latent"], counts.obs["batch"]) * counts.obs["truth_library"].to_numpy()[:, None]
    )
    x = counts.X.toarray()
    assert abs(x.sum() / mu.sum() - 1) < 0.01
    assert abs(((x - mu) ** 2 / (mu + mu**2 / truth.genes["theta"].to_numpy())).mean() - 1) < 0.05
    assert abs(np.log(counts.obs["truth_library"]).mean() - np.log(3000)) < 0.02
    controls = decode(truth, counts.obsm["X_truth_latent"][cells_of(counts, "control")].astype(float))
    np.testing.assert_allclose(controls.std(axis=0), 0.6, atol=0.08)
    assert truth.decoder["layer2"].shape == (64, 64)
    y, fit = log_cells(counts), {}
    for label in ["control", *truth.shifts.index]:
        expected = truth.control_profile + (0 if label == "control" else truth.shifts.loc[label])
        fit[label] = misfit(y[cells_of(counts, label)], expected).mean()
    assert 0.5 < np.mean(list(fit.values())) < 2
    assert max(fit.values()) < 5


def test_latents_do_not_depend_on_the_measurement(counts: ad.AnnData) -> None:
    values = simulate_screen("causal", **{**COUNTS, "n_oracle": 1}, seed=1)
    np.testing.assert_array_equal(values.obsm["X_truth_latent"], counts.obsm["X_truth_latent"])
    pd.testing.assert_series_equal(values.obs["truth_pair"], counts.obs["truth_pair"])


def test_counts_survive_storage(counts: ad.AnnData, tmp_path) -> None:
    counts.write_h5ad(tmp_path / "screen.h5ad")
    found, truth = read_truth(ad.read_h5ad(tmp_path / "screen.h5ad")), read_truth(counts)
    pd.testing.assert_frame_equal(found.genes, truth.genes, check_index_type=False)
    assert found.settings["counts"] is True
    np.testing.assert_array_equal(found.settings["noise_range"], [0.5, 1.5])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fixed_screens(seed: int) -> None:
    adata = simulate_screen("causal", n_oracle=1, seed=seed)
    truth, labels = read_truth(adata), adata.obs["perturbation"].astype(str)
    assert adata.n_vars == 500
    assert len(doubles_of(truth)) == 66
    training = ~labels.str.contains("+", regex=False)
    assert training.sum() == 3000
    assert adata.obs["truth_pair"][training & (labels != "control")].is_unique
    # environments enough to identify z_n: natural parameters differ from the controls' in all 2 d_n directions
    beta = truth.tables["noise_sd"] ** 2
    eta = np.hstack([truth.tables["means"] / beta, -0.5 / beta])
    assert np.linalg.matrix_rank((eta - eta[0])[1:13], tol=0.05) == 2 * N


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"n_controls": 0}, ValueError, "n_controls=0"),
        ({"n_latent_responsive": 0}, ValueError, "n_latent_responsive=0"),
        ({"target_probability": 1.5}, ValueError, "target_probability=1.5"),
        ({"weight_range": (-0.2, 1.0)}, ValueError, "weight_range=.*rising numbers of at least 0"),
        ({"noise_range": (0.0, 1.0)}, ValueError, "noise_range=.*rising numbers above 0"),
        ({"mean_range": (2.0, -2.0)}, ValueError, "mean_range=.*rising numbers"),
        ({"mean_range": 2.0}, ValueError, "mean_range=2.0"),
        ({"observation_sd": -0.1}, ValueError, "observation_sd=-0.1"),
        ({"n_latent": 4}, TypeError, "n_latent_responsive"),
    ],
)
def test_errors(settings: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        simulate_screen("causal", **{**SMALL, **settings})
