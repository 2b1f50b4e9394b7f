"""What ``predict_perturbation`` promises for every model."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae._expression import mean_profile
from pertvae._predictions import predicted_shifts
from pertvae._storage import read_table

from ._screens import CONTROL, UNSEEN, block, dense, fit, screen


@pytest.fixture(params=["control", "prior"])
def basal(case, request):
    """Every basal state a model offers."""
    if request.param not in case.cls.capabilities.basal:
        pytest.skip(f"{case.cls.__name__} does not offer basal={request.param!r}")
    return request.param


def test_form(case, trained):
    asked = ["B+A", UNSEEN, "A"]
    predicted = trained.predict_perturbation(asked, n_cells=12, seed=3)
    assert predicted.shape == (3 * 12 + 12, 30)
    assert predicted.obs["perturbation"].tolist() == [p for p in asked for _ in range(12)] + [CONTROL] * 12
    assert predicted.obs["generated"].tolist() == [True] * 36 + [False] * 12
    assert predicted.obs_names.is_unique
    pd.testing.assert_frame_equal(predicted.var, trained.adata.var)
    assert sp.issparse(predicted.X)
    assert predicted.X.dtype == np.float32
    assert predicted.X.min() >= 0
    assert (predicted.X.data == np.floor(predicted.X.data)).all()
    assert predicted.layers["mean"].shape == predicted.shape
    for column in ("batch", "cell_type"):
        source = trained.adata.obs.loc[predicted.obs["source_cell"].astype(str), column]
        assert predicted.obs[column].tolist() == source.tolist()
    controls = predicted[~predicted.obs["generated"].to_numpy()]
    observed = trained.adata[controls.obs["source_cell"].astype(str).to_numpy()]
    assert set(observed.obs["perturbation"].astype(str)) == {CONTROL}
    np.testing.assert_array_equal(dense(controls.X), dense(observed.X))
    np.testing.assert_array_equal(dense(controls.layers["mean"]), dense(observed.X))
    provenance = predicted.uns["pertvae"]
    assert provenance["model"] == case.cls.__name__
    assert provenance["seed"] == 3
    assert provenance["value_kind"] == "counts"
    assert {"version", "settings"} <= set(provenance)
    assert provenance["settings"]["library_size"] in ("observed", "predicted")
    assert provenance["settings"]["basal"] == case.cls.capabilities.basal[0]


def test_shifts_are_measured_on_the_blocks(case, trained):
    predicted = trained.predict_perturbation(["A", UNSEEN, CONTROL], library_size="observed")
    shifts = predicted_shifts(predicted)
    assert list(shifts.index) == ["A", UNSEEN, CONTROL]
    zero = mean_profile(block(predicted, CONTROL).to_numpy())
    for label in ("A", UNSEEN):
        expected = mean_profile(block(predicted, label).to_numpy()) - zero
        np.testing.assert_allclose(shifts.loc[label], expected, atol=1e-5)
        assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(shifts.loc[CONTROL], 0.0)
    pd.testing.assert_frame_equal(read_table(trained.adata.uns, f"{case.name}_predictions"), shifts)


def test_shifts_at_predicted_libraries_compare_equal_libraries(trained):
    predicted = trained.predict_perturbation("A", library_size="predicted")
    rows = predicted.obs.loc[predicted.obs["generated"], "source_cell"].astype(str)
    effect = trained.library_effects_.effects[0]
    observed = dense(trained.adata[rows.to_numpy()].X).sum(1)
    zero = trained.predict_perturbation(CONTROL, library_size=observed * np.exp(effect))
    assert zero.obs.loc[zero.obs["generated"], "source_cell"].tolist() == rows.tolist()
    expected = mean_profile(block(predicted, "A").to_numpy()) - mean_profile(block(zero, CONTROL).to_numpy())
    np.testing.assert_allclose(predicted_shifts(predicted).loc["A"], expected, atol=1e-4)


def test_stored_shifts_are_merged_by_label(case, trained):
    trained.predict_perturbation(["A", "B"], n_cells=5)
    trained.predict_perturbation(["C/2", "A"], n_cells=5, seed=9)
    stored = read_table(trained.adata.uns, f"{case.name}_predictions")
    assert sorted(stored.index) == ["A", "B", "C/2"]
    again = predicted_shifts(trained.predict_perturbation("A", n_cells=5, seed=9, key_added=None))
    np.testing.assert_array_equal(stored.loc["A"], again.loc["A"])
    assert list(trained.adata.uns[f"{case.name}_predictions"].index) == list(trained.adata.var_names)


def test_key_added(trained):
    predicted = trained.predict_perturbation("A", n_cells=3, key_added=None)
    assert not [k for k in trained.adata.uns if not k.startswith("_scvi")]
    assert list(predicted_shifts(predicted).index) == ["A"]
    trained.predict_perturbation("A", n_cells=3, key_added="mine")
    assert list(read_table(trained.adata.uns, "mine").index) == ["A"]


def test_independent_of_batch_size_order_and_set(trained, basal):
    asked = ["A", UNSEEN, "B"]
    full = trained.predict_perturbation(asked, basal=basal, seed=5)
    again = trained.predict_perturbation(asked[::-1], basal=basal, seed=5, batch_size=7)
    alone = trained.predict_perturbation([UNSEEN], basal=basal, seed=5, batch_size=1000)
    spelled = trained.predict_perturbation("C/2+B", basal=basal, seed=5)
    for label in asked:
        pd.testing.assert_frame_equal(block(again, label), block(full, label))
    pd.testing.assert_frame_equal(block(alone, UNSEEN), block(full, UNSEEN))
    pd.testing.assert_frame_equal(block(spelled, "C/2+B"), block(full, UNSEEN))
    pd.testing.assert_frame_equal(predicted_shifts(again).loc[asked], predicted_shifts(full))
    assert not block(trained.predict_perturbation("A", basal=basal, seed=6), "A").equals(block(full, "A"))


def test_fewer_or_more_cells_keep_the_cells_they_share(trained, basal):
    controls = np.flatnonzero(trained.adata.obs["perturbation"].astype(str) == CONTROL)
    full = block(trained.predict_perturbation("A", basal=basal, library_size="observed"), "A")
    assert list(full.index) == list(trained.adata.obs_names[controls])  # each control once
    few = block(trained.predict_perturbation("A", n_cells=9, basal=basal, library_size="observed"), "A")
    assert few.index.is_unique
    pd.testing.assert_frame_equal(few, full.loc[few.index])
    more = block(trained.predict_perturbation("A", n_cells=55, basal=basal, library_size="observed"), "A")
    assert len(more) == 55
    pd.testing.assert_frame_equal(more.iloc[:40], full)
    repeated = more.iloc[40:]
    assert not repeated.equals(full.loc[repeated.index])  # a repeated cell is another draw
    chosen = trained.predict_perturbation("A", indices=controls[[7, 3]], basal=basal, library_size="observed")
    pd.testing.assert_frame_equal(block(chosen, "A").loc[full.index[[3, 7]]], full.iloc[[3, 7]])


def test_control_basal_states_differ_from_prior_ones(case, trained):
    if set(case.cls.capabilities.basal) != {"control", "prior"}:
        with pytest.raises(ValueError, match="basal="):
            trained.predict_perturbation("A", basal=({"control", "prior"} - set(case.cls.capabilities.basal)).pop())
        return
    control, prior = (trained.predict_perturbation("A", basal=b) for b in ("control", "prior"))
    assert not block(control, "A").equals(block(prior, "A"))


def test_source_cells(trained):
    adata = trained.adata
    predicted = trained.predict_perturbation("A", batch="b1", labels=["t0"])
    assert set(predicted.obs["batch"]) == {"b1"}
    assert set(predicted.obs["cell_type"]) == {"t0"}
    assert set(adata.obs.loc[predicted.obs["source_cell"].astype(str), "perturbation"]) == {CONTROL}
    perturbed = np.flatnonzero(adata.obs["perturbation"].astype(str) == "B")
    given = trained.predict_perturbation("A", indices=perturbed)
    assert block(given, "A").index.tolist() == adata.obs_names[perturbed].tolist()
    assert given.obs.loc[~given.obs["generated"], "perturbation"].tolist() == [CONTROL] * len(perturbed)
    shuffled = perturbed[[2, 0, 3, 1]]
    given = trained.predict_perturbation("A", indices=shuffled)
    np.testing.assert_array_equal(dense(given[~given.obs["generated"].to_numpy()].X), dense(adata.X[shuffled]))
    with pytest.raises(ValueError, match="batch='b9'.*'b0'"):
        trained.predict_perturbation("A", batch="b9")
    with pytest.raises(ValueError, match="labels='t9'"):
        trained.predict_perturbation("A", labels="t9")
    with pytest.raises(ValueError, match="n_cells=0"):
        trained.predict_perturbation("A", n_cells=0)


def test_streaming_equals_memory(trained, tmp_path):
    asked = ["A", UNSEEN]
    path = tmp_path / "predicted.h5ad"
    memory = trained.predict_perturbation(asked, n_cells=17)
    streamed = trained.predict_perturbation(asked, n_cells=17, out=str(path))
    assert streamed.isbacked
    assert list(path.parent.iterdir()) == [path]
    assert "mean" not in streamed.layers
    read = ad.read_h5ad(path)
    np.testing.assert_array_equal(dense(read.X), dense(memory.X))
    for column in memory.obs:
        assert read.obs[column].astype(str).tolist() == memory.obs[column].astype(str).tolist()
    assert list(read.obs_names) == list(memory.obs_names)
    pd.testing.assert_frame_equal(predicted_shifts(read), predicted_shifts(memory), check_column_type=False)
    assert dict(read.uns["pertvae"]["settings"]) == memory.uns["pertvae"]["settings"]
    streamed.file.close()


def test_streaming_of_means(trained, tmp_path):
    memory = trained.predict_perturbation("A", n_cells=7, output="mean")
    trained.predict_perturbation("A", n_cells=7, output="mean", out=str(tmp_path / "mean.h5ad")).file.close()
    np.testing.assert_array_equal(dense(ad.read_h5ad(tmp_path / "mean.h5ad").X), dense(memory.X))


def test_a_failed_stream_leaves_no_file(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(type(trained), "_profile", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained.predict_perturbation("A", out=str(tmp_path / "predicted.h5ad"))
    assert list(tmp_path.iterdir()) == []


def test_doses(trained):
    table = pd.DataFrame({"A": [0, 1, 2, 1], "B": [0, 0, 0, np.nan]}, index=["none", "once", "twice", "again"])
    predicted = trained.predict_perturbation(table, library_size="observed")
    plain = trained.predict_perturbation(["A", CONTROL], library_size="observed")
    assert predicted.obs["perturbation"].unique().tolist() == ["none", "once", "twice", "again", CONTROL]
    pd.testing.assert_frame_equal(block(predicted, "none"), block(plain, CONTROL))
    pd.testing.assert_frame_equal(block(predicted, "once"), block(plain, "A"))
    pd.testing.assert_frame_equal(block(predicted, "again"), block(plain, "A"))
    # cell by cell: every cell keeps its own draw of the effects
    means = {k: predicted[predicted.obs["perturbation"] == k].layers["mean"] for k in ("none", "once", "twice")}
    assert np.abs(means["twice"] - means["once"]).max() > 0
    assert np.abs(means["twice"] - means["none"]).sum() > np.abs(means["once"] - means["none"]).sum()
    np.testing.assert_array_equal(predicted_shifts(predicted).loc["none"], 0.0)
    with pytest.raises(ValueError, match=r"-1.*'A'.*'bad'"):
        trained.predict_perturbation(pd.DataFrame({"A": [-1.0]}, index=["bad"]))
    with pytest.raises(ValueError, match="'Q'"):
        trained.predict_perturbation(pd.DataFrame({"Q": [1.0]}, index=["x"]))
    with pytest.raises(ValueError, match="more than one column 'A'"):
        trained.predict_perturbation(pd.DataFrame([[1.0, 2.0]], index=["x"], columns=["A", "A"]))


def test_columns_of_doses_in_any_order(trained, basal):
    table = pd.DataFrame({"A": [1.0, 0.5], "B": [1.0, 2.0]}, index=["B+A", "doses"])
    predicted = trained.predict_perturbation(table, basal=basal, n_cells=60)
    turned = trained.predict_perturbation(table[["B", "A"]], basal=basal, n_cells=60)
    for label in table.index:
        pd.testing.assert_frame_equal(block(turned, label), block(predicted, label))
    pd.testing.assert_frame_equal(
        block(predicted, "B+A"), block(trained.predict_perturbation("A+B", basal=basal, n_cells=60), "A+B")
    )


def test_unknown_components(trained):
    with pytest.raises(ValueError, match=r"'C/3' \(in 'A\+C/3'\).*'C/2'.*unseen='ignore'"):
        trained.predict_perturbation(["A", "A+C/3"])
    with pytest.warns(UserWarning, match="'C/3'.*contribute nothing"):
        predicted = trained.predict_perturbation(["A+C/3", "C/3"], unseen="ignore", library_size="observed")
    assert list(predicted.uns["pertvae"]["unknown"]) == ["C/3"]
    assert predicted.obs["perturbation"].unique().tolist() == ["A+C/3", "C/3", CONTROL]
    rows = (predicted.obs["perturbation"] == "C/3").to_numpy()
    expected = trained.predict_perturbation(CONTROL, library_size="observed")
    np.testing.assert_allclose(
        predicted[rows].layers["mean"], expected[expected.obs["generated"].to_numpy()].layers["mean"], rtol=1e-5
    )


def test_arguments_not_accepted(trained):
    for arguments, message in (
        ({"perturbations": []}, "empty"),
        ({"perturbations": ["A", "A"]}, "'A' more than once"),
        ({"unseen": "skip"}, "unseen='skip'.*raise.*ignore"),
        ({"output": "rates"}, "output='rates'.*counts.*mean"),
        ({"basal": "posterior"}, "basal='posterior'"),
        ({"library_size": "median"}, "library_size='median'.*control_median"),
        ({"library_size": -5.0}, "-5"),
        ({"library_size": np.ones(3)}, r"\(3,\).*40 source cells"),
    ):
        with pytest.raises(ValueError, match=message):
            trained.predict_perturbation(**{"perturbations": "A", **arguments})


def test_library_sizes(trained):
    adata = trained.adata
    totals = pd.Series(dense(adata.X).sum(1), index=adata.obs_names)

    def means(choice):
        predicted = trained.predict_perturbation("A", library_size=choice)
        made = predicted[predicted.obs["generated"].to_numpy()]
        recorded.append(predicted.uns["pertvae"]["settings"]["library_size"])
        return pd.Series(made.layers["mean"].sum(1), index=made.obs["source_cell"].astype(str))

    recorded = []
    observed = means("observed")
    np.testing.assert_allclose(observed, totals[observed.index], rtol=1e-3)
    np.testing.assert_allclose(means(1234.0), 1234.0, rtol=1e-3)
    np.testing.assert_allclose(means("control_median"), trained.library_effects_.control_median, rtol=1e-3)
    np.testing.assert_allclose(means("predicted"), observed * np.exp(trained.library_effects_.effects[0]), rtol=1e-3)
    array = np.linspace(100, 200, 40)
    np.testing.assert_allclose(means(array), array, rtol=1e-3)
    assert recorded == ["observed", "number", "control_median", "predicted", "array"]


def test_expected_counts(trained):
    mean = trained.predict_perturbation("A", output="mean", n_cells=6)
    counts = trained.predict_perturbation("A", n_cells=6)
    assert mean.uns["pertvae"]["value_kind"] == "mean"
    rows = mean.obs["generated"].to_numpy()
    np.testing.assert_array_equal(dense(mean[rows].X), counts[rows].layers["mean"])
    np.testing.assert_array_equal(dense(mean[~rows].X), dense(counts[~rows].X))


def test_sampled_counts_scatter_around_the_mean(trained):
    """The mean of many draws is the expected count, within the error of the draws."""
    cell = [int(np.flatnonzero(trained.adata.obs["perturbation"].astype(str) == CONTROL)[0])]
    predicted = trained.predict_perturbation("A", indices=cell, n_cells=1500, library_size=500.0)
    made = predicted[predicted.obs["generated"].to_numpy()]
    residual = dense(made.X) - made.layers["mean"]
    z = residual.mean(0) / (residual.std(0) / np.sqrt(len(residual)))
    assert np.abs(z).max() < 5
    assert (residual.std(0) > 0).all()


def test_the_prediction_is_for_scanpy(trained):
    import scanpy as sc

    predicted = trained.predict_perturbation(["A", UNSEEN], n_cells=20)
    sc.pp.normalize_total(predicted, target_sum=1e4)
    sc.pp.log1p(predicted)
    sc.tl.rank_genes_groups(predicted, "perturbation", reference=CONTROL)
    assert predicted.uns["rank_genes_groups"]["names"].dtype.names == ("A", UNSEEN)


def test_columns_named_as_in_the_data(case):
    adata = screen()
    adata.obs = adata.obs.rename(columns={"perturbation": "guide"})
    model = fit(case, adata, {"perturbation_key": "guide"})
    predicted = model.predict_perturbation("A", n_cells=4)
    assert predicted.obs["guide"].tolist() == ["A"] * 4 + [CONTROL] * 4
    assert "perturbation" not in predicted.obs
