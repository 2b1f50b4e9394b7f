"""Control cells in a comparison: whose they are, how many, and when they are refused."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertvae._predictions import Block, prediction_anndata
from pertvae.datasets import example, read_truth
from pertvae.metrics import Comparison, evaluate, register
from pertvae.metrics import _registry as module

KEY, CONTROL = "perturbation", "control"


@pytest.fixture
def seen() -> list[Comparison]:
    """Comparisons that three metrics saw: of cells, of control cells, and of observed cells."""
    before, found = dict(module._METRICS), []

    def look(comparison: Comparison) -> np.ndarray:
        """Keep what there is."""
        found.append(comparison)
        return np.zeros(len(comparison.conditions))

    for name, needs in (("none", ()), ("of_controls", ("controls",)), ("of_observed", ("observed_cells",))):
        register(name, direction="lower", range=(0, 1), source="a test", needs=needs)(look)
    yield found
    module._METRICS.clear()
    module._METRICS.update(before)


@pytest.fixture(scope="module")
def halves() -> tuple[ad.AnnData, ad.AnnData]:
    adata = example()
    return adata[::2].copy(), adata[1::2].copy()


def logged(adata: ad.AnnData) -> np.ndarray:
    x = adata.X.toarray().astype(float)
    return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))


def as_prediction(adata: ad.AnnData, rows: np.ndarray) -> ad.AnnData:
    """Some control cells under every label, with shifts: their rendered cells say nothing."""
    truth = read_truth(adata)
    obs = pd.DataFrame(index=adata.obs_names[rows])
    blocks = [Block(label, adata.X[rows] * 2, obs) for label in [CONTROL, *truth.shifts.index]]
    controls = Block(CONTROL, adata.X[rows], obs)
    return prediction_anndata(blocks, controls, adata.var, KEY, truth.shifts, "made_predictions", {"model": "Made"})


def test_controls_of_each_side(halves, seen) -> None:
    first, second = halves
    evaluate(first, second, KEY, CONTROL, metrics="of_controls")
    for side, adata in ((seen[0].predicted_controls, first), (seen[0].observed_controls, second)):
        expected = logged(adata[adata.obs[KEY] == CONTROL])
        assert sp.issparse(side)
        np.testing.assert_allclose(side.toarray(), expected[: len(expected)], atol=1e-9)
    genes = first.var_names[[5, 2, 9]]
    evaluate(first, second, KEY, CONTROL, metrics="of_controls", genes=genes, max_cells=20)
    few = seen[1].observed_controls.toarray()
    assert few.shape == (20, 3)
    everyone = {tuple(row) for row in logged(second[second.obs[KEY] == CONTROL])[:, [2, 5, 9]].round(9)}
    assert {tuple(row) for row in few.round(9)} <= everyone
    # the draw is seeded
    evaluate(first, second, KEY, CONTROL, metrics="of_controls", genes=genes, max_cells=20)
    np.testing.assert_array_equal(few, seen[2].observed_controls.toarray())


def test_a_prediction_stands_on_its_source_cells(halves, seen) -> None:
    first, second = halves
    rows = np.flatnonzero(first.obs[KEY] == CONTROL)[3:20]
    predicted = as_prediction(first, rows)
    assert (predicted.obs.loc[predicted.obs[KEY] == CONTROL, "generated"]).any()
    evaluate(predicted, second, KEY, CONTROL, metrics="of_controls")
    np.testing.assert_allclose(seen[0].predicted_controls.toarray(), logged(first[rows]), atol=1e-9)


def test_controls_are_there_when_needed_only(halves, seen) -> None:
    first, second = halves
    bare = [x[x.obs[KEY] != CONTROL].copy() for x in halves]
    evaluate(first, second, KEY, CONTROL, metrics=["none", "l2_delta"])
    assert seen[-1].predicted_controls is None
    assert seen[-1].observed_controls is None
    evaluate(first, second, KEY, CONTROL, metrics="of_observed")
    assert seen[-1].predicted_controls is None
    assert seen[-1].observed_controls.shape[0] == (second.obs[KEY] == CONTROL).sum()
    evaluate(first, bare[1], KEY, CONTROL, metrics="of_observed")
    assert seen[-1].observed_controls is None
    with pytest.raises(ValueError, match="of_controls needs control cells on both sides .observed has no cells"):
        evaluate(first, bare[1], KEY, CONTROL, metrics="of_controls")
    with pytest.raises(ValueError, match="of_controls needs control cells on both sides .predicted has no cells"):
        evaluate(bare[0], second, KEY, CONTROL, metrics="of_controls")
    # shifts that a prediction carries need no control cells, tests against them do
    predicted = as_prediction(first, np.flatnonzero(first.obs[KEY] == CONTROL)[:5])
    predicted = predicted[predicted.obs[KEY] != CONTROL].copy()
    evaluate(predicted, second, KEY, CONTROL, metrics=["none", "l2_delta"])
    with pytest.raises(ValueError, match="predicted has no cells labelled 'control'"):
        evaluate(predicted, second, KEY, CONTROL, metrics="of_controls")


def test_shared_controls_are_refused(halves, seen) -> None:
    first, second = halves
    everything = example()
    with pytest.raises(ValueError, match=r"control cells stand in both.*of_controls look better"):
        evaluate(first, everything, KEY, CONTROL, metrics="of_controls")
    evaluate(first, everything, KEY, CONTROL, metrics=["none", "of_observed"])
    assert len(seen) == 2


def test_other_metrics_do_not_change_a_score(halves) -> None:
    # controls stand in the rest of weighted_mse whether or not another metric needs them
    alone = evaluate(*halves, KEY, CONTROL, metrics="weighted_mse")
    beside = evaluate(*halves, KEY, CONTROL, metrics=["weighted_mse", "de_count_ratio", "l2_delta"])
    pd.testing.assert_frame_equal(beside[beside["metric"] == "weighted_mse"], alone)
