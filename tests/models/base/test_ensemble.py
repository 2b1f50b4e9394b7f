"""Several models predicting together: a mixture of their cells, the mean of their shifts."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi

import pertvae as pv
from pertvae._expression import mean_profile
from pertvae._predictions import predicted_shifts
from pertvae._storage import read_table
from pertvae.datasets import read_truth

CONTROL = "control"
FAST = {"batch_size": 64, "accelerator": "cpu", "enable_progress_bar": False}


def dense(x):
    return x.toarray() if sp.issparse(x) else np.asarray(x)


def register(cls, adata, **setup):
    cls.setup_anndata(adata, **{"perturbation_key": "perturbation", "control": CONTROL, "batch_key": "batch"} | setup)


def fit(cls, adata, seed=0, epochs=2, setup=None, train=None, **arguments):
    register(cls, adata, **(setup or {}))
    scvi.settings.seed = seed
    model = cls(adata, **({"n_latent": 4, "n_hidden": 16} | arguments))
    model.train(epochs, **FAST, **(train or {}))
    return model


@pytest.fixture(scope="module")
def screen():
    adata = pv.datasets.simulate_screen(
        n_genes=40, n_perturbations=5, n_doubles=3, cells_per_perturbation=25, cells_per_double=20, n_controls=50,
        n_latent=4, n_oracle=400, effect_size=4.0, mask_density=0.4, seed=1,
    )  # fmt: skip
    adata.obs["dose"] = 1.0
    return adata


@pytest.fixture(scope="module")
def models(screen):
    """Three models of two classes on one AnnData, each registered in turn."""
    adata = screen.copy()
    return [fit(pv.SAMSVAE, adata, 0), fit(pv.CPAVAE, adata, 1), fit(pv.SAMSVAE, adata, 2)]


@pytest.fixture(autouse=True)
def _clean(request):
    yield
    if "models" in request.fixturenames:
        uns = request.getfixturevalue("models")[0].adata.uns
        for key in [k for k in uns if k.startswith("ensemble_") or k == "mine"]:
            del uns[key]


ASKED = ["P002+P001", "P004"]


def generated(predicted, label=None):
    keep = predicted.obs["generated"].to_numpy(dtype=bool)
    if label is not None:
        keep = keep & (predicted.obs["perturbation"] == label).to_numpy()
    return predicted[keep]


def by_source(predicted, label):
    part = generated(predicted, label)
    return pd.DataFrame(dense(part.X), index=part.obs["source_cell"].astype(str)), part.layers["mean"]


def test_layout_is_that_of_one_model(models):
    alone = models[0].predict_perturbation(ASKED, n_cells=20, seed=3, key_added=None)
    made = pv.predict_ensemble(models, ASKED, n_cells=20, seed=3)
    assert made.shape == alone.shape
    assert list(made.obs_names) == list(alone.obs_names)
    columns = list(alone.obs)
    assert [c for c in made.obs if c not in columns] == ["ensemble_member"]
    pd.testing.assert_frame_equal(made.obs[columns], alone.obs)  # the same source cells, in the same order
    pd.testing.assert_frame_equal(made.var, alone.var)
    assert sp.issparse(made.X)
    assert made.X.dtype == np.float32
    rest = ~made.obs["generated"].to_numpy()
    np.testing.assert_array_equal(dense(made[rest].X), dense(alone[rest].X))
    np.testing.assert_array_equal(made[rest].layers["mean"], alone[rest].layers["mean"])
    assert (made.obs.loc[rest, "ensemble_member"] == -1).all()
    provenance = made.uns["pertvae"]
    assert provenance["model"] == "ensemble"
    assert list(provenance["members"]) == ["SAMSVAE", "CPAVAE", "SAMSVAE"]
    assert list(provenance["member_cells"]) == [7, 7, 6]
    assert provenance["seed"] == 3
    settings = provenance["settings"]
    assert (settings["n_cells"], settings["n_source_cells"], settings["basal"]) == (20, 50, "control")
    assert set(settings) == set(alone.uns["pertvae"]["settings"])


def test_cells_are_shared_out_evenly_and_at_random(models):
    made = pv.predict_ensemble(models, ASKED, n_cells=44)
    members = [generated(made, label).obs["ensemble_member"].to_numpy() for label in ASKED]
    np.testing.assert_array_equal(*members)  # a source cell has one model, whatever is asked
    assert np.bincount(members[0]).tolist() == [15, 15, 14]
    assert 15 < np.count_nonzero(np.diff(members[0])) < 44  # neither blocks nor turns
    other = generated(pv.predict_ensemble(models, ASKED, n_cells=44, seed=1), ASKED[0]).obs["ensemble_member"]
    assert not np.array_equal(members[0], other)


@pytest.mark.parametrize("n_cells", [44, 50, 80])
def test_each_cell_is_the_one_its_model_predicts(models, n_cells):
    """Also where source cells are used again: their copies are other draws, as with one model."""
    made = pv.predict_ensemble(models, ASKED, n_cells=n_cells, seed=4, library_size="observed")
    n_checked = 0
    for label in ASKED:
        block = generated(made, label)
        member = block.obs["ensemble_member"].to_numpy()
        copies = pd.DataFrame({"source": block.obs["source_cell"].astype(str).to_numpy(), "member": member})
        whole = copies.groupby("source")["member"].transform("nunique").to_numpy() == 1
        assert whole.sum() >= n_cells - (0 if n_cells <= 50 else 8)
        for k, model in enumerate(models):
            own = generated(
                model.predict_perturbation(ASKED, n_cells=n_cells, seed=4, library_size="observed", key_added=None),
                label,
            )
            rows = (member == k) & whole
            np.testing.assert_array_equal(dense(block[rows].X), dense(own[rows].X))
            np.testing.assert_allclose(block[rows].layers["mean"], own[rows].layers["mean"], rtol=1e-5)
            assert not np.array_equal(dense(block[~rows].X), dense(own[~rows].X))
            n_checked += rows.sum()
    assert n_checked >= 2 * (n_cells - 8)


def test_shift_is_the_mean_of_the_members_shifts(models):
    """Of each member from its own cells; where the number of models divides the cells, the plain mean."""
    made = pv.predict_ensemble(models, ASKED, n_cells=45, seed=2)
    shift = predicted_shifts(made)
    assert list(shift.index) == ASKED
    names = models[0].adata.obs_names
    block = generated(made, ASKED[0]).obs
    own = []
    for k, model in enumerate(models):
        cells = names.get_indexer(block.loc[block["ensemble_member"] == k, "source_cell"].astype(str))
        own.append(predicted_shifts(model.predict_perturbation(ASKED, indices=cells, seed=2, key_added=None)))
    np.testing.assert_allclose(shift, sum(own) / 3, atol=1e-6)
    assert np.abs(own[0] - own[1]).max().max() > 1e-3


def test_shift_is_that_of_the_whole_block(models):
    made = pv.predict_ensemble(models, [*ASKED, CONTROL], n_cells=50, library_size="observed")  # 17, 17 and 16 cells
    zero = mean_profile(dense(generated(made, CONTROL).X))
    for label in ASKED:
        expected = mean_profile(dense(generated(made, label).X)) - zero
        np.testing.assert_allclose(predicted_shifts(made).loc[label], expected, atol=1e-5)
    np.testing.assert_array_equal(predicted_shifts(made).loc[CONTROL], 0.0)


def test_equal_models_predict_as_one(models):
    """A mixture of a model with itself is the model."""
    alone = models[0].predict_perturbation(ASKED, seed=5, key_added=None)
    made = pv.predict_ensemble([models[0]] * 3, ASKED, seed=5)
    np.testing.assert_array_equal(dense(made.X), dense(alone.X))
    np.testing.assert_allclose(predicted_shifts(made), predicted_shifts(alone), atol=1e-5)


def test_the_mean_shift_is_nearer_to_the_truth_than_the_models_are(screen):
    """By convexity of the norm, whatever the models; with models that differ, by a margin."""
    adata = screen.copy()
    fitted = [fit(pv.CPAVAE, adata, seed, epochs=40, train={"plan_kwargs": {"lr": 3e-3}}) for seed in range(3)]
    truth = read_truth(screen).shifts
    labels = list(truth.index)
    predicted = pv.predict_ensemble(fitted, labels, n_cells=150)
    block = generated(predicted, labels[0]).obs
    made = predicted_shifts(predicted)
    target = truth.loc[labels, made.columns].to_numpy()
    of_mean = np.linalg.norm(made - target, axis=1)
    distances = []
    for k, model in enumerate(fitted):
        cells = adata.obs_names.get_indexer(block.loc[block["ensemble_member"] == k, "source_cell"].astype(str))
        own = model.predict_perturbation(labels, indices=cells, n_cells=len(cells), key_added=None)
        distances.append(np.linalg.norm(predicted_shifts(own) - target, axis=1))
    assert (of_mean <= np.mean(distances, axis=0) + 1e-5).all()
    assert of_mean.mean() < 0.97 * np.mean(distances)
    assert of_mean.mean() < 0.7 * np.linalg.norm(target, axis=1).mean()  # they did learn something


def test_determinism(models):
    made = pv.predict_ensemble(models, ASKED, n_cells=80, seed=7)
    again = pv.predict_ensemble(models, ASKED[::-1], n_cells=80, seed=7, batch_size=13)
    for label in ASKED:
        np.testing.assert_array_equal(dense(generated(made, label).X), dense(generated(again, label).X))
    pd.testing.assert_frame_equal(predicted_shifts(made), predicted_shifts(again).loc[ASKED])
    other = pv.predict_ensemble(models, ASKED, n_cells=80, seed=8)
    assert not np.array_equal(dense(generated(made).X), dense(generated(other).X))


def test_models_do_not_depend_on_their_order_of_source_cells(models):
    controls = np.flatnonzero(models[0].adata.obs["perturbation"] == CONTROL)
    made = pv.predict_ensemble(models, "P001", indices=controls)
    turned = pv.predict_ensemble(models, "P001", indices=controls[::-1])
    frames = [by_source(p, "P001")[0] for p in (made, turned)]
    pd.testing.assert_frame_equal(frames[1].loc[frames[0].index], frames[0])


def test_what_is_written(models):
    adata = models[0].adata
    before = set(adata.uns)
    pv.predict_ensemble(models, "P001", key_added=None)
    assert set(adata.uns) == before
    pv.predict_ensemble(models, ASKED)
    shift = predicted_shifts(pv.predict_ensemble(models, ["P001", ASKED[0]], seed=3))
    assert set(adata.uns) - before == {"ensemble_predictions", "ensemble_predictions_names"}
    stored = read_table(adata.uns, "ensemble_predictions")
    assert sorted(stored.index) == sorted([*ASKED, "P001"])
    np.testing.assert_array_equal(stored.loc[shift.index], shift)
    pv.predict_ensemble(models, "P001", key_added="mine")
    assert list(read_table(adata.uns, "mine").index) == ["P001"]


def test_survives_the_disk(models, tmp_path):
    made = pv.predict_ensemble(models, ASKED, n_cells=20)
    made.write_h5ad(tmp_path / "p.h5ad")
    read = ad.read_h5ad(tmp_path / "p.h5ad")
    assert list(read.uns["pertvae"]["members"]) == ["SAMSVAE", "CPAVAE", "SAMSVAE"]
    assert read.obs["ensemble_member"].tolist() == made.obs["ensemble_member"].tolist()
    pd.testing.assert_frame_equal(predicted_shifts(read), predicted_shifts(made), check_column_type=False)


@pytest.mark.parametrize("output", ["counts", "mean"])
def test_streaming_equals_memory(models, tmp_path, output):
    path = tmp_path / "predicted.h5ad"
    memory = pv.predict_ensemble(models, ASKED, n_cells=20, output=output)
    streamed = pv.predict_ensemble(models, ASKED, n_cells=20, output=output, out=str(path))
    assert streamed.isbacked
    streamed.file.close()
    assert list(tmp_path.iterdir()) == [path]
    read = ad.read_h5ad(path)
    np.testing.assert_array_equal(dense(read.X), dense(memory.X))
    assert list(read.obs_names) == list(memory.obs_names)
    assert read.obs["ensemble_member"].tolist() == memory.obs["ensemble_member"].tolist()
    pd.testing.assert_frame_equal(predicted_shifts(read), predicted_shifts(memory), check_column_type=False)


def test_a_failed_stream_leaves_no_file(models, tmp_path, monkeypatch):
    monkeypatch.setattr(type(models[1]), "_profile", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pv.predict_ensemble(models, "P001", out=str(tmp_path / "predicted.h5ad"))
    assert list(tmp_path.iterdir()) == []


def test_options_of_one_model(models):
    adata = models[0].adata
    made = pv.predict_ensemble(models, "P001", output="mean", batch="batch1", n_cells=9)
    assert made.uns["pertvae"]["value_kind"] == "mean"
    assert set(made.obs["batch"]) == {"batch1"}
    assert made.uns["pertvae"]["settings"]["batch"] == "batch1"
    libraries = np.linspace(100, 900, 50)
    made = generated(pv.predict_ensemble(models, "P001", library_size=libraries))
    controls = adata.obs_names[adata.obs["perturbation"] == CONTROL]
    expected = pd.Series(libraries, controls).loc[made.obs["source_cell"].astype(str)]
    np.testing.assert_allclose(made.layers["mean"].sum(1), expected, rtol=1e-3)
    with pytest.warns(UserWarning, match="'P999'.*contribute nothing"):
        made = pv.predict_ensemble(models, "P999", unseen="ignore")
    assert list(made.uns["pertvae"]["unknown"]) == ["P999"]
    doses = pd.DataFrame({"P001": [0.0, 2.0]}, index=["none", "twice"])
    shifts = predicted_shifts(pv.predict_ensemble(models, doses, library_size="observed"))
    np.testing.assert_array_equal(shifts.loc["none"], 0.0)
    assert np.abs(shifts.loc["twice"]).max() > 0


def test_settings_that_differ_are_named(models):
    adata = models[0].adata
    mixed = [models[0], fit(pv.SVAEPlus, adata)]
    made = pv.predict_ensemble(mixed, "P001", n_cells=10)
    assert made.uns["pertvae"]["settings"]["basal"] == "control, prior"
    with pytest.raises(ValueError, match="basal='control' is not offered by SVAEPlus"):
        pv.predict_ensemble(mixed, "P001", basal="control")


def test_fewer_source_cells_than_models(models):
    cell = [int(np.flatnonzero(models[0].adata.obs["perturbation"] == CONTROL)[0])]
    made = pv.predict_ensemble(models, "P001", indices=cell)
    assert generated(made).obs["ensemble_member"].tolist() == [0, 1, 2]
    assert made.n_obs == 4


def test_data_of_the_models_and_other_data(models, screen, tmp_path):
    models[1].save(str(tmp_path / "m"))
    loaded = pv.CPAVAE.load(str(tmp_path / "m"), adata=models[0].adata.copy())
    here = pv.predict_ensemble(models[:2], ASKED, n_cells=30)
    there = pv.predict_ensemble([models[0], loaded], ASKED, n_cells=30)
    np.testing.assert_array_equal(dense(here.X), dense(there.X))
    query = screen[screen.obs["perturbation"] == CONTROL][:20].copy()
    made = pv.predict_ensemble(models, "P001", query)
    assert generated(made).obs["source_cell"].tolist() == list(query.obs_names)
    assert "ensemble_predictions" in query.uns


def test_errors(models, screen):
    for arguments, message in (
        ((models[:1], "P001"), r"1 model\(s\): an ensemble needs two or more"),
        ((models[0], "P001"), "two or more"),
        (([], "P001"), r"0 model\(s\)"),
        (([models[0], pv.SAMSVAE], "P001"), r"models\[1\] is .*SAMSVAE.*not a model"),
        ((models, "P0O1"), "'P001'"),
    ):
        with pytest.raises(ValueError, match=message):
            pv.predict_ensemble(*arguments)
    with pytest.raises(ValueError, match="n_cells=2 is too few for 3 models"):
        pv.predict_ensemble(models, "P001", n_cells=2)
    with pytest.raises(ValueError, match=r"library_size has shape \(3,\).*50 source cells"):
        pv.predict_ensemble(models, "P001", library_size=np.ones(3))
    with pytest.raises(TypeError, match="n_cels"):
        pv.predict_ensemble(models, "P001", n_cels=3)
    register(pv.SAMSVAE, models[0].adata)
    untrained = pv.SAMSVAE(models[0].adata)
    with pytest.raises(RuntimeError):
        pv.predict_ensemble([models[0], untrained], "P001")


def _without(adata, label):
    return adata[~adata.obs["perturbation"].astype(str).str.contains(label)].copy()


@pytest.mark.parametrize(
    ("change", "setup", "message"),
    [
        (lambda a: a[:, :-2].copy(), {}, r"only models\[0\] \(SAMSVAE\) has the genes '.*', '.*'\."),
        (lambda a: a[:, ::-1].copy(), {}, r"the genes of models\[1\] \(CPAVAE\) stand in another order"),
        (lambda a: _without(a, "P005"), {}, r"only models\[0\] \(SAMSVAE\) has the perturbations 'P005'"),
        (lambda a: a.copy(), {"control": [CONTROL, "ctrl"]}, r"only models\[1\] \(CPAVAE\) has the control 'ctrl'"),
        (lambda a: a.copy(), {"sep": None}, r"only .* has the perturbations|sep is '\+' in models"),
        (lambda a: _layered(a), {"layer": "raw"}, r"layer is None in models\[0\] .* and 'raw' in models\[1\]"),
        (lambda a: _renamed(a), {"perturbation_key": "guide"}, "perturbation_key is 'perturbation' in"),
    ],
    ids=["genes", "order", "perturbations", "control", "sep", "layer", "key"],
)
def test_models_registered_otherwise(models, screen, change, setup, message):
    other = fit(pv.CPAVAE, change(screen), setup=setup, epochs=1)
    with pytest.raises(ValueError, match=message) as error:
        pv.predict_ensemble([models[0], other], "P001")
    assert "not registered alike" in str(error.value)


def test_counts_and_real_values_do_not_mix(models):
    normal = fit(pv.CPAVAE, models[0].adata, gene_likelihood="normal", epochs=1)
    with pytest.raises(ValueError, match="values is 'counts' in .* and 'real values' in"):
        pv.predict_ensemble([models[0], normal], "P001")
    both = pv.predict_ensemble([normal, normal], ASKED, n_cells=10)
    assert not sp.issparse(both.X)


def _layered(adata):
    adata = adata.copy()
    adata.layers["raw"] = adata.X.copy()
    return adata


def _renamed(adata):
    adata = adata.copy()
    adata.obs = adata.obs.rename(columns={"perturbation": "guide"})
    return adata
