"""Bootstrap intervals: coverage and pairing."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from pertvae.metrics import bootstrap_interval


def test_against_scipy() -> None:
    """Percentiles at a level that is wider by what a small sample needs: here 40 values, 90%."""
    wider = 1 - 2 * scipy.stats.norm.cdf(-np.sqrt(40 / 39) * scipy.stats.t.ppf(0.95, 39))
    x = np.random.default_rng(0).gamma(2.0, size=40)
    found = bootstrap_interval(x, n=20000, level=0.9)
    other = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=20000, confidence_level=wider, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.estimate == pytest.approx(x.mean())
    np.testing.assert_allclose([found.lower, found.upper], [other.low, other.high], atol=0.01)


def test_coverage() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(300):
        interval = bootstrap_interval(rng.normal(1.0, 1.0, 40), n=400, seed=seed)
        hits += interval.lower <= 1.0 <= interval.upper
    assert 0.90 < hits / 300 < 0.97


def test_paired_differences() -> None:
    rng = np.random.default_rng(3)
    hard = pd.Series(rng.normal(0, 5, 30), index=[f"P{i}" for i in range(30)])
    ours, theirs = hard + rng.normal(-0.5, 0.3, 30), hard
    paired = bootstrap_interval(ours, theirs.sample(frac=1, random_state=0))
    assert paired.upper < 0
    assert paired.estimate == pytest.approx((ours - theirs).mean())
    assert paired == bootstrap_interval(ours.to_numpy(), theirs.to_numpy())
    assert paired == bootstrap_interval(ours - theirs)
    # each alone says nothing
    assert bootstrap_interval(ours).lower < bootstrap_interval(theirs).estimate < bootstrap_interval(ours).upper


def test_one_value_has_no_interval() -> None:
    found = bootstrap_interval(np.array([2.0]))
    assert found.estimate == 2.0
    assert np.isnan([found.lower, found.upper]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0, np.nan],), "1 of 2 values are NaN"),
        (([],), r"shape \(0,\)"),
        (([[1.0]],), r"shape \(1, 1\)"),
        (([1.0, 2.0], [1.0]), "same conditions"),
        ((pd.Series([1.0, 2.0], index=["A", "B"]), pd.Series([1.0, 2.0], index=["A", "C"])), r"\['B', 'C'\]"),
    ],
)
def test_errors(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bootstrap_interval(*arguments)


def test_bad_level() -> None:
    with pytest.raises(ValueError, match=r"level=1\.0"):
        bootstrap_interval([1.0, 2.0], level=1.0)
