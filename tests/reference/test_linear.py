import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae import reference

KEYS = ("perturbation", "ctrl")


def table(**rows):
    return pd.DataFrame(rows, dtype=float).T


def planted(rank=3, n_features=4, genes=80, n_training=40, n_new=10, cells=60, seed=0):
    """Counts whose log rates are G W P' + b, with features of perturbations that have no cells."""
    rng = np.random.default_rng(seed)
    names = [f"P{i:02d}" for i in range(n_training + n_new)]
    features = pd.DataFrame(rng.normal(0, 1, (len(names), n_features)), index=names)
    features -= features.iloc[:n_training].mean()
    effect = rng.normal(0, 0.35, (n_features, rank)) @ rng.normal(0, 0.5, (rank, genes))
    base, common = rng.normal(3, 0.5, genes), rng.normal(0, 0.3, genes)
    rate = np.exp(base + common + features.to_numpy() @ effect)
    x, labels = [rng.poisson(np.exp(base), (300, genes))], ["ctrl"] * 300
    for name, r in zip(names[:n_training], rate, strict=False):
        x.append(rng.poisson(r, (cells, genes)))
        labels += [name] * cells
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    adata = ad.AnnData(sp.csr_matrix(np.concatenate(x), dtype=np.float32), obs=obs)

    def profile(r):
        return np.log1p(1e4 * r / r.sum(axis=-1, keepdims=True))

    truth = pd.DataFrame(profile(rate) - profile(np.exp(base)), index=names)
    return adata, features, truth, names[n_training:]


def test_perturbations_without_cells_are_predicted_from_features():
    adata, features, truth, new = planted()
    assert not set(new) & set(adata.obs["perturbation"])
    fitted = reference.Linear(features, n_components=3).fit(adata, *KEYS)
    mean = reference.Mean().fit(adata, *KEYS)
    error = np.linalg.norm(fitted.predict_shift(new) - truth.loc[new].to_numpy(), axis=1)
    assert error.mean() < 0.3 * np.linalg.norm(mean.predict_shift(new) - truth.loc[new].to_numpy(), axis=1).mean()
    pred = fitted.predict_perturbation([*new, f"{new[0]}+{new[1]}"], n_cells=20)
    assert pred.n_obs == 12 * 20
    assert fitted.params_["features"] == "given"
    with pytest.raises(KeyError, match="Did you mean 'P45'.*Linear needs a row of features"):
        fitted.predict_shift("P50")


def test_the_embeddings_of_a_combination_are_added():
    adata, features, _, new = planted(n_new=3)
    fitted = reference.Linear(features).fit(adata, *KEYS)
    a, b, both = fitted.predict_shift([new[0], new[1], f"{new[0]}+{new[1]}"]).to_numpy()
    center = reference.Mean().fit(adata, *KEYS).predict_shift("x").to_numpy()[0]
    np.testing.assert_allclose(both - center, (a - center) + (b - center), atol=1e-10)
    assert not fitted.predict_shift("ctrl").to_numpy().any()


def test_own_genes_where_components_are_genes(screen):
    """Half of the components are genes of the screen; the others, and what holds them, are left out."""
    names = {"A": "gene1", "B": "gene2", "C": "gene3", "D": "gene4"}
    screen.obs["perturbation"] = ["+".join(names.get(c, c) for c in v.split("+")) for v in screen.obs["perturbation"]]
    fitted = reference.Linear().fit(screen, *KEYS)
    assert fitted.params_["features"] == "own genes"
    assert fitted.params_["n_left_out"] == 1  # gene3+E
    assert fitted.params_["n_conditions"] == 7
    shifts = fitted.predict_shift(["gene50", "gene51+gene1", "gene51"]).to_numpy()  # never perturbed
    assert np.ptp(shifts, axis=0).max() > 0.01
    without = reference.Linear().fit(screen[~screen.obs["perturbation"].str.contains("E")].copy(), *KEYS)
    np.testing.assert_allclose(without.predict_shift(["gene50", "gene51+gene1", "gene51"]), shifts, atol=1e-10)
    with pytest.raises(KeyError, match="by the gene of its name"):
        fitted.predict_shift("E")
    forced = reference.Linear("indicators").fit(screen, *KEYS)
    assert forced.params_ == {
        "features": "indicators",
        "n_components": 7,
        "penalty": 0.1,
        "n_conditions": 8,
        "n_left_out": 0,
    }
    with pytest.raises(KeyError, match="pass features to predict unseen"):
        forced.predict_shift("gene50")
    forced.predict_shift("E")


def test_indicators_reach_additive_when_nothing_is_lost(screen):
    """All components, hardly a penalty, singles only: each single is fitted, and a pair adds the deviations."""
    singles = screen[~screen.obs["perturbation"].isin(["B+A", "A+C", "B+D", "C+E"])].copy()
    fitted = reference.Linear(n_components=20, penalty=1e-9).fit(singles, *KEYS)
    assert fitted.params_["features"] == "indicators"
    assert fitted.params_["n_components"] == 3  # of four centred rows
    additive = reference.Additive().fit(singles, *KEYS)
    np.testing.assert_allclose(fitted.predict_shift([*"ABCD"]), additive.predict_shift([*"ABCD"]), atol=1e-6)
    center = reference.Mean().fit(singles, *KEYS).predict_shift("x").to_numpy()
    expected = additive.predict_shift("A+B").to_numpy() - center
    np.testing.assert_allclose(fitted.predict_shift("A+B"), expected, atol=1e-6)


@pytest.mark.parametrize("features", [None, "own genes", table(A=[1, 2])])
def test_a_single_condition_is_its_mean(features, screen):
    one = screen[screen.obs["perturbation"].isin(["ctrl", "A+ctrl"])].copy()
    if isinstance(features, str):
        one.var_names = ["A", *one.var_names[1:]]
    fitted = reference.Linear(features).fit(one, *KEYS)
    np.testing.assert_allclose(fitted.predict_shift("A"), reference.Mean().fit(one, *KEYS).predict_shift("A"))
    assert fitted.params_["n_components"] == 0


def test_a_strong_penalty_leaves_the_mean(screen):
    mean = reference.Mean().fit(screen, *KEYS).predict_shift(["A", "C+E"])
    fitted = reference.Linear(penalty=1e9).fit(screen, *KEYS)
    np.testing.assert_allclose(fitted.predict_shift(["A", "C+E"]), mean, atol=1e-5)


def test_the_features_of_the_caller_stay(screen):
    features = pd.DataFrame({"f": [1, 2, 3]}, index=[*"ABC"])
    before = features.copy()
    reference.Linear(features).fit(screen, *KEYS)
    pd.testing.assert_frame_equal(features, before)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_components": 0}, "n_components=0"),
        ({"penalty": 0}, "penalty=0"),
        ({"features": "genes"}, "features='genes'"),
        ({"features": np.eye(2)}, "pass a DataFrame"),
        ({"features": pd.DataFrame(index=["A"])}, r"shape \(1, 0\)"),
        ({"features": pd.DataFrame({"f": [1, 2]}, index=["A", "A"])}, "two rows or more named 'A'"),
        ({"features": pd.DataFrame({"f": ["x"]}, index=["A"])}, r"features\['f'\] is not a column of numbers"),
        ({"features": table(A=[1, 2], B=[3, np.nan])}, "holds nan for 'B' in column '1'"),
    ],
)
def test_constructor_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        reference.Linear(**kwargs)


def test_features_that_match_nothing(screen):
    with pytest.raises(ValueError, match="No training condition has a row of features.*'A'"):
        reference.Linear(table(X=[1, 2], Y=[0, 1])).fit(screen, *KEYS)
    with pytest.raises(ValueError, match="No training condition has a gene of the fit"):
        reference.Linear("own genes").fit(screen, *KEYS)
