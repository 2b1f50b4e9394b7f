"""Summaries, intervals and verdicts on tables made by hand."""

import numpy as np
import pandas as pd
import pytest

from pertvae.benchmark._intervals import MIN_CONDITIONS, mean_interval
from pertvae.benchmark._report import verdicts
from pertvae.benchmark._result import BenchmarkResult


def made(values, metric="l2_profile", seeds=(0,), draws=None):
    """Build a result from {method: values by condition}; methods in lower case are models."""
    rows, fits, drawn = [], [], []
    for model, numbers in values.items():
        kind = "model" if model.islower() else "reference"
        for seed in seeds if kind == "model" else (-1,):
            base = {"scheme": "random", "fold": 0, "model": model, "kind": kind, "seed": seed}
            fits.append({**base, "fit_seconds": 1.0, "predict_seconds": 1.0, "status": "ok", "error": "", "cached": 0})
            for i, number in enumerate(numbers):
                shown = number + (0.1 * seed if kind == "model" else 0)
                unit = {"condition": f"C{i}", "context": "", "seen": "1/1", "unit": f"C{i}"}
                score = {"metric": metric, "value": shown, "lower": np.nan, "upper": np.nan, "n_observed": 9}
                rows.append({**base, **unit, **score, "status": "ok", "error": ""})
                if draws is not None:
                    noise = draws[i] + shown
                    index = pd.MultiIndex.from_tuples([("random", 0, model, seed, f"C{i}")])
                    drawn.append(pd.DataFrame([noise], index=index))
    table = pd.DataFrame(rows)
    found = {}
    if drawn:
        found[metric] = pd.concat(drawn)
        found[metric].index.names = ["scheme", "fold", "model", "seed", "unit"]
    return BenchmarkResult(table, pd.DataFrame(fits), {}, draws=found)


def test_summary_is_the_mean_over_conditions_of_the_mean_over_seeds():
    result = made({"net": [1.0, 2.0, 6.0], "Ref": [3.0, 3.0, 3.0]}, seeds=(0, 1, 2))
    row = result.summary().set_index("model").loc["net"]
    assert row["value"] == pytest.approx(3.1)
    assert row["n_seeds"] == 3
    assert row["n_conditions"] == 3
    assert result.summary().set_index("model").loc["Ref", "n_seeds"] == 1


def test_comparison_is_paired_by_condition():
    """A small constant gain is seen through large differences between conditions."""
    level = np.random.default_rng(0).normal(10, 5, 12)
    result = made({"net": list(level - 0.1), "Ref": list(level)})
    row = result.compare().iloc[0]
    assert row["difference"] == pytest.approx(-0.1)
    assert row["lower"] == pytest.approx(-0.1)
    assert row["upper"] == pytest.approx(-0.1)
    assert row["verdict"] == "better"
    assert row["interval"] == "conditions"


@pytest.mark.parametrize(
    ("metric", "model", "verdict"),
    [
        ("l2_profile", 1.0, "better"),
        ("l2_profile", 3.0, "worse"),
        ("pearson_delta", 0.9, "worse"),
        ("pearson_delta", 2.5, "better"),
        ("slope", 1.1, "better"),
        ("slope", 0.9, "better"),
        ("slope", -2.0, "worse"),
    ],
)
def test_verdict_knows_which_way_is_better(metric, model, verdict):
    reference = 2.0  # for slope a distance of 1 from the best value
    noise = np.random.default_rng(1).normal(0, 0.01, 8)
    result = made({"net": list(model + noise), "Ref": [reference] * 8}, metric=metric)
    assert result.compare(metric).iloc[0]["verdict"] == verdict


def test_no_difference_when_the_interval_holds_zero():
    noise = np.random.default_rng(2).normal(0, 1, 10)
    result = made({"net": list(2 + noise - noise.mean()), "Ref": [2.0] * 10})
    assert result.compare().iloc[0]["verdict"] == "no difference"
    assert "no difference from the best reference, Ref" in verdicts(result)[0]


def test_best_reference_follows_the_direction_of_the_metric():
    values = {"net": [2.0] * 6, "Low": [1.0] * 6, "High": [3.0] * 6}
    for metric, best in (("l2_profile", "Low"), ("pearson_delta", "High"), ("slope", "Low")):
        compared = made(values, metric=metric).compare(metric)
        assert list(compared.loc[compared["best_reference"], "reference"]) == [best]


def test_few_conditions_resample_cells_and_are_not_judged():
    draws = np.random.default_rng(3).normal(0.5, 0.2, (2, 400))  # shifted upward, as resampled distances are
    result = made({"net": [1.0, 1.2], "Ref": [2.0, 2.2]}, draws=draws)
    row = result.summary().set_index("model").loc["net"]
    assert row["interval"] == "cells"
    assert row["lower"] < 1.1 < row["upper"]
    assert row["upper"] - row["lower"] == pytest.approx(2 * 1.96 * 0.2 / np.sqrt(2), rel=0.15)
    compared = result.compare().iloc[0]
    assert compared["verdict"] == "not judged"
    assert compared["upper"] == pytest.approx(-1.0)  # the same draws on both sides
    assert "No verdict: fewer than 5 conditions" in verdicts(result)[0]


@pytest.mark.parametrize("n", [5, 8, 30])
def test_interval_of_a_mean_has_its_coverage(n):
    """Plain percentiles of a bootstrap miss the mean in 16% of the samples of five."""
    rng = np.random.default_rng(4)
    inside = 0
    for _ in range(400):
        i = mean_interval(pd.Series(rng.normal(0, 1, n)))
        inside += i.lower < 0 < i.upper
    assert 0.92 <= inside / 400 <= 0.98


def test_one_condition_without_draws_has_no_interval():
    i = mean_interval(pd.Series([1.0, np.nan]))
    assert (i.value, i.kind, i.n) == (1.0, "none", 1)
    assert np.isnan(i.lower)
    assert mean_interval(pd.Series([np.nan])).n == 0
    assert MIN_CONDITIONS == 5


def test_unknown_names_are_hinted():
    result = made({"net": [1.0], "Ref": [2.0]})
    with pytest.raises(KeyError, match=r"'l2_profil'.*Did you mean 'l2_profile'"):
        result.by_condition("l2_profil")
    with pytest.raises(KeyError, match="scheme 'rand'"):
        result.by_condition(scheme="rand")


def test_distances_from_one_are_taken_before_the_mean():
    """Slopes of 0.2 and 1.8 are as wrong as 0.2 and 0.2."""
    result = made({"net": [0.2, 1.8] * 5, "Near": [0.9, 1.1] * 5}, metric="slope")
    row = result.compare("slope").iloc[0]
    assert row["model_value"] == pytest.approx(0.8)
    assert row["reference_value"] == pytest.approx(0.1)
    assert row["verdict"] == "worse"
    seeds = made({"net": [0.5] * 6, "Near": [0.8] * 6}, metric="slope", seeds=(0, 10))  # the second seed is 1.5
    assert seeds.compare("slope")["model_value"].item() == pytest.approx(0.5)


def test_a_reference_that_failed_where_it_is_hard_is_not_the_best():
    values = {"net": [1.0, 1.0, 1.0, 9.0, 9.0, 9.0], "Whole": [2.0, 2.0, 2.0, 8.0, 8.0, 8.0], "Part": [3.0] * 3}
    compared = made(values).compare()
    assert compared.loc[compared["best_reference"], "reference"].tolist() == ["Whole"]


def test_nothing_scored_has_the_columns_all_the_same():
    result = made({"net": [1.0], "Ref": [1.0]})
    result.table["status"] = "failed"
    assert list(result.summary().columns)[:3] == ["scheme", "model", "kind"]
    assert result.dynamic_range().empty
    assert list(result.compare([]).columns)[0] == "scheme"


def test_a_positive_control_below_the_negative_one_measures_nothing():
    values = {"net": [2.0] * 5, "Mean": [3.0] * 5, "duplicate": [4.0] * 5}
    result = made(values)
    result.table.loc[result.table["model"] == "duplicate", "kind"] = "duplicate"
    table = result.dynamic_range()
    assert table["normalised"].isna().all()
    assert table["dynamic_range"].isna().all()
