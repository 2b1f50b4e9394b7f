import subprocess
import sys
import warnings
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae import reference
from pertvae._expression import mean_profile
from pertvae._predictions import predicted_shifts

KEYS = ("perturbation", "ctrl")
CLASSES = {n: getattr(reference, n) for n in reference.__all__ if n != "Reference"}
# Two epochs of scVI, and the options that take another way through fit.
MADE = CLASSES | {
    "SCVIArithmetic": partial(reference.SCVIArithmetic, 4, max_epochs=2),
    "Additive in pca": partial(reference.Additive, "pca", n_components=8),
    "Linear with features": partial(reference.Linear, pd.DataFrame(np.eye(5, 3) + 0.5, index=[*"ABCDE"])),
}
every = pytest.mark.parametrize("make", MADE.values(), ids=MADE)


def same(a, b):
    assert (a.X != b.X).nnz == 0
    pd.testing.assert_frame_equal(a.obs, b.obs)


def test_no_torch():
    code = "import sys, pertvae.reference; print([m for m in ('torch', 'scvi', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@every
def test_prediction_has_the_layout_of_a_model(make, screen, tmp_path):
    before = screen.copy()
    fitted = make().fit(screen, *KEYS, covariates=["batch"])
    cls = type(fitted)
    labels = ["B+A", "A", "ctrl+B"]
    pred = fitted.predict_perturbation(labels, n_cells=70)
    assert pred.shape == (3 * 70 + 70, screen.n_vars)
    generated = pred[pred.obs["generated"]]
    assert list(dict.fromkeys(generated.obs["perturbation"])) == labels
    assert list(pred.obs["perturbation"].iloc[-70:].unique()) == ["ctrl"]
    assert not pred.obs["generated"].iloc[-70:].any()
    source = screen[pred.obs["source_cell"].iloc[-70:].to_numpy()]
    assert (source.X != pred.X[-70:]).nnz == 0
    assert (source.obs["batch"].to_numpy() == pred.obs["batch"].iloc[-70:].to_numpy()).all()
    for label in labels:
        block = generated[generated.obs["perturbation"] == label]
        assert set(block.obs["source_cell"]) == set(source.obs_names)
    assert sp.isspmatrix_csr(pred.X)
    assert (pred.X.data == np.round(pred.X.data)).all()
    assert (pred.X.data > 0).all()
    info = pred.uns["pertvae"]
    assert info["model"] == cls.__name__
    assert info["value_kind"] == "counts"
    controls = screen.X[(screen.obs["perturbation"] == "ctrl").to_numpy()]
    np.testing.assert_allclose(fitted.control_profile_, mean_profile(controls))
    if cls is reference.SCVIArithmetic:  # its cells are sampled: the shift is theirs, and so is the profile
        assert "control_profile" not in info
        same(fitted.predict_perturbation(labels, n_cells=70), pred)
    else:
        np.testing.assert_allclose(info["control_profile"], mean_profile(controls))
        pd.testing.assert_frame_equal(predicted_shifts(pred), fitted.predict_shift(labels), check_column_type=False)
    assert f"{cls.__name__.lower()}_predictions" in pred.uns
    pred.write_h5ad(tmp_path / "x.h5ad")
    back = ad.read_h5ad(tmp_path / "x.h5ad")
    np.testing.assert_array_equal(predicted_shifts(back), predicted_shifts(pred))
    assert list(predicted_shifts(back).columns) == list(screen.var_names)
    assert list(predicted_shifts(back).index) == labels
    assert back.uns["pertvae"]["seed"] == 0
    # nothing was written to the screen
    pd.testing.assert_frame_equal(screen.obs, before.obs)
    assert not screen.uns
    assert (screen.X != before.X).nnz == 0


@every
def test_only_training_cells_count(make, screen):
    rng = np.random.default_rng(0)
    screen.obs["split"] = rng.choice(["train", "val", "ood"], screen.n_obs, p=[0.7, 0.1, 0.2])
    fitted = make().fit(screen, *KEYS, "split")
    other = screen.copy()
    outside = (other.obs["split"] != "train").to_numpy()
    x = other.X.toarray()
    x[outside] = rng.integers(0, 500, (int(outside.sum()), other.n_vars))
    other.X = sp.csr_matrix(x)
    subset = screen[~outside].copy()
    for again in (make().fit(other, *KEYS, "split"), make().fit(subset, *KEYS)):
        pd.testing.assert_frame_equal(again.predict_shift(["A+B", "B"]), fitted.predict_shift(["A+B", "B"]))
        same(again.predict_perturbation("A+B"), fitted.predict_perturbation("A+B"))


@every
def test_dense_sparse_layer_and_backed_agree(make, screen, tmp_path):
    expected = make().fit(screen, *KEYS).predict_perturbation(["A", "A+B"], n_cells=20)
    dense = screen.copy()
    dense.X = dense.X.toarray()
    layered = screen.copy()
    layered.layers["counts"] = layered.X.copy()
    layered.X = layered.X * 0.5
    screen.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    for data, layer in ((dense, None), (layered, "counts"), (backed, None)):
        got = make().fit(data, *KEYS, layer=layer).predict_perturbation(["A", "A+B"], n_cells=20)
        same(got, expected)
        np.testing.assert_allclose(predicted_shifts(got), predicted_shifts(expected), atol=1e-12)


@pytest.mark.parametrize("name", CLASSES)
def test_the_call_of_the_benchmark(name, screen):
    """Contexts, batches, and components that no training cell has, which add nothing."""
    screen.obs["cell"] = np.where(np.arange(screen.n_obs) % 2, "x", "y")
    fitted = MADE[name]().fit(
        screen, "perturbation", ["ctrl"], split_key=None, sep="+", labels_key="cell", batch_key="batch"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pred = fitted.predict_perturbation(["Unseen+A", "A"], n_cells=60, labels="x", unseen="ignore", seed=0)
    nothing_is_unknown = fitted._predictable() is None
    assert [w for w in caught if "'Unseen' contribute nothing" in str(w.message)] or nothing_is_unknown
    assert list(pred.uns["pertvae"]["ignored"]) == ([] if nothing_is_unknown else ["Unseen"])
    assert (screen.obs.loc[pred.obs["source_cell"], "cell"] == "x").all()
    shifts = predicted_shifts(pred).to_numpy()
    if name == "SCVIArithmetic":  # other draws under another label
        assert np.corrcoef(shifts)[0, 1] > 0.5
    elif name != "MatchingMean":
        np.testing.assert_allclose(shifts[0], shifts[1])


def test_draws_depend_on_seed_label_and_cell_alone(screen):
    fitted = reference.RidgeAdditive().fit(screen, *KEYS)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    alone = fitted.predict_perturbation("A+B", n_cells=300)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert alone.n_obs == 300 + 150
    together = fitted.predict_perturbation(["C", "B+ctrl+A"], n_cells=300)
    block = together[together.obs["perturbation"] == "B+ctrl+A"]
    assert (block.X != alone.X[:300]).nnz == 0
    fewer = fitted.predict_perturbation("A+B", n_cells=90)
    assert (fewer.X[:90] != alone.X[:90]).nnz == 0
    assert (fitted.predict_perturbation("A+B", n_cells=300, seed=1).X != alone.X).nnz > 0
    sources = alone.obs["source_cell"].iloc[:300]
    assert sources.iloc[:150].is_unique
    assert sources.value_counts().max() > 1


def test_contexts_are_compared_with_their_own_controls():
    """No effect at all, but a context with its own profile in which one perturbation was mostly done."""
    rng = np.random.default_rng(1)
    rate = {"K562": rng.lognormal(0, 1, 40), "RPE1": rng.lognormal(0, 1, 40)}
    plan = {("ctrl", "K562"): 200, ("ctrl", "RPE1"): 200, ("A", "K562"): 270, ("A", "RPE1"): 30}
    obs = pd.DataFrame(np.repeat(list(plan), list(plan.values()), axis=0), columns=["perturbation", "cell"])
    obs.index = [f"c{i}" for i in range(len(obs))]
    x = rng.poisson(np.stack([rate[c] for c in obs["cell"]]) * 5)
    data = ad.AnnData(sp.csr_matrix(x.astype(np.float32)), obs=obs)
    pooled = reference.Mean().fit(data, *KEYS).predict_shift("A")
    matched = reference.Mean().fit(data, *KEYS, labels_key="cell")
    assert np.linalg.norm(matched.predict_shift("A")) < 0.2 * np.linalg.norm(pooled)
    pred = matched.predict_perturbation("A", labels="RPE1", n_cells=10)
    assert (data.obs.loc[pred.obs["source_cell"], "cell"] == "RPE1").all()
    inside = ((data.obs["cell"] == "RPE1") & (data.obs["perturbation"] == "ctrl")).to_numpy()
    np.testing.assert_allclose(pred.uns["pertvae"]["control_profile"], mean_profile(data.X[inside]))
    with pytest.raises(KeyError, match="Did you mean 'RPE1'"):
        matched.predict_perturbation("A", labels="RPE")


def test_source_cells_of_the_caller(screen):
    fitted = reference.Additive().fit(screen, *KEYS, covariates=["batch"])
    other = screen[:, ::-1][:100].copy()
    other.obs_names = [f"new{i}" for i in range(100)]
    pred = fitted.predict_perturbation("A", other)
    assert set(pred.obs["source_cell"]) == set(other.obs_names[(other.obs["perturbation"] == "ctrl").to_numpy()])
    assert list(pred.var_names) == list(screen.var_names)
    mask = np.zeros(100, dtype=bool)
    mask[[3, 5]] = True
    for rows in (mask, [3, 5], [-97, -95]):
        pred = fitted.predict_perturbation("A", other, rows, n_cells=4)
        assert set(pred.obs["source_cell"]) == {"new3", "new5"}
    with pytest.raises(KeyError, match="lacks 1 genes.*HLA-A/B"):
        fitted.predict_perturbation("A", other[:, 1:])
    with pytest.raises(ValueError, match="no source cells"):
        fitted.predict_perturbation("A", other, [])
    with pytest.raises(ValueError, match="but adata has 100 cells"):
        fitted.predict_perturbation("A", other, [100])
    with pytest.raises(ValueError, match="indices need adata"):
        fitted.predict_perturbation("A", indices=[1])
    with pytest.raises(ValueError, match="Pass indices"):
        fitted.predict_perturbation("A", other[(other.obs["perturbation"] != "ctrl").to_numpy()])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"perturbation_key": "perturbatio"}, KeyError, "Did you mean 'perturbation'"),
        ({"control": "NT"}, ValueError, "Commonest labels: 'ctrl'"),
        ({"split_key": "splt"}, KeyError, "Did you mean 'split'"),
        ({"layer": "count"}, KeyError, "Did you mean 'counts'"),
        ({"labels_key": "cel"}, KeyError, "labels_key='cel'"),
        ({"covariates": ["batc"]}, KeyError, "Did you mean 'batch'"),
        ({"batch_key": "batc"}, KeyError, "batch_key='batc'.*Did you mean 'batch'"),
    ],
)
def test_fit_errors(change, error, match, screen):
    screen.obs["split"] = "train"
    screen.layers["counts"] = screen.X.copy()
    with pytest.raises(error, match=match):
        reference.Mean().fit(screen, **{"perturbation_key": "perturbation", "control": "ctrl", **change})


def test_bad_splits_and_counts(screen):
    screen.obs["split"] = ["holdout"] + ["train"] * (screen.n_obs - 1)
    with pytest.raises(ValueError, match="'holdout'"):
        reference.Mean().fit(screen, *KEYS, "split")
    screen.obs["split"] = [None] + ["train"] * (screen.n_obs - 1)
    with pytest.raises(ValueError, match="1 missing"):
        reference.Mean().fit(screen, *KEYS, "split")
    screen.obs["split"] = "test"
    with pytest.raises(ValueError, match="no 'train' cells"):
        reference.Mean().fit(screen, *KEYS, "split")
    only = screen[screen.obs["perturbation"] == "ctrl"].copy()
    with pytest.raises(ValueError, match="no effect to learn"):
        reference.Mean().fit(only, *KEYS)
    reference.NoChange().fit(only, *KEYS)
    for dense in (False, True):
        bad = screen.copy()
        bad.X = bad.X.toarray()
        bad.X[7, 3] = -2
        bad.X = bad.X if dense else sp.csr_matrix(bad.X)
        with pytest.raises(ValueError, match=f"-2.* in cell '{bad.obs_names[7]}', gene 'gene3'"):
            reference.Mean().fit(bad, *KEYS)
    screen.layers["counts"] = screen.X.copy()
    screen.X = screen.X * 0.3
    with pytest.warns(UserWarning, match="layer='counts'"):
        reference.Mean().fit(screen, *KEYS)


def test_predict_errors(screen):
    with pytest.raises(RuntimeError, match="not fitted"):
        reference.Mean().predict_shift("A")
    fitted = reference.Additive().fit(screen, *KEYS)
    with pytest.raises(ValueError, match="n_cells=0"):
        fitted.predict_perturbation("A", n_cells=0)
    with pytest.raises(ValueError, match="perturbations is empty"):
        fitted.predict_perturbation([])
    with pytest.raises(ValueError, match="unseen='skip'"):
        fitted.predict_perturbation("A", unseen="skip")
    with pytest.raises(TypeError, match="no doses"):
        fitted.predict_perturbation(pd.DataFrame({"A": [1.0]}))
    with pytest.raises(ValueError, match="labels_key"):
        fitted.predict_perturbation("A", labels="K562")
