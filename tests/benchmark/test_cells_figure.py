"""Observed and predicted cells in one embedding."""

import numpy as np
import pandas as pd

from pertvae.benchmark import _cells_figure
from pertvae.benchmark._cells_figure import _umap, cells_figure  # the real one: tests of whole runs replace it

RNG = np.random.default_rng(0)


def cloud(center, units):
    values = [RNG.normal(center * (i + 1), 0.3, size=(30, 5)) for i in range(len(units))]
    return pd.DataFrame(np.concatenate(values), index=np.repeat(units, 30))


def test_clouds_that_are_apart_stay_apart_and_draws_repeat():
    x = np.concatenate([RNG.normal(0, 0.3, (60, 5)), RNG.normal(8, 0.3, (60, 5))]).astype(np.float32)
    first = _umap(x)
    np.testing.assert_array_equal(first, _umap(x))
    a, b = first[:60], first[60:]
    spread = max(np.linalg.norm(part - part.mean(axis=0), axis=1).max() for part in (a, b))
    assert np.linalg.norm(a.mean(axis=0) - b.mean(axis=0)) > 2 * spread


def test_one_panel_for_the_observed_cells_and_one_a_method(monkeypatch):
    monkeypatch.setattr(_cells_figure, "_umap", lambda x: x[:, :2])
    observed = cloud(0.0, ["control", "A+B", "C+D"])
    predicted = {f"method{i}": cloud(1.0 + i, ["A+B", "C+D"]) for i in range(7)}
    figure = cells_figure(observed, predicted)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    titles = [ax.get_title() for ax in shown]
    assert titles == ["observed, held out", *(f"predicted by method{i}" for i in range(_cells_figure.MAX_METHODS))]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["training controls", "A+B", "C+D"]
    for i, ax in enumerate(shown[1:]):
        controls, first, second = (np.asarray(c.get_offsets()) for c in ax.collections)
        np.testing.assert_allclose(controls, observed.loc["control"].to_numpy()[:, :2])
        np.testing.assert_allclose(first, predicted[f"method{i}"].loc["A+B"].to_numpy()[:, :2])
        np.testing.assert_allclose(second, predicted[f"method{i}"].loc["C+D"].to_numpy()[:, :2])


def test_nothing_to_draw():
    assert cells_figure(pd.DataFrame(), {"a": cloud(0, ["A"])}) is None
    assert cells_figure(cloud(0, ["control", "A"]), {}) is None
