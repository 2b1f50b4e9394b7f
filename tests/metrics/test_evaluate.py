"""`evaluate`: what is compared with what, and what is refused."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae._predictions import Block, prediction_anndata
from pertvae.datasets import example, read_truth
from pertvae.metrics import evaluate, list_metrics, registry

KEY, CONTROL = "perturbation", "control"


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return example()


@pytest.fixture(scope="module")
def halves(screen: ad.AnnData) -> tuple[ad.AnnData, ad.AnnData]:
    """Two halves with disjoint cells, controls too: technical duplicates."""
    return screen[::2].copy(), screen[1::2].copy()


def log_cp10k(adata: ad.AnnData) -> np.ndarray:
    x = adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)
    return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))


def means(adata: ad.AnnData, genes=slice(None)) -> pd.DataFrame:
    return pd.DataFrame(log_cp10k(adata)[:, genes]).groupby(adata.obs[KEY].astype(str).to_numpy()).mean()


def pick(table: pd.DataFrame, metric: str, condition: str = "pooled") -> float:
    rows = table[(table["metric"] == metric) & (table["condition"] == condition)]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def as_reference(adata: ad.AnnData, shifts: pd.DataFrame, control_profile: np.ndarray | None) -> ad.AnnData:
    """A prediction whose rendered cells are worthless, but whose shifts are exact."""
    rows = np.flatnonzero(adata.obs[KEY] == CONTROL)[:20]
    obs = pd.DataFrame(index=adata.obs_names[rows])
    blocks = [Block(label, adata.X[rows], obs) for label in shifts.index]
    provenance = {"model": "Exact"} | ({} if control_profile is None else {"control_profile": control_profile})
    controls = Block(CONTROL, adata.X[rows], obs)
    return prediction_anndata(blocks, controls, adata.var, KEY, shifts, "exact_predictions", provenance)


def test_table_is_tidy(screen: ad.AnnData, halves) -> None:
    first, second = halves
    table = evaluate(first, second, KEY, CONTROL, train=second)
    assert list(table.columns) == ["metric", "condition", "level", "value", "n_predicted", "n_observed"]
    assert set(table["metric"]) == set(list_metrics().index)
    conditions = [c for c in screen.obs[KEY].cat.categories if c != CONTROL]
    for metric, rows in table.groupby("metric"):
        assert (rows["level"] == "pooled").sum() == 1
        each = rows[rows["level"] == "condition"]
        assert set(each["condition"]) == (set() if registry[str(metric)].level == "pooled" else set(conditions))
        if len(each):
            # interactions are those of combinations only
            undefined = ~each["condition"].str.contains("+", regex=False) & (metric == "interaction_auroc")
            np.testing.assert_array_equal(each["value"].isna(), undefined)
            np.testing.assert_allclose(each["value"].mean(), pick(table, metric))
            counts = second.obs[KEY].value_counts()[each["condition"]]
            np.testing.assert_array_equal(each["n_observed"], counts)
        pooled = rows[rows["level"] == "pooled"].iloc[0]
        assert pooled["n_observed"] == (second.obs[KEY] != CONTROL).sum()
        assert pooled["n_predicted"] == (first.obs[KEY] != CONTROL).sum()
    lowest, highest = (table["metric"].map(list_metrics()[c]) for c in ("lowest", "highest"))
    defined = table["value"].notna()
    assert ((table["value"] >= lowest) & (table["value"] <= highest))[defined].all()


def test_values_by_another_road(halves) -> None:
    first, second = halves
    table = evaluate(first, second, KEY, CONTROL, train=second)
    p, o = means(first), means(second)
    center = o.drop(CONTROL).mean()
    for c in ("P001", next(c for c in o.index if "+" in c)):
        assert pick(table, "l2_profile", c) == pytest.approx(np.sqrt(((p.loc[c] - o.loc[c]) ** 2).sum()))
        dp, do = p.loc[c] - p.loc[CONTROL], o.loc[c] - o.loc[CONTROL]
        assert pick(table, "l2_delta", c) == pytest.approx(np.sqrt(((dp - do) ** 2).sum()))
        assert pick(table, "pearson_delta", c) == pytest.approx(np.corrcoef(dp, do)[0, 1])
        assert pick(table, "slope", c) == pytest.approx(np.linalg.lstsq(do.to_numpy()[:, None], dp, rcond=None)[0][0])
        r = np.corrcoef(p.loc[c] - center, o.loc[c] - center)[0, 1]
        assert pick(table, "pearson_delta_perturbed", c) == pytest.approx(r)
        top = [set(np.argsort(-np.abs(d.to_numpy()))[:20]) for d in (dp, do)]
        assert pick(table, "jaccard_top_20", c) == pytest.approx(len(top[0] & top[1]) / len(top[0] | top[1]))


def test_slope_says_under_predicted(screen: ad.AnnData) -> None:
    held = screen[screen.obs_names[20:]]
    rest = held[~held.obs_names.isin(screen.obs_names[screen.obs[KEY] == CONTROL][:20])].copy()
    m = means(rest)
    shifts = (m.drop(CONTROL) - m.loc[CONTROL]).set_axis(screen.var_names, axis=1)
    for factor in (0.5, 1.0, 2.0):
        table = evaluate(as_reference(screen, factor * shifts, None), rest, KEY, CONTROL, metrics="slope")
        np.testing.assert_allclose(table["value"], factor)


def test_reference_is_scored_by_its_exact_shift(screen: ad.AnnData) -> None:
    truth = read_truth(screen)
    observed = screen[~screen.obs_names.isin(screen.obs_names[screen.obs[KEY] == CONTROL][:20])].copy()
    o = means(observed)
    profile = truth.control_profile.to_numpy()
    center = pd.Series(o.drop(CONTROL).mean().to_numpy(), index=screen.var_names)
    table = evaluate(as_reference(screen, truth.shifts, profile), observed, KEY, CONTROL, train=center)
    for c in truth.shifts.index[[0, -1]]:
        expected = np.linalg.norm(profile + truth.shifts.loc[c] - o.loc[c].to_numpy())
        assert pick(table, "l2_profile", c) == pytest.approx(expected)
        delta = (o.loc[c] - o.loc[CONTROL]).to_numpy()
        assert pick(table, "l2_delta", c) == pytest.approx(np.linalg.norm(truth.shifts.loc[c] - delta))
    assert pick(table, "pearson_delta_perturbed") > 0.9
    # without a control profile (a model) the profile is that of the cells, the delta still the stored shift
    metrics = ["l2_profile", "l2_delta"]
    model = evaluate(as_reference(screen, truth.shifts, None), observed, KEY, CONTROL, metrics=metrics)
    assert pick(model, "l2_delta") == pytest.approx(pick(table, "l2_delta"))
    assert pick(model, "l2_profile") > 2 * pick(table, "l2_profile")


def test_oracle_beats_duplicate_beats_no_change(screen: ad.AnnData, halves) -> None:
    truth, (first, second) = read_truth(screen), halves
    profile = truth.control_profile.to_numpy()
    metrics = ["l2_profile", "pearson_delta_perturbed"]

    def score(predicted: ad.AnnData) -> pd.Series:
        table = evaluate(predicted, second, KEY, CONTROL, metrics=metrics, train=first)
        return table[table["level"] == "pooled"].set_index("metric")["value"]

    oracle, duplicate = score(as_reference(first, truth.shifts, profile)), score(first)
    nothing = score(as_reference(first, 0 * truth.shifts, profile))
    assert oracle["l2_profile"] < duplicate["l2_profile"] < 0.6 * nothing["l2_profile"]
    assert oracle["pearson_delta_perturbed"] > duplicate["pearson_delta_perturbed"] > 0.8
    assert abs(nothing["pearson_delta_perturbed"]) < 0.3


def test_labels_are_matched_canonically(halves) -> None:
    first, second = halves
    double = next(c for c in second.obs[KEY].cat.categories if "+" in c)
    a, b = double.split("+")
    swapped = first.copy()
    swapped.obs[KEY] = swapped.obs[KEY].astype(str).replace({double: f"{b}+ctrl+{a}", CONTROL: "ctrl"})
    plain = evaluate(first, second, KEY, CONTROL, metrics="l2_delta")
    again = evaluate(swapped, second, KEY, [CONTROL, "ctrl"], metrics="l2_delta", conditions=[f"{b}+{a}"])
    assert list(again["condition"]) == [double, "pooled"]
    assert pick(again, "l2_delta", double) == pytest.approx(pick(plain, "l2_delta", double))


def test_genes_are_chosen_after_normalising(halves) -> None:
    first, second = halves
    genes = ["G0007", "G0003", "G0100"]
    table = evaluate(first, second, KEY, CONTROL, metrics="l2_profile", genes=genes)
    at = [2, 6, 99]
    expected = np.linalg.norm(means(first, at).loc["P002"] - means(second, at).loc["P002"])
    assert pick(table, "l2_profile", "P002") == pytest.approx(expected)
    truth = read_truth(first)
    reference = as_reference(first, truth.shifts, truth.control_profile.to_numpy())
    found = evaluate(reference, second, KEY, CONTROL, metrics="l2_profile", genes=genes)
    exact = truth.control_profile + truth.shifts.loc["P002"]
    expected = np.linalg.norm(exact.iloc[at] - means(second, at).loc["P002"].to_numpy())
    assert pick(found, "l2_profile", "P002") == pytest.approx(expected)
    mask = first.var_names.isin(genes)
    pd.testing.assert_frame_equal(table, evaluate(first, second, KEY, CONTROL, metrics="l2_profile", genes=mask))


def test_observed_is_normalised_over_the_predicted_genes(halves) -> None:
    first, second = halves
    few = first[:, :50].copy()
    table = evaluate(few, second, KEY, CONTROL, metrics="l2_profile")
    expected = np.linalg.norm(means(few).loc["P002"] - means(second[:, :50]).loc["P002"])
    assert pick(table, "l2_profile", "P002") == pytest.approx(expected)
    # gene order does not matter
    mixed = evaluate(few, second[:, ::-1].copy(), KEY, CONTROL, metrics="l2_profile")
    pd.testing.assert_frame_equal(table, mixed)


def test_storage_does_not_matter(tmp_path, halves) -> None:
    first, second = halves
    expected = evaluate(first, second, KEY, CONTROL, train=second)
    dense = second.copy()
    dense.X = dense.X.toarray()
    layered = second.copy()
    layered.layers["counts"] = layered.X.copy()
    layered.X = np.zeros(layered.shape, dtype=np.float32)
    second.write_h5ad(tmp_path / "second.h5ad")
    backed = ad.read_h5ad(tmp_path / "second.h5ad", backed="r")
    array = second.copy()
    array.X = sp.csr_array(array.X)
    for other, layer in ((dense, None), (layered, "counts"), (backed, None), (array, None)):
        table = evaluate(first, other, KEY, CONTROL, train=other, layer=layer)
        pd.testing.assert_frame_equal(table, expected)


def test_inputs_are_not_changed(halves) -> None:
    first, second = halves
    before = first.copy(), second.copy()
    np.random.seed(4)  # noqa: NPY002 (the global state is what is tested)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    evaluate(first, second, KEY, CONTROL, train=second, n_resamples=3)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    for now, then in zip((first, second), before, strict=True):
        assert (now.X != then.X).nnz == 0
        pd.testing.assert_frame_equal(now.obs, then.obs)
        assert set(now.uns) == set(then.uns)


def test_shared_controls_are_refused(screen: ad.AnnData, halves) -> None:
    first, second = halves
    n = int((first.obs[KEY] == CONTROL).sum())
    with pytest.raises(ValueError, match=rf"^{n} control cells.*disjoint"):
        evaluate(first, screen, KEY, CONTROL, metrics="pearson_delta")
    with pytest.raises(ValueError, match="disjoint"):
        evaluate(first, screen, KEY, CONTROL, train=screen)
    evaluate(first, screen, KEY, CONTROL, metrics=["l2_profile", "energy_distance"])
    # a prediction is known by the cells it was copied from
    truth = read_truth(screen)
    predicted = as_reference(first, truth.shifts, None)
    predicted.obs_names = [f"new{i}" for i in range(predicted.n_obs)]
    with pytest.raises(ValueError, match=r"^20 control cells"):
        evaluate(predicted, first, KEY, CONTROL, metrics="l2_delta")
    evaluate(predicted, second, KEY, CONTROL, metrics="l2_delta")
    # and a reference by the training controls its shift stands on
    reference = as_reference(first, truth.shifts, truth.control_profile.to_numpy())
    evaluate(reference, second, KEY, CONTROL, metrics="l2_delta", train=first)
    with pytest.raises(ValueError, match="control cells stand in both"):
        evaluate(reference, second, KEY, CONTROL, metrics="l2_delta", train=screen)


def test_generated_controls_do_not_stand_for_controls(halves) -> None:
    # a model asked for its control writes generated cells under the control's label
    first, second = halves
    plain = first.copy()
    plain.obs["generated"] = (plain.obs[KEY] != CONTROL).to_numpy()
    zero_dose = first[first.obs[KEY] == "P001"].copy()
    zero_dose.obs[KEY], zero_dose.obs["generated"] = CONTROL, True
    both = ad.concat([plain, zero_dose], index_unique="-")
    expected = evaluate(first, second, KEY, CONTROL, metrics="l2_delta")
    pd.testing.assert_frame_equal(evaluate(both, second, KEY, CONTROL, metrics="l2_delta"), expected)
    # nor do source cells under a condition's label stand for that condition
    seen = plain.copy()
    seen.obs.loc[seen.obs_names[(seen.obs[KEY] == "P001").to_numpy()][:10], "generated"] = False
    fewer = evaluate(seen, second, KEY, CONTROL, metrics="l2_delta")
    counts = first.obs[KEY].value_counts()
    assert fewer.set_index("condition")["n_predicted"]["P001"] == counts["P001"] - 10


def test_what_is_missing_is_named(halves) -> None:
    first, second = halves
    with pytest.warns(UserWarning, match="pearson_delta_perturbed needs the mean of the training perturbed.*train="):
        table = evaluate(first, second, KEY, CONTROL)
    assert "pearson_delta_perturbed" not in set(table["metric"])
    with pytest.raises(ValueError, match="pearson_delta_perturbed needs.*train="):
        evaluate(first, second, KEY, CONTROL, metrics=["pearson_delta_perturbed"])
    bare = second[second.obs[KEY] != CONTROL].copy()
    with pytest.warns(UserWarning, match="l2_delta needs.*observed has no cells labelled 'control'"):
        table = evaluate(first, bare, KEY, CONTROL, train=second)
    assert set(table["metric"]) == {n for n, m in registry.items() if not m.needs & {"deltas", "controls"}}
    assert {"l2_profile", "pearson_delta_perturbed", "energy_distance", "weighted_mse"} <= set(table["metric"])
    with pytest.raises(ValueError, match="predicted has no cells labelled"):
        evaluate(bare, second, KEY, CONTROL, metrics="slope")
    with pytest.raises(ValueError, match=r"jaccard_top_50 needs at least 51 genes \(there are 30\)"):
        evaluate(first, second, KEY, CONTROL, metrics="jaccard_top_k", genes=first.var_names[:30])


def test_train_as_a_profile(halves) -> None:
    first, second = halves
    metrics = "pearson_delta_perturbed"
    center = pd.Series(means(second).drop(CONTROL).mean().to_numpy(), index=second.var_names)
    expected = evaluate(first, second, KEY, CONTROL, metrics=metrics, train=second)
    found = evaluate(first, second, KEY, CONTROL, metrics=metrics, train=center.iloc[::-1])
    pd.testing.assert_frame_equal(found, expected)
    with pytest.raises(KeyError, match="train lacks 150"):
        evaluate(first, second, KEY, CONTROL, metrics=metrics, train=center.iloc[:50])
    with pytest.raises(TypeError, match="ndarray"):
        evaluate(first, second, KEY, CONTROL, metrics=metrics, train=center.to_numpy())
    with pytest.raises(ValueError, match="no perturbed cells"):
        evaluate(first, second, KEY, CONTROL, metrics=metrics, train=second[second.obs[KEY] == CONTROL])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"metrics": "l2_profil"}, ValueError, "Did you mean 'l2_profile'"),
        ({"metrics": []}, ValueError, "empty"),
        ({"conditions": ["P01"]}, KeyError, "conditions: 'P01' has no cells in predicted.*P010"),
        ({"genes": ["G0001", "X1"]}, KeyError, "1 are not in"),
        ({"genes": np.ones(5, dtype=bool)}, ValueError, "200 genes"),
        ({"genes": []}, ValueError, "no gene"),
        ({"layer": "count"}, KeyError, "layer='count'"),
        ({"sep": "0"}, ValueError, "empty component"),
        ({"max_cells": 1}, ValueError, "max_cells=1"),
        ({"n_resamples": -1}, ValueError, "n_resamples=-1"),
        ({"level": 1.5}, ValueError, "level=1.5"),
    ],
)
def test_errors(halves, arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        evaluate(*halves, KEY, CONTROL, **({"metrics": "l2_profile"} | arguments))


def test_label_errors(halves) -> None:
    first, second = halves
    with pytest.raises(KeyError, match=r"not a column of predicted.obs.*'perturbation'"):
        evaluate(first, second, "perturbations", CONTROL)
    other = second.copy()
    other.obs[KEY] = ["Q" + str(c) for c in other.obs[KEY]]
    with pytest.raises(ValueError, match="No condition stands in both"):
        evaluate(first, other, KEY, CONTROL, metrics="l2_profile")
    some = second[second.obs[KEY].isin([CONTROL, "P001", "P002"])]
    with pytest.warns(UserWarning, match="16 of 18 predicted conditions") as caught:
        table = evaluate(first, some, KEY, CONTROL, metrics="l2_profile")
    assert len(table) == 3
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="150 predicted genes are missing in observed"):
        evaluate(first, second[:, :50], KEY, CONTROL, metrics="l2_profile")


def test_counts_are_asked_for(halves) -> None:
    first, second = halves
    logged = second.copy()
    logged.X = logged.X.log1p()
    with pytest.warns(UserWarning, match="not whole numbers"):
        evaluate(first, logged, KEY, CONTROL, metrics="l2_profile")
    logged.uns["log1p"] = {}
    with pytest.raises(ValueError, match="log-transformed"):
        evaluate(first, logged, KEY, CONTROL, metrics="l2_profile")
    logged.X = logged.X - 2 * logged.X
    with pytest.raises(ValueError, match="observed has negative"):
        evaluate(first, logged, KEY, CONTROL, metrics="l2_profile")


def test_predictions_cut_in_genes_are_refused(screen: ad.AnnData, halves) -> None:
    truth = read_truth(screen)
    predicted = as_reference(halves[0], truth.shifts, truth.control_profile.to_numpy())
    with pytest.raises(ValueError, match="genes="):
        evaluate(predicted[:, :50].copy(), halves[1], KEY, CONTROL, metrics="l2_profile")


def test_undirected_predictions_score_zero(screen: ad.AnnData, halves) -> None:
    truth = read_truth(screen)
    predicted = as_reference(halves[0], 0 * truth.shifts, truth.control_profile.to_numpy())
    table = evaluate(predicted, halves[1], KEY, CONTROL, metrics=["pearson_delta", "ate_correlation", "jaccard_top_k"])
    assert (table["value"] == 0).all()


def test_conditions_do_not_depend_on_each_other(halves) -> None:
    first, second = halves
    arguments = {"metrics": "energy_distance", "max_cells": 10, "n_resamples": 5}
    everything = evaluate(first, second, KEY, CONTROL, **arguments)
    alone = evaluate(first, second, KEY, CONTROL, conditions=["P005"], **arguments)
    row = everything[everything["condition"] == "P005"].reset_index(drop=True)
    pd.testing.assert_frame_equal(row, alone.iloc[:1])


def test_no_warning_when_all_is_given(halves) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(*halves, KEY, CONTROL, train=halves[1], n_resamples=2)
