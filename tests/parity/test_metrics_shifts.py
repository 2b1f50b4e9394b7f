"""Errors of shifts and ranks against scikit-learn, and against definitions written out."""

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from pertvae.metrics import Comparison, registry

C, G = 7, 40


def compare(predicted: np.ndarray, observed: np.ndarray, control: np.ndarray | float = 0.0) -> Comparison:
    """Deltas as given; profiles lie above a control profile."""
    return Comparison(
        conditions=tuple(f"P{i}" for i in range(len(observed))),
        genes=pd.Index([f"g{i}" for i in range(observed.shape[1])]),
        predicted_profiles=predicted + control,
        observed_profiles=observed + control,
        predicted_deltas=predicted,
        observed_deltas=observed,
        reference_profile=None,
        predicted_cells=[],
        observed_cells=[],
    )


def score(name: str, *arguments) -> np.ndarray:
    return registry[name].function(compare(*arguments))


@pytest.fixture
def deltas() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    observed = rng.normal(0.3, 1, (C, G))
    return observed * 0.5 + rng.normal(0, 0.8, (C, G)), observed


def test_errors_against_sklearn(deltas) -> None:
    p, o = deltas
    for name, theirs in (("mae_delta", mean_absolute_error), ("mse_delta", mean_squared_error), ("r2_delta", r2_score)):
        expected = [theirs(b, a) for a, b in zip(p, o, strict=True)]
        np.testing.assert_allclose(score(name, p, o), expected, rtol=1e-12)
    np.testing.assert_allclose(score("mse_delta", p, o), score("l2_delta", p, o) ** 2 / G, rtol=1e-12)
    # not symmetric: what is explained is the observed shift
    assert (score("r2_delta", p, o) != score("r2_delta", o, p)).all()
    np.testing.assert_allclose(score("r2_delta", np.repeat(o.mean(axis=1), G).reshape(C, G), o), 0, atol=1e-12)
    constant = o.copy()
    constant[2] = 0.7
    assert np.isnan(score("r2_delta", p, constant)).tolist() == [i == 2 for i in range(C)]
    assert np.isnan(score("r2_delta", p[:1], constant[2:3])).all()


def noisy(p: np.ndarray) -> np.ndarray:
    """Predictions that are often nearer to another condition."""
    return p + np.random.default_rng(1).normal(0, 4, p.shape)


def cell_eval_score(p: np.ndarray, o: np.ndarray, metric: str) -> list[float]:
    """As cell-eval: the place of the own condition among the sorted distances, from 0, over their number."""
    values = []
    for i, row in enumerate(p):
        order = np.argsort(cdist(o, row[None], metric).ravel())
        values.append(1 - int(np.flatnonzero(order == i)[0]) / len(o))
    return values


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("discrimination_score", "cosine"),
        ("discrimination_score_l1", "cityblock"),
        ("discrimination_score_l2", "euclidean"),
    ],
)
def test_discrimination_as_cell_eval(deltas, name: str, metric: str) -> None:
    p, o = deltas
    p = noisy(p)
    expected = cell_eval_score(p, o, metric)
    np.testing.assert_allclose(score(name, p, o), expected, rtol=1e-12)
    assert len(set(expected)) > 3
    np.testing.assert_array_equal(score(name, o, o), np.ones(C))
    # the farthest of all scores 1 / P
    assert score(name, o[[1, 0]], o[:2]).tolist() == [0.5, 0.5]
    # profiles do not matter
    np.testing.assert_array_equal(score(name, p, o, np.arange(G)), expected)
    assert np.isnan(score(name, p[:1], o[:1])).all()


def test_predictions_that_say_nothing_score_as_chance(deltas) -> None:
    _, o = deltas
    chance = (C + 1) / (2 * C)
    # no change has no direction: every distance is the same, and sorting would put the first condition first
    np.testing.assert_allclose(score("discrimination_score", 0 * o, o), chance)
    for name in ("discrimination_score", "discrimination_score_l1", "discrimination_score_l2"):
        # the same prediction everywhere: ranks are those of one sorted list
        same = np.tile(o.mean(axis=0) + 0.1, (C, 1))
        assert score(name, same, o).mean() == pytest.approx(chance)
        # equal observed shifts are ties
        assert score(name, o[:1].repeat(3, axis=0), o[:1].repeat(3, axis=0)).tolist() == pytest.approx([2 / 3] * 3)


def test_sizes_of_shifts(deltas) -> None:
    p, o = noisy(deltas[0]), deltas[1]
    sizes = np.linspace(0.2, 5, C)[:, None]
    np.testing.assert_allclose(
        score("discrimination_score", sizes * p, o), score("discrimination_score", p, o), rtol=1e-12
    )
    assert (score("discrimination_score_l2", sizes * p, o) != score("discrimination_score_l2", p, o)).any()


def test_centroid_accuracy_by_counting(deltas) -> None:
    p, o = deltas
    control = np.linspace(0, 4, G)
    expected = []
    for i in range(C):
        own = np.sqrt(((p[i] - o[i]) ** 2).sum())
        others = [np.sqrt(((p[i] - o[j]) ** 2).sum()) for j in range(C) if j != i]
        expected.append(np.mean([d > own for d in others]))
    np.testing.assert_allclose(score("centroid_accuracy", p, o, control), expected)
    np.testing.assert_array_equal(score("centroid_accuracy", o, o, control), np.ones(C))
    assert score("centroid_accuracy", o[[1, 0]], o[:2]).tolist() == [0.0, 0.0]
    same = np.tile(o.mean(axis=0), (C, 1))
    assert score("centroid_accuracy", same, o, control).mean() == pytest.approx(0.5)
    assert score("centroid_accuracy", o[:1].repeat(3, axis=0), o[:1].repeat(3, axis=0)).tolist() == [0.5] * 3
    assert np.isnan(score("centroid_accuracy", p[:1], o[:1])).all()
