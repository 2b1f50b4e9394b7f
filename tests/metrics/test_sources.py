"""Predicted cells that were made from the same source cell are no independent draws."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

import pertvae as pv
from pertvae.metrics._distribution import apart, spread


@pytest.fixture(scope="module")
def null():
    """Cells of a perturbation that does nothing, and few controls."""
    rng = np.random.default_rng(0)
    states = rng.normal(0, 0.7, size=(240, 3)) @ rng.normal(size=(3, 50))
    x = rng.poisson(np.exp(1.0 + states))
    labels = ["control"] * 40 + ["A"] * 200
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(240)])
    return AnnData(sp.csr_matrix(x, dtype=np.float32), obs, pd.DataFrame(index=[f"G{i}" for i in range(50)]))


@pytest.mark.parametrize("metric", ["energy_distance", "mmd2"])
def test_copies_of_few_controls_are_as_near_as_each_control_once(null, metric):
    reference = pv.reference.NoChange().fit(null[:40], "perturbation", "control")

    def score(predicted):
        found = pv.metrics.evaluate(predicted, null[40:], "perturbation", "control", metrics=metric)
        return found.loc[found["condition"] == "A", "value"].item()

    many, once = (reference.predict_perturbation("A", n_cells=n) for n in (500, 40))
    forgotten = many.copy()
    del forgotten.obs["source_cell"]  # as if all cells were independent draws
    bias = score(forgotten) - score(many)
    assert bias > 0
    assert abs(score(many) - score(once)) < 0.4 * bias


def test_pairs_of_one_source_do_not_count():
    distances = np.array([[0.0, 1.0, 5.0], [1.0, 0.0, 7.0], [5.0, 7.0, 0.0]])
    assert apart(distances, np.array([0, 0, 1])) == 6.0
    assert apart(distances, np.array([0, 1, 2])) == pytest.approx(13 / 3)
    assert np.isnan(apart(distances, np.zeros(3)))


def test_distinct_sources_come_first():
    sources = np.repeat(np.arange(5), [10, 1, 3, 1, 5])
    rng = np.random.default_rng(1)
    order = spread(rng, sources, 20)
    assert sorted(order) == list(range(20))
    assert set(sources[order[:5]]) == set(range(5))
    assert len(set(sources[order[5:8]])) == 3
    firsts = {tuple(spread(rng, sources, 3)) for _ in range(30)}
    assert len(firsts) > 10  # which ones is chance
    assert len(spread(rng, sources, 7)) == 7
