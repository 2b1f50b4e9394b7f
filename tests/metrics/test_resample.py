"""Resampled observed cells: paired draws, their spread, and the metrics that are too slow for them."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae.datasets import example
from pertvae.metrics import _registry as module
from pertvae.metrics import evaluate, list_metrics, register, registry, resample

KEY, CONTROL = "perturbation", "control"


@pytest.fixture(scope="module")
def halves() -> tuple[ad.AnnData, ad.AnnData]:
    """Two halves with disjoint cells, controls too: technical duplicates."""
    screen = example()
    return screen[::2].copy(), screen[1::2].copy()


def pick(table: pd.DataFrame, metric: str, condition: str = "pooled") -> float:
    rows = table[(table["metric"] == metric) & (table["condition"] == condition)]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_resampling_is_paired_and_centred(halves) -> None:
    first, second = halves
    arguments = {"control": CONTROL, "metrics": ["l2_profile", "l2_delta"], "n_resamples": 60}
    one = resample(first, second, KEY, **arguments)
    pd.testing.assert_frame_equal(one, resample(first, second, KEY, **arguments))
    assert list(one.columns) == ["resample", "metric", "condition", "level", "value"]
    assert one["resample"].nunique() == 60
    # the same observed cells meet the same draws whatever was predicted: differences vary far less than scores
    worse = first.copy()
    worse.X.data = np.random.default_rng(0).binomial(worse.X.data.astype(int), 0.9).astype(np.float32)
    two = resample(worse, second, KEY, **arguments)
    pooled = (one["metric"] == "l2_profile") & (one["level"] == "pooled")
    assert (two.loc[pooled, "value"] - one.loc[pooled, "value"]).std() < 0.5 * two.loc[pooled, "value"].std()
    table = evaluate(first, second, KEY, n_resamples=60, metrics=["l2_profile", "pearson_delta"], control=CONTROL)
    assert ((table["lower"] < table["value"]) & (table["value"] < table["upper"])).all()
    assert (table.loc[table["metric"] == "pearson_delta", "upper"] <= 1).all()
    # drawing again moves a distance upward by construction: the interval must not inherit that
    mean = one[pooled]["value"].mean()
    assert mean > table.loc[(table["metric"] == "l2_profile") & (table["level"] == "pooled"), "upper"].item()


def test_resampling_spread_is_that_of_new_cells() -> None:
    # one condition observed again and again from one population, against the bootstrap from one sample
    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(1, 1, 40))

    def draw(n: int) -> ad.AnnData:
        x = rng.poisson(rates * np.r_[np.ones(n), np.full(n, 1.0)][:, None] * rng.lognormal(0, 0.2, (2 * n, 40)))
        obs = pd.DataFrame({KEY: ["A"] * n + [CONTROL] * n}, index=[f"c{rng.integers(1 << 62)}" for _ in range(2 * n)])
        return ad.AnnData(sp.csr_matrix(x.astype(np.float32)), obs=obs)

    predicted = draw(400)
    predicted.X = sp.csr_matrix(predicted.X.toarray() * np.r_[np.full(5, 4.0), np.ones(35)])
    scores = [pick(evaluate(predicted, draw(60), KEY, CONTROL, metrics="l2_profile"), "l2_profile") for _ in range(60)]
    bands = []
    for _ in range(5):
        table = evaluate(predicted, draw(60), KEY, CONTROL, metrics="l2_profile", n_resamples=150, level=0.6827)
        bands.append((table["upper"] - table["lower"]).iloc[-1] / 2)
    assert 0.7 < np.mean(bands) / np.std(scores) < 1.4


def test_controls_are_resampled_too(halves) -> None:
    first, second = halves
    still = second[second.obs[KEY].isin([CONTROL, "P001"])].copy()
    x = still.X.toarray()
    rows = (still.obs[KEY] == "P001").to_numpy()
    x[rows] = x[rows][0]  # cells without variance: what moves is the control
    still.X = sp.csr_matrix(x)
    arguments = {"control": CONTROL, "conditions": ["P001"], "n_resamples": 10}
    spread = resample(first, still, KEY, metrics=["l2_profile", "l2_delta"], **arguments)
    spread = spread[spread["level"] == "condition"].groupby("metric")["value"].agg(lambda v: v.round(9).nunique())
    assert spread.to_dict() == {"l2_delta": 10, "l2_profile": 1}


def test_energy_distance_resamples_by_weights(halves) -> None:
    first, second = halves
    table = evaluate(first, second, KEY, CONTROL, metrics="energy_distance", n_resamples=40, max_cells=25)
    assert ((table["lower"] < table["value"]) & (table["value"] < table["upper"])).all()
    draws = resample(first, second, KEY, control=CONTROL, metrics="energy_distance", n_resamples=40)
    pooled = draws[draws["level"] == "pooled"]["value"]
    value = pick(evaluate(first, second, KEY, CONTROL, metrics="energy_distance"), "energy_distance")
    # copies of a cell are not a pair of cells: no large shift to either side
    assert abs(pooled.mean() - value) < 3 * pooled.std()


@pytest.fixture
def clean() -> None:
    before = dict(module._METRICS)
    yield
    module._METRICS.clear()
    module._METRICS.update(before)


@pytest.mark.usefixtures("clean")
def test_slow_metrics_are_not_resampled(halves) -> None:
    calls = []

    @register("slow", direction="lower", range=(0, np.inf), source="a test", resampled=False)
    def slow(comparison):
        """Counts how often it is called."""
        calls.append(comparison.observed_weights)
        return np.zeros(len(comparison.conditions))

    assert not list_metrics().loc["slow", "resampled"]
    assert list_metrics().loc["l2_profile", "resampled"]
    names = ["l2_delta", "slow", "l2_profile"]
    table = evaluate(*halves, KEY, CONTROL, metrics=names, n_resamples=4)
    assert calls == [None]
    bounds = table[["lower", "upper"]].isna().all(axis=1)
    np.testing.assert_array_equal(bounds, table["metric"] == "slow")
    # the others meet the same draws as without it
    plain = evaluate(*halves, KEY, CONTROL, metrics=["l2_delta", "l2_profile"], n_resamples=4)
    pd.testing.assert_frame_equal(table[table["metric"] != "slow"].reset_index(drop=True), plain)
    only = evaluate(*halves, KEY, CONTROL, metrics="slow", n_resamples=4)
    assert only[["lower", "upper"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="'slow' is too slow"):
        resample(*halves, KEY, control=CONTROL, metrics=names, n_resamples=2)
    assert len(calls) == 2


def test_resampling_everything_leaves_out_what_is_slow(halves) -> None:
    first, second = halves
    slow = {name for name, metric in registry.items() if not metric.resampled}
    assert {"de_recovery", "de_count_ratio"} <= slow
    table = resample(first, second, KEY, control=CONTROL, train=second, n_resamples=2)
    assert set(table["metric"]) == set(registry) - slow
    assert len(table) == 2 * (table["resample"] == 0).sum()
    # row by row the scores of one draw: a metric alone gives the same ones
    alone = resample(first, second, KEY, control=CONTROL, metrics="weighted_mse", n_resamples=2)
    rows = table[table["metric"] == "weighted_mse"].reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, alone)
    assert rows["value"].nunique() == len(rows)
