"""A whole benchmark with a stand-in for the model."""

import numpy as np
import pandas as pd
import pytest

import pertvae as pv
from pertvae.benchmark._prediction import Prediction

ARGUMENTS = ("unseen_combination", "perturbation", "control")


def trainings(stand_in):
    return sum("split_key" in call for call in stand_in.calls)


@pytest.fixture
def result(screen, stand_in, options):
    return pv.benchmark.run(screen, {"net": stand_in}, *ARGUMENTS, seeds=(0, 1), n_folds=2, **options)


def test_table_is_tidy_and_complete(result, screen):
    table = result.table
    doubles = sorted(c for c in screen.obs["perturbation"].unique() if "+" in c)
    assert set(table["kind"]) == {"model", "reference", "duplicate", "oracle"}
    headline = table[table["metric"] == "l2_profile"]
    assert not headline.duplicated(["fold", "model", "seed", "condition"]).any()
    for model, seeds in (("net", {0, 1}), ("Additive", {-1}), ("duplicate", {-1}), ("oracle", {-1})):
        rows = headline[headline["model"] == model]
        assert set(rows["seed"]) == seeds
        assert sorted(rows["condition"].unique()) == doubles
        assert len(rows) == len(doubles) * len(seeds)
    assert set(headline["seen"]) == {"2/2"}
    assert (headline["n_observed"] == 20).all()
    rows = headline[headline["kind"] == "reference"]
    assert ((rows["lower"] < rows["value"]) & (rows["value"] < rows["upper"])).all()
    pooled = {m for m, metric in pv.metrics.registry.items() if metric.level == "pooled"}
    assert set(table.loc[table["condition"] == "pooled", "metric"]) == pooled
    assert (table["status"] == "ok").all()
    controls = {"duplicate", "interpolated duplicate", "oracle"}
    assert set(result.fits["model"]) == {"NoChange", "Additive", *controls, "net"}
    assert len(result.fits) == 2 * (5 + 2)


def test_oracle_is_best_and_additive_beats_no_change(result):
    means = result.summary().query("metric == 'l2_profile'").set_index("model")["value"]
    assert means["oracle"] == means.min()
    assert means["Additive"] < means["NoChange"]


def test_adata_is_left_alone(screen, stand_in, options):
    adata = screen.copy()
    pv.benchmark.run(adata, {"net": stand_in}, *ARGUMENTS, seeds=[0], n_folds=1, **options)
    pd.testing.assert_frame_equal(adata.obs, screen.obs)
    assert list(adata.uns) == list(screen.uns)
    assert set(adata.obsm) == set(screen.obsm)
    assert (adata.X != screen.X).nnz == 0


def test_one_failure_is_a_row_and_the_others_go_on(screen, stand_in, options, tmp_path):
    models = {"good": stand_in, "bad": stand_in}
    result = pv.benchmark.run(
        screen, models, *ARGUMENTS, seeds=[0], n_folds=1, train_kwargs={"bad": {"broken": True}}, **options
    )
    failed = result.table[result.table["status"] == "failed"]
    assert list(failed["model"]) == ["bad"]
    assert failed["error"].iloc[0] == "RuntimeError: the loss is not a number"
    assert result.summary().query("model == 'good'").shape[0] > 0
    assert "bad, combinations" in result.text()
    assert "the loss is not a number" in result.report(tmp_path / "r.html").read_text()


def test_a_killed_run_resumes(screen, stand_in, options, tmp_path):
    class Killed(stand_in):
        def train(self, split_key, **kwargs):
            if trainings(stand_in) == 1:
                raise KeyboardInterrupt
            super().train(split_key, **kwargs)

    Killed.__module__, Killed.__qualname__ = stand_in.__module__, stand_in.__qualname__
    arguments = {"seeds": (0, 1), "n_folds": 1, "cache_dir": tmp_path, **options}
    with pytest.raises(KeyboardInterrupt):
        pv.benchmark.run(screen, {"net": Killed}, *ARGUMENTS, **arguments)
    stand_in.calls.clear()
    resumed = pv.benchmark.run(screen, {"net": stand_in}, *ARGUMENTS, **arguments)
    assert trainings(stand_in) == 1
    cached = resumed.fits.set_index(["model", "seed"])["cached"]
    assert cached["net", 0]
    assert not cached["net", 1]
    whole = pv.benchmark.run(screen, {"net": stand_in}, *ARGUMENTS, **{**arguments, "cache_dir": None})
    pd.testing.assert_frame_equal(resumed.table, whole.table)
    pd.testing.assert_frame_equal(resumed.summary(), whole.summary())


@pytest.mark.parametrize("change", ["kwargs", "data", "control", "metrics"])
def test_cache_is_not_used_for_other_settings_or_data(screen, stand_in, options, tmp_path, change):
    arguments = {"seeds": [0], "n_folds": 1, "cache_dir": tmp_path, **options}
    pv.benchmark.run(screen, {"net": stand_in}, *ARGUMENTS, **arguments)
    stand_in.calls.clear()
    adata, control = screen, "control"
    if change == "kwargs":
        arguments["model_kwargs"] = {"scale": 0.5}
    elif change == "metrics":
        arguments["metrics"] = ["l2_profile"]
    elif change == "control":
        control = ["control", "ctrl"]
    else:
        adata = screen.copy()
        adata.X.data[0] += 1
    pv.benchmark.run(adata, {"net": stand_in}, ARGUMENTS[0], "perturbation", control, **arguments)
    assert trainings(stand_in) == 1


def test_damaged_cache_is_computed_again(screen, stand_in, options, tmp_path):
    arguments = {"seeds": [0], "n_folds": 1, "cache_dir": tmp_path, **options}
    first = pv.benchmark.run(screen, {"net": stand_in}, *ARGUMENTS, **arguments)
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:200])
    stand_in.calls.clear()
    second = pv.benchmark.run(screen, {"net": stand_in}, *ARGUMENTS, **arguments)
    assert trainings(stand_in) == 1
    pd.testing.assert_frame_equal(first.table, second.table)


def test_prediction_survives_the_disk(tmp_path):
    scores = pd.DataFrame({"unit": ["A"], "metric": ["slope"], "value": [np.nan], "lower": [0.5], "upper": [1.0]})
    shift = pd.DataFrame([[0.1, 1 / 3]], ["A/B"], ["g0", "g1"])
    history = pd.DataFrame({"elbo_train": [3.0, 2.0]}, index=[0, 1])
    made = Prediction(scores, shift, {"fit": 1.5}, {"history:elbo_train": history})
    made.write(tmp_path / "p.npz")
    read = Prediction.read(tmp_path / "p.npz")
    pd.testing.assert_frame_equal(read.scores, scores)
    pd.testing.assert_frame_equal(read.shift, shift)
    pd.testing.assert_frame_equal(read.history["elbo_train"], history)
    assert read.seconds == {"fit": 1.5}
    assert read.cached
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]
    assert Prediction.read(tmp_path / "absent.npz") is None


def test_few_conditions_get_intervals_from_cells(screen, stand_in, options):
    held = sorted(c for c in screen.obs["perturbation"].unique() if "+" in c)[:2]
    result = pv.benchmark.run(
        screen, {"net": stand_in}, *ARGUMENTS, seeds=[0], split_kwargs={"held_out": held}, **options
    )
    row = result.summary().query("model == 'net' and metric == 'l2_profile'").iloc[0]
    assert (row["interval"], row["n_conditions"]) == ("cells", 2)
    assert row["lower"] < row["value"] < row["upper"]
    compared = result.compare()
    assert set(compared["verdict"]) == {"not judged"}
    assert compared["lower"].notna().all()


def test_contexts_are_scored_apart(screen, stand_in, options):
    adata = screen.copy()
    adata.obs["line"] = np.resize(["x", "y"], adata.n_obs)
    result = pv.benchmark.run(
        adata,
        {"net": stand_in},
        "random",
        "perturbation",
        "control",
        labels_key="line",
        seeds=[0],
        split_kwargs={"test_fraction": 0.5},
        **options,
    )
    rows = result.table[(result.table["model"] == "net") & (result.table["metric"] == "l2_profile")]
    assert set(rows["context"]) == {"x", "y"}
    assert not rows.duplicated(["condition", "context"]).any()
    assert "oracle" not in set(result.table["model"])


@pytest.fixture(scope="module")
def curve(screen, stand_in_class):
    """Three fractions of the four training combinations, two folds."""
    arguments = {"n_cells": 40, "progress": False, "references": ["NoChange", "Additive"]}
    return pv.benchmark.run(
        screen, {"net": stand_in_class}, *ARGUMENTS, seeds=(0, 1), n_folds=2, train_fraction=[1, 0, 0.5], **arguments
    )


def test_train_fraction_reaches_the_models(screen, stand_in, options):
    class Counting(stand_in):
        seen = []

        def train(self, split_key, **kwargs):
            labels = self.adata.obs["perturbation"][self.adata.obs[split_key] == "train"].astype(str)
            Counting.seen.append(labels.str.contains("+", regex=False).sum())
            super().train(split_key, **kwargs)

    pv.benchmark.run(screen, {"net": Counting}, *ARGUMENTS, seeds=[0], n_folds=3, train_fraction=(0, 0.5, 1), **options)
    assert sorted(Counting.seen) == [0, 0, 0, 40, 40, 40, 80, 80, 80]  # of 4 combinations of 20 cells


def test_curve_of_fractions(curve, screen):
    table = curve.table
    assert sorted(table["train_fraction"].unique()) == [0.0, 0.5, 1.0]
    assert (table["status"] == "ok").all()
    each = table.groupby("train_fraction")
    units = each["unit"].agg(lambda u: tuple(sorted(set(u))))
    assert units.nunique() == 1
    # the truth, and what is scored, are the same at all fractions: so are scores that need no training
    for model in ("duplicate", "oracle", "NoChange"):
        scores = table[(table["model"] == model) & ~table["metric"].str.startswith("energy")]
        wide = scores.pivot_table(index=["fold", "unit", "metric"], columns="train_fraction", values="value")
        np.testing.assert_allclose(wide[0.0], wide[1.0], rtol=1e-9, err_msg=model)
    assert set(curve.fits["train_fraction"]) == {0.0, 0.5, 1.0}
    summary = curve.summary()
    assert list(summary.columns[:3]) == ["train_fraction", "scheme", "model"]
    whole = pv.benchmark.run(
        screen, [], *ARGUMENTS, n_folds=2, n_cells=40, progress=False, references=["NoChange", "Additive"]
    )
    found = summary[(summary["train_fraction"] == 1) & (summary["model"] == "Additive")]
    expected = whole.summary().query("model == 'Additive'")
    kept = ["l2_profile", "l2_delta", "slope"]  # not those around a centre, which is that of all fractions here
    for metric in kept:
        a, b = (t.loc[t["metric"] == metric, "value"].item() for t in (found, expected))
        assert a == pytest.approx(b, rel=1e-9)
    pd.testing.assert_frame_equal(curve.compare(), curve.by_fraction[1.0].compare())


def test_curve_in_the_report(curve, tmp_path):
    page = curve.save(tmp_path / "r").read_text()
    assert "0%, 50%, 100% of the training combinations" in page
    assert (tmp_path / "r" / "figures" / "efficiency_unseen_combination.png").is_file()
    assert set(pd.read_csv(tmp_path / "r" / "table.csv")["train_fraction"]) == {0.0, 0.5, 1.0}
    text = curve.text()
    assert "l2_profile by fraction of the training combinations" in text
    assert "net" in text


def test_one_fraction_has_a_column_too(result):
    assert set(result.table["train_fraction"]) == {1.0}
    assert "train_fraction" not in result.summary()
    assert result.by_fraction == {}
    assert result.largest is result


def test_cache_tells_splits_of_equal_sizes_apart(screen, stand_in, options, tmp_path):
    held = sorted(c for c in screen.obs["perturbation"].unique() if "+" in c)[:2]
    for seed in (0, 1):  # the same held-out combinations, other test controls
        stand_in.calls.clear()
        arguments = {"seeds": [0], "cache_dir": tmp_path, "split_kwargs": {"held_out": held, "seed": seed}}
        pv.benchmark.run(screen, {"net": stand_in}, *ARGUMENTS, **arguments, **options)
        assert trainings(stand_in) == 1


def test_several_schemes_and_only_references(screen, options):
    schemes = ["random", "unseen_combination"]
    result = pv.benchmark.run(screen, [], schemes, "perturbation", "control", n_folds=1, **options)
    assert result.schemes == schemes
    assert set(result.summary()["scheme"]) == set(schemes)
    assert result.text().startswith("Only references were run (NoChange, Additive)")


def test_errors_come_before_anything_is_trained(screen, stand_in, options):
    def run(models=None, scheme="random", key="perturbation", control="control", adata=screen, **kwargs):
        return pv.benchmark.run(adata, models or [], scheme, key, control, **{**options, **kwargs})

    with pytest.raises(ValueError, match=r"'samsva' is not a model.*'samsvae'"):
        run(["samsva"])
    with pytest.raises(ValueError, match=r"'Aditive' is not a reference.*'Additive'"):
        run(references=["Aditive"])
    with pytest.raises(ValueError, match="references is empty"):
        run(references=[])
    with pytest.raises(ValueError, match=r"'l2_profil' is not a metric.*'l2_profile'"):
        run(metrics=["l2_profil"])
    with pytest.raises(ValueError, match=r"scheme='randum'.*'random'"):
        run(scheme="randum")
    with pytest.raises(KeyError, match=r"perturbation_key='pertubation'.*'perturbation'"):
        run(key="pertubation")
    with pytest.raises(KeyError, match=r"batch_key='bach'.*'batch'"):
        run(batch_key="bach")
    with pytest.raises(ValueError, match="No cell.*'ctrl'"):
        run(control="ctrl")
    with pytest.raises(KeyError, match="layer='counts'"):
        run(layer="counts")
    with pytest.raises(ValueError, match=r"seeds=\[\]"):
        run(seeds=[])
    with pytest.raises(ValueError, match="n_cells=1"):
        run(n_cells=1)
    for wrong in (-0.1, 1.5, [], [0.5, 0.5]):
        with pytest.raises(ValueError, match=r"train_fraction=.*from 0 to 1"):
            run(train_fraction=wrong)
    bad = screen.copy()
    bad.X.data[0] = -1
    with pytest.raises(ValueError, match=r"X holds negative or non-finite values, such as -1"):
        run(adata=bad)
    assert not stand_in.calls


def test_model_names():
    assert pv.benchmark.model_names()["samsvae"] == "SAMSVAE"
